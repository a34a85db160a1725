// Winograd's F(4x4, 3x3): 36 products in place of 144. The line transforms of winograd.inl, by the Toom-Cook formula
// for the points 0, a, -a, b, -b and infinity (Lavin and Gray 2015, with a = 1, b = 2):
//        | aabb   0   -aa-bb   0     1  0 |        |  1/aabb            |
//        |  0   -abb   -bb     a     1  0 |        | (1   a  aa) / n(a) |         | 1  1   1   1   1   0 |
//   B' = |  0    abb   -bb    -a     1  0 |    G = | (1  -a  aa) / n(a) |    A' = | 0  a  -a   b  -b   0 |
//        |  0   -aab   -aa     b     1  0 |        | (1   b  bb) / n(b) |         | 0 aa  aa  bb  bb   0 |
//        |  0    aab   -aa    -b     1  0 |        | (1  -b  bb) / n(b) |         | 0 aaa -aaa bbb -bbb 1|
//        |  0   aabb     0  -aa-bb   0  1 |        |  0   0   1         |
// with n(a) = 2 aa (aa - bb), n(b) = 2 bb (bb - aa). The points decide the error, by their powers and differences
// (Barabasz, Anderson, Soodhalter and Gregg 2020). Error of z in units of its rms (rms, max), simulated, 64 channels:
//   a, b =  1, 2        1.7e-6, 2.9e-5      a, b =  2/3, 4/3    8.4e-7, 7.8e-6
//           1/2, 3/2    9.7e-7, 1.4e-5              3/4, 3/2    8.5e-7, 7.9e-6
//           0.7, 1.5    8.1e-7, 6.6e-6              1/sqrt(2), sqrt(2)    8.3e-7, 6.8e-6
// The direct algorithm's is 4.2e-7, 3.7e-6. Of the best, a = 1/sqrt(2), b = sqrt(2) have the cheapest transforms:
// aa = 1/2, bb = 2 and aabb = 1 are exact. With these kernels the error is 7.9e-7, 1.5e-6 and 2.1e-6 (rms) for 64, 256
// and 512 channels, the direct algorithm's 4.2e-7, 8.3e-7 and 1.1e-6.

template <>
struct WinogradLine<4> {
  static constexpr double kA = 0.70710678118654752440, kB = 2 * kA;
  static constexpr double kA2 = 0.5, kB2 = 2, kNA = 2 * kA2 * (kA2 - kB2), kNB = 2 * kB2 * (kB2 - kA2);

  template <class V>
  FCB_INLINE void window(const V (&d)[6], V (&t)[6]) {  // B' d
    typedef decltype(d[0][0] + d[0][0]) S;
    const V even_a = d[4] - d[2] * S(kB2), odd_a = (d[3] - d[1] * S(kB2)) * S(kA);
    const V even_b = d[4] - d[2] * S(kA2), odd_b = (d[3] - d[1] * S(kA2)) * S(kB);
    t[0] = (d[0] + d[4]) - d[2] * S(kA2 + kB2);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = (d[1] + d[5]) - d[3] * S(kA2 + kB2);
  }

  // Of F(2, 3) for the points 0, a, -a and infinity, t[3] being that of infinity; scaled so that the filters are those
  // of F(4, 3) for these points.
  template <class V>
  FCB_INLINE void window(const V (&d)[4], V (&t)[4]) {
    typedef decltype(d[0][0] + d[0][0]) S;
    const V even = d[2] * S(kA2 - kB2), odd = d[1] * S(kA * (kA2 - kB2));
    t[0] = d[0] - d[2] * S(kB2);
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = d[3] - d[1] * S(kA2);
  }

  template <class V>
  FCB_INLINE void filter(const V (&g)[3], V (&t)[6]) {  // G g
    typedef decltype(g[0][0] + g[0][0]) S;
    const V even_a = (g[0] + g[2] * S(kA2)) * S(1 / kNA), odd_a = g[1] * S(kA / kNA);
    const V even_b = (g[0] + g[2] * S(kB2)) * S(1 / kNB), odd_b = g[1] * S(kB / kNB);
    t[0] = g[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
  }

  template <class V>
  FCB_INLINE void output(const V (&m)[6], V (&y)[4]) {  // A' m
    typedef decltype(m[0][0] + m[0][0]) S;
    const V even_a = m[1] + m[2], odd_a = (m[1] - m[2]) * S(kA);
    const V even_b = m[3] + m[4], odd_b = (m[3] - m[4]) * S(kB);
    y[0] = m[0] + even_a + even_b;
    y[1] = odd_a + odd_b;
    y[2] = even_a * S(kA2) + even_b * S(kB2);
    y[3] = m[5] + odd_a * S(kA2) + odd_b * S(kB2);
  }

  template <class V>
  FCB_INLINE void output(const V (&m)[4], V (&y)[2]) {  // of F(2, 3), as above
    typedef decltype(m[0][0] + m[0][0]) S;
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[3] + (m[1] - m[2]) * S(kA);
  }

  template <class V>
  FCB_INLINE void gradient(const V (&y)[4], V (&t)[6]) {  // A y
    typedef decltype(y[0][0] + y[0][0]) S;
    const V even_a = y[0] + y[2] * S(kA2), odd_a = (y[1] + y[3] * S(kA2)) * S(kA);
    const V even_b = y[0] + y[2] * S(kB2), odd_b = (y[1] + y[3] * S(kB2)) * S(kB);
    t[0] = y[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = y[3];
  }

  template <class V>
  FCB_INLINE void filter_gradient(const V (&s)[6], V (&g)[3]) {  // G' s
    typedef decltype(s[0][0] + s[0][0]) S;
    const V even_a = (s[1] + s[2]) * S(1 / kNA), odd_a = (s[1] - s[2]) * S(kA / kNA);
    const V even_b = (s[3] + s[4]) * S(1 / kNB), odd_b = (s[3] - s[4]) * S(kB / kNB);
    g[0] = s[0] + even_a + even_b;
    g[1] = odd_a + odd_b;
    g[2] = even_a * S(kA2) + even_b * S(kB2) + s[5];
  }
};
