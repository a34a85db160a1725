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

// acc += R rows of the product by two vectors of its columns.
template <class C, int R>
FCB_INLINE void product_sums(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, Ahead<C>* ahead,
                             Vector<C> (&acc)[R][2]) {
  const int64_t step = ahead ? ahead->steps : depth;
  for (int64_t k = 0; k < depth;) {
    if (ahead) fetch(ahead);
    for (const int64_t end = k + step < depth ? k + step : depth; k < end; ++k, a += lda, b += ldb) {
      const Vector<C> b0 = load(b), b1 = load(b + kLanes<C>);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vector<C> x = broadcast(a[r]);
        acc[r][0] += x * b0;
        acc[r][1] += x * b1;
      }
    }
  }
}

template <class C, int R>
FCB_INLINE void product_tile(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, C* sums, int64_t ld,
                             Ahead<C>* ahead) {
  Vector<C> acc[R][2] = {};
  product_sums<C, R>(a, lda, b, ldb, depth, ahead, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) {
      C* to = sums + r * ld + v * kLanes<C>;
      store(to, load(to) + acc[r][v]);
    }
}

// sums[outer_rows][panel] += a' b, of `depth` rows of a and b.
template <class C>
static void product(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, C* sums, int64_t ld,
                    Ahead<C>* ahead) {
  product_tile<C, kTileRows>(a, lda, b, ldb, depth, sums, ld, ahead);
}

// du = dy activation'(y), its sums over the rows added to sum[cols].
template <class C, Activation A>
static void mask(const MaskBlock<C>& b) {
  for (int64_t r = 0; r < b.rows; ++r)
    for_vectors<C>(b.cols, [&](auto read, auto write, int64_t c) {
      Vector<C> du = read(b.dy + r * b.ld_dy + c);
      if constexpr (A != Activation::kNone) du *= derivative_of_output<A, C>(read(b.y + r * b.ld_y + c));
      write(b.du + r * b.ld_du + c, du);
      if (b.d_residual) write(b.d_residual + r * b.ld_d_residual + c, du);
      if (b.sum) write(b.sum + c, read(b.sum + c) + du);
    });
}
