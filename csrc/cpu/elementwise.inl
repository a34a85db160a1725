// Everything that is computed element by element on a block, or summed over its rows.

constexpr int64_t kFetchBytes = 8192;

template <class T>
FCB_INLINE const T* row(const void* block, int64_t r, int64_t ld) {
  return static_cast<const T*>(block) + r * ld;
}
template <class T>
FCB_INLINE T* row(void* block, int64_t r, int64_t ld) {
  return static_cast<T*>(block) + r * ld;
}

#if defined(__AVX512F__)
// A relu of one instruction; of NaN it is NaN, as the other.
template <Activation A>
FCB_INLINE __m512 activate_lanes(__m512 u) {
  if constexpr (A == Activation::kRelu)
    return _mm512_max_ps(_mm512_setzero_ps(), u);
  else
    return (__m512)activate<A, float>((Vector<float>)u);
}
#endif

// Asks for 16-bit numbers that are read some 8 KiB later, in blocks of whole rows.
template <class C, class T>
FCB_INLINE void fetch_ahead(const void* block, int64_t r, int64_t ld, int64_t c) {
  __builtin_prefetch(row<T>(block, r, ld) + c + kFetchBytes / sizeof(T));
}

// The same in whole rows, for blocks of some of a row's columns.
template <class T>
FCB_INLINE int64_t fetch_distance(int64_t ld) {
  const int64_t rows = kFetchBytes / static_cast<int64_t>(sizeof(T)) / (ld > 0 ? ld : 1);
  return (rows > 0 ? rows : 1) * ld;
}

// Calls f(read, write, column) for each vector of columns; the last one may be a part.
template <class C, class F>
FCB_INLINE void for_vectors(int64_t cols, F f) {
  int64_t c = 0;
  for (; c + kLanes<C> <= cols; c += kLanes<C>)
    f([](const auto* p) { return load(p); }, [](auto* p, Vector<C> v) { store(p, v); }, c);
  if (c == cols) return;
  const int64_t part = cols - c;
  f([part](const auto* p) { return load_part(p, part); }, [part](auto* p, Vector<C> v) { store_part(p, v, part); }, c);
}

// The sums over the rows of f(column vector of a row), in four parts: one would wait for each addition, and err more.
template <class C, class F>
FCB_INLINE Vector<C> sum_rows(int64_t rows, F f) {
  Vector<C> sum[4] = {};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += f(r + i);
  }
  for (; r < rows; ++r) sum[0] += f(r);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// In one pass, of deviations from a mean of few rows. That lies within sqrt(rows / few) standard deviations of the mean
// of all, whatever the numbers are: so what is subtracted in the end is at most rows / few times the result.
template <class C>
static void moments(const C* block, int64_t ld, int64_t rows, int64_t cols, const ColumnMoments<C>& to) {
  const int64_t few = rows < 8 ? 1 : 8;  // exact where a column is constant
  for_vectors<C>(cols, [&](auto read, auto write, int64_t c) {
    const Vector<C> count = Vector<C>{} + C(rows);
    const Vector<C> some = sum_rows<C>(few, [&](int64_t r) { return read(block + r * ld + c); }) / C(few);
    const Vector<C> shift = some - some == Vector<C>{} ? some : Vector<C>{};  // an infinite mean is to stay one
    Vector<C> sum[4] = {}, square[4] = {};
    const auto add = [&](int64_t r, int i) {
      const Vector<C> d = read(block + r * ld + c) - shift;
      sum[i] += d;
      square[i] += d * d;
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add(r + i, i);
    }
    for (; r < rows; ++r) add(r, 0);
    const Vector<C> all = (sum[0] + sum[1]) + (sum[2] + sum[3]), offset = all / count;
    write(to.shift + c, shift);
    write(to.offset + c, offset);
    write(to.squares + c, (square[0] + square[1]) + (square[2] + square[3]) - offset * all);
  });
}

#if defined(__AVX512F__)
// 1 / sqrt(x) by two of Newton's steps, each of which doubles the estimate's 14 bits: a quarter of the time of the
// square root and the division. Of 0 and infinity the estimate is exact, and a step would make it NaN.
FCB_INLINE __m512d inverse_root(__m512d x) {
  const __m512d half = _mm512_mul_pd(x, _mm512_set1_pd(0.5)), three_halves = _mm512_set1_pd(1.5);
  const __mmask8 inexact = _mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_GT_OQ) &
                           _mm512_cmp_pd_mask(x, _mm512_set1_pd(__builtin_inf()), _CMP_LT_OQ);
  __m512d y = _mm512_rsqrt14_pd(x);
  for (int step = 0; step < 2; ++step)
    y = _mm512_mask_mul_pd(y, inexact, y, _mm512_fnmadd_pd(_mm512_mul_pd(half, y), y, three_halves));
  return y;
}
#endif

