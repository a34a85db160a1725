// What kernels of 1x1 convolutions do with a block of pixels that lies row by row in L1 or L2 (second_moments.h,
// backward_moments.cc).

// mean[depth] of the rows, as exact as a second pass can make it: the deviations' own mean is added.
template <class C>
static void row_means(const GatheredRows<C>& in, C* mean) {
  for_vectors<C>(in.depth, [&](auto read, auto write, int64_t c) {
    const Vector<C> count = Vector<C>{} + C(in.count);
    const auto row = [&](int64_t r) { return read(in.rows[r] + in.offset + c); };
    const Vector<C> m = sum_rows<C>(in.count, row) / count;
    const Vector<C> error = sum_rows<C>(in.count, [&](int64_t r) { return row(r) - m; }) / count;
    write(mean + c, error == error ? m + error : m);  // an infinite m stays: its error is NaN
  });
}

// centered[count][ld] = rows - mean.
template <class C>
static void center_rows(const GatheredRows<C>& in, const C* mean, C* centered, int64_t ld) {
  for (int64_t r = 0; r < in.count; ++r)
    for_vectors<C>(in.depth, [&](auto read, auto write, int64_t c) {
      write(centered + r * ld + c, read(in.rows[r] + in.offset + c) - read(mean + c));
    });
}

template <class C, int R, int N>
static void product(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, C* sums, int64_t ld,
                    Ahead<C>* ahead) {
  Vector<C> acc[R][N] = {};
  product_sums<C, R, N>(a, lda, b, ldb, depth, ahead, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      C* to = sums + r * ld + n * kLanes<C>;
      store(to, load(to) + acc[r][n]);
    }
}

// One vector of columns takes fewer rows than registers: it loads as much as it multiplies. Beside 16 registers that is
// a quarter slower, and two vectors serve in its place.
template <class C, int M>
static constexpr ProductKernel<C> product_kernel() {
  constexpr int N = M == 1 && kFewRows ? 2 : M, R = N == 1 ? kTileRows * 4 / 3 : kRows<N>;
  return {R, N * kLanes<C>, product<C, R, N>};
}

// du = dy activation'(y), its sums over the rows added to sum[cols].
template <class C, Activation A>
static void mask(const MaskBlock<C>& block) {
  const MaskBlock<C> b = block;
  constexpr bool kMore = true;  // whether or not d_residual is asked for: the sums' bits do not depend on that
  for_rows_of_arrays(b.rows, kMore, [&](int64_t first, int64_t end) {
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      Vector<C> sum{};
      for (int64_t r = first; r < end; ++r) {
        fetch_ahead<C, C>(b.dy, r, b.ld_dy, c);
        Vector<C> du = read(b.dy + r * b.ld_dy + c);
        if constexpr (A != Activation::kNone) {
          fetch_ahead<C, C>(b.y, r, b.ld_y, c);
          du *= derivative_of_output<A, C>(read(b.y + r * b.ld_y + c));
        }
        write(b.du + r * b.ld_du + c, du);
        if (b.d_residual) write(b.d_residual + r * b.ld_d_residual + c, du);
        sum += du;
      }
      write(b.sum + c, read(b.sum + c) + sum);
    });
  });
}
