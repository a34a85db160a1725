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

// Asks for what is read some 8 KiB later in blocks of whole rows: the hardware stops foreseeing at each page.
template <class T>
FCB_INLINE void fetch_ahead(const void* block, int64_t r, int64_t ld, int64_t c) {
  __builtin_prefetch(row<T>(block, r, ld) + c + kFetchBytes / static_cast<int64_t>(sizeof(T)));
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

template <class C>
static void moments(const C* block, int64_t ld, int64_t rows, int64_t cols, C* mean, C* squares) {
  for_vectors<C>(cols, [&](auto read, auto write, int64_t c) {
    const Vector<C> count = Vector<C>{} + C(rows);
    const Vector<C> m = sum_rows<C>(rows, [&](int64_t r) { return read(block + r * ld + c); }) / count;
    // rest: rows times the rounding error of m; corrected by it, both results are exact to the last bits.
    Vector<C> rest[2] = {}, square[2] = {};
    const auto add = [&](int64_t r, int i) {
      const Vector<C> d = read(block + r * ld + c) - m;
      rest[i] += d;
      square[i] += d * d;
    };
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) add(r, 0), add(r + 1, 1);
    if (r < rows) add(r, 0);
    const Vector<C> all = rest[0] + rest[1], error = all / count, better = m + error;
    write(mean + c, error == error ? better : m);  // an infinite m stays: its error is NaN
    write(squares + c, square[0] + square[1] - error * all);
  });
}

template <class C, Activation A, bool Stream>
FCB_INLINE void affine_block(const AffineBlock<C>& b) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const C* z = row<C>(b.z, r, b.ld_z);
    const C* residual = b.residual ? row<C>(b.residual, r, b.ld_residual) : nullptr;
    C* y = row<C>(b.y, r, b.ld_y);
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      Vector<C> u = (read(z + c) - read(b.mean + c)) * read(b.scale + c) + read(b.beta + c);
      if (residual) u += read(residual + c);
      if constexpr (Stream)
        stream(y + c, activate<A, C>(u));
      else
        write(y + c, activate<A, C>(u));
    });
  }
}

template <class C, Activation A>
static void affine(const AffineBlock<C>& b) {
  if (!b.stream) return affine_block<C, A, false>(b);
  affine_block<C, A, true>(b);
  end_streaming();
}

// du of one vector of channels; T: of memory.
template <class C, class T, Activation A, Preactivation P, class Read>
FCB_INLINE Vector<C> gradient_of_u(const GradientBlock<C>& b, Read read, int64_t r, int64_t c, Vector<C> centered) {
  const Vector<C> dy = read(row<T>(b.dy, r, b.ld_dy) + c);
  if constexpr (A == Activation::kNone) {
    return dy;
  } else if constexpr (P == Preactivation::kOutput) {
    return dy * derivative_of_output<A, C>(read(row<T>(b.extra, r, b.ld_extra) + c));
  } else {
    Vector<C> u = centered * read(b.scale + c) + read(b.beta + c);
    if constexpr (P == Preactivation::kConvAndResidual) u += read(row<T>(b.extra, r, b.ld_extra) + c);
    return dy * derivative<A, C>(u);
  }
}

// Rows [first, first + R) together: the sums stay in memory (L1), and are read and written once for them all.
template <class C, class T, Activation A, Preactivation P, int R>
FCB_INLINE void reduce_rows(const GradientBlock<C>& b, int64_t first) {
  for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
    Vector<C> sum_du = read(b.sum_du + c), sum_du_z = read(b.sum_du_z + c), sum_z = read(b.sum_z + c);
#pragma GCC unroll 4
    for (int64_t r = first; r < first + R; ++r) {
      fetch_ahead<T>(b.z, r, b.ld_z, c);
      fetch_ahead<T>(b.dy, r, b.ld_dy, c);
      const Vector<C> centered = read(row<T>(b.z, r, b.ld_z) + c) - read(b.mean + c);
      const Vector<C> du = gradient_of_u<C, T, A, P>(b, read, r, c, centered);
      sum_du += du;
      sum_du_z += du * centered;
      sum_z += centered;
    }
    write(b.sum_du + c, sum_du);
    write(b.sum_du_z + c, sum_du_z);
    write(b.sum_z + c, sum_z);
  });
}

template <class C, class T, Activation A, Preactivation P>
static void reduce(const GradientBlock<C>& b) {
  int64_t r = 0;
  for (; r + 4 <= b.rows; r += 4) reduce_rows<C, T, A, P, 4>(b, r);
  for (; r < b.rows; ++r) reduce_rows<C, T, A, P, 1>(b, r);
}

// T: of memory, D: of the gradient of z.
template <class C, class T, class D, Activation A, Preactivation P>
static void apply(const GradientBlock<C>& b) {
  for (int64_t r = 0; r < b.rows; ++r)
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      fetch_ahead<T>(b.z, r, b.ld_z, c);
      fetch_ahead<T>(b.dy, r, b.ld_dy, c);
      const Vector<C> centered = read(row<T>(b.z, r, b.ld_z) + c) - read(b.mean + c);
      const Vector<C> du = gradient_of_u<C, T, A, P>(b, read, r, c, centered);
      if (b.d_residual) write(row<T>(b.d_residual, r, b.ld_d_residual) + c, du);
      Vector<C> d_conv = read(b.slope + c) * du;
      if (b.curve) d_conv += read(b.curve + c) * centered + read(b.offset + c);
      write(row<D>(b.d_conv, r, b.ld_d_conv) + c, d_conv);
    });
}