template <class C>
static void inverse_deviations(const C* variance, double epsilon, int64_t count, C* to) {
  int64_t c = 0;
#if defined(__AVX512F__)
  if constexpr (__is_same(C, float))
    for (; c + 8 <= count; c += 8) {
      const __m512d x = _mm512_add_pd(_mm512_cvtps_pd(_mm256_loadu_ps(variance + c)), _mm512_set1_pd(epsilon));
      _mm256_storeu_ps(to + c, _mm512_cvtpd_ps(inverse_root(x)));
    }
#endif
  for (; c < count; ++c) to[c] = static_cast<C>(1 / __builtin_sqrt(static_cast<double>(variance[c]) + epsilon));
}

// Calls f(first row, last row + 1) for groups of 8 rows: what a column needs besides is read once for a group, and a
// few rows at a time are still a few streams through memory.
template <int64_t kGroup = 8, class F>
FCB_INLINE void for_row_groups(int64_t rows, F f, int64_t group = kGroup) {
  for (int64_t first = 0; first < rows; first += group) f(first, first + group < rows ? first + group : rows);
}

// The same where backward may read or write more arrays than dy, z and its gradient: then, with vectors of less than a
// line, one row at a time. They come back to each line, and with 8 rows of so many arrays, often a power of two apart,
// a set of L1 has lost it by then (1.6 times slower).
template <class F>
FCB_INLINE void for_rows_of_arrays(int64_t rows, bool more, F f) {
  for_row_groups(rows, f, FCB_VECTOR_BYTES < 64 && more ? 1 : 8);
}

// A number as a bfloat16, in a float: the nearest one or, where activation' jumps between u of the two, that on the
// other side of the number, which is u's. So backward, which has no other z, finds each u on its side. u_of is
// monotonic.
template <Activation A, class F>
FCB_INLINE Vector<float> round_for_backward(Vector<float> x, const F& u_of) {
  using Bits = Simd<float>::Bits;
  const Bits bits = (Bits)x, toward_zero = bits & 0xffff0000u;
  const Bits nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  const Vector<float> near = x == x ? (Vector<float>)nearest : x;  // of a NaN's bits the upper half may be no NaN's
  if constexpr (!derivative_jumps(A)) return near;
  const Vector<float> other = (Vector<float>)(toward_zero + toward_zero + 0x10000u - nearest);
  return piece<A, float>(u_of(near)) == piece<A, float>(u_of(x)) ? near : other;
}

// Of z in memory, or in cache: then these are the rows of a tile, and gemm has asked for what else they need. Rounds:
// with b.rounded.
// Takes its own copy of the block, as do those below: what is stored could be the caller's. Z: of z, T: of memory.
template <class C, Activation A, bool Stream, bool InCache, bool Rounds = false, class Z = C, class T = C>
FCB_INLINE void affine_block(AffineBlock<C> b) {
  constexpr bool kPastCaches = Stream && !InCache;  // then memory decides, which likes one row's few streams
  constexpr bool kByRows = kPastCaches || (Stream && sizeof(Vector<C>) < 64);  // a streamed line is to follow at once
  const int64_t ahead = fetch_distance<Z>(b.ld_z), residual_ahead = fetch_distance<T>(b.ld_residual);
  for_row_groups<kByRows ? 1 : 8>(b.rows, [&](int64_t first, int64_t end) {
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      const Vector<C> mean = read(b.mean + c), scale = read(b.scale + c), beta = read(b.beta + c);
      for (int64_t r = first; r < end; ++r) {
        if constexpr (!InCache) __builtin_prefetch(row<Z>(b.z, r, b.ld_z) + c + ahead);
        const T* residual = nullptr;
        if (b.residual) {
          residual = row<T>(b.residual, r, b.ld_residual) + c;
          if constexpr (kPastCaches) __builtin_prefetch(residual + residual_ahead);
        }
        const auto u_of = [&](Vector<C> centered) {
          const Vector<C> u = centered * scale + beta;
          return residual ? u + read(residual) : u;
        };
        const Vector<C> centered = read(row<Z>(b.z, r, b.ld_z) + c) - mean, u = u_of(centered);
        if constexpr (Rounds) {
          uint16_t* to = b.rounded + r * b.ld_rounded + c;
          __builtin_prefetch(to + (end - first) * b.ld_rounded);
          write(to, round_for_backward<A>(centered, u_of));
        }
        T* y = row<T>(b.y, r, b.ld_y) + c;
        if constexpr (Stream) {
          stream(y, activate<A, C>(u));
        } else {
          // A store waits for its line, which no hardware foresees.
          if constexpr (!InCache) __builtin_prefetch(y + (end - first) * b.ld_y);
          write(y, activate<A, C>(u));
        }
      }
    });
  });
}

template <class C, Activation A>
static void emit(const AffineBlock<C>& b) {
  b.stream ? affine_block<C, A, true, true>(b) : affine_block<C, A, false, true>(b);
}

template <class C, Activation A>
static void affine(const AffineBlock<C>& b) {
  if constexpr (__is_same(C, float))
    if (b.rounded) return affine_block<C, A, false, false, true>(b);
  if (!b.stream) return affine_block<C, A, false, false>(b);
  affine_block<C, A, true, false>(b);
  end_streaming();
}

template <class C>
static void emit_sums(const AffineBlock<C>& b) {
  for (int64_t r = 0; r < b.rows; ++r)
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      const Vector<C> z = read(row<C>(b.z, r, b.ld_z) + c);
      C* y = row<C>(b.y, r, b.ld_y) + c;
      b.stream ? stream(y, z) : write(y, z);
    });
}

// du of one vector of channels, whose constants are given; T: of memory.
template <class C, class T, Activation A, Preactivation P, class Read>
FCB_INLINE Vector<C> gradient_of_u(const GradientBlock<C>& b, Read read, int64_t r, int64_t c, Vector<C> centered,
                                   Vector<C> scale, Vector<C> beta) {
  const Vector<C> dy = read(row<T>(b.dy, r, b.ld_dy) + c);
  if constexpr (A == Activation::kNone) {
    return dy;
  } else if constexpr (P == Preactivation::kOutput) {
    return dy * derivative_of_output<A, C>(read(row<T>(b.extra, r, b.ld_extra) + c));
  } else {
    Vector<C> u = centered * scale + beta;
    if constexpr (P == Preactivation::kConvAndResidual) u += read(row<T>(b.extra, r, b.ld_extra) + c);
    return dy * derivative<A, C>(u);
  }
}

// Z: of z.
template <class C, class T, Activation A, Preactivation P, class Z = T>
static void reduce(const GradientBlock<C>& block) {
  const GradientBlock<C> b = block;
  const int64_t ahead_z = fetch_distance<Z>(b.ld_z), ahead_dy = fetch_distance<T>(b.ld_dy);
  for_rows_of_arrays(b.rows, P != Preactivation::kConv, [&](int64_t first, int64_t end) {
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      const Vector<C> mean = read(b.mean + c), scale = read(b.scale + c), beta = read(b.beta + c);
      Vector<C> sum_du{}, sum_du_z{}, sum_z{};
      for (int64_t r = first; r < end; ++r) {
        __builtin_prefetch(row<Z>(b.z, r, b.ld_z) + c + ahead_z);
        __builtin_prefetch(row<T>(b.dy, r, b.ld_dy) + c + ahead_dy);
        const Vector<C> centered = read(row<Z>(b.z, r, b.ld_z) + c) - mean;
        const Vector<C> du = gradient_of_u<C, T, A, P>(b, read, r, c, centered, scale, beta);
        sum_du += du;
        sum_du_z += du * centered;
        sum_z += centered;
      }
      write(b.sum_du + c, read(b.sum_du + c) + sum_du);
      write(b.sum_du_z + c, read(b.sum_du_z + c) + sum_du_z);
      write(b.sum_z + c, read(b.sum_z + c) + sum_z);
    });
  });
}

// T: of memory, D: of the gradient of z, Z: of z.
template <class C, class T, class D, Activation A, Preactivation P, class Z = T>
static void apply(const GradientBlock<C>& block) {
  const GradientBlock<C> b = block;
  const int64_t ahead_z = fetch_distance<Z>(b.ld_z), ahead_dy = fetch_distance<T>(b.ld_dy);
  for_rows_of_arrays(b.rows, P != Preactivation::kConv || b.d_residual, [&](int64_t first, int64_t end) {
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      const Vector<C> mean = read(b.mean + c), scale = read(b.scale + c), beta = read(b.beta + c);
      const Vector<C> slope = read(b.slope + c), curve = b.curve ? read(b.curve + c) : slope,
                      offset = b.curve ? read(b.offset + c) : slope;
      for (int64_t r = first; r < end; ++r) {
        __builtin_prefetch(row<Z>(b.z, r, b.ld_z) + c + ahead_z);
        __builtin_prefetch(row<T>(b.dy, r, b.ld_dy) + c + ahead_dy);
        const Vector<C> centered = read(row<Z>(b.z, r, b.ld_z) + c) - mean;
        const Vector<C> du = gradient_of_u<C, T, A, P>(b, read, r, c, centered, scale, beta);
        if (b.d_residual) {
          T* const d_residual = row<T>(b.d_residual, r, b.ld_d_residual) + c;
          if constexpr (kIsSmall<T>)
            b.stream ? stream(d_residual, du) : write(d_residual, du);
          else
            write(d_residual, du);
        }
        const Vector<C> d_conv = slope * du;
        write(row<D>(b.d_conv, r, b.ld_d_conv) + c, b.curve ? d_conv + (curve * centered + offset) : d_conv);
      }
    });
  });
}
