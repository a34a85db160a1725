// Elementwise work on 16-bit numbers where they lie: loaded, converted, computed, converted, stored. Forward's 32
// channels (a cache line) at a time.

#if defined(__AVX512F__)
// Channels [c, c + 32) of rows [first, end). Z: of z, T: of memory.
template <Activation A, class Z, class T>
FCB_INLINE void affine_columns(const AffineBlock<float>& b, int64_t c, int64_t first, int64_t end) {
  using V = Vector<float>;
  const Lanes lanes = lanes_of(b.cols - c);
  V mean[2], scale[2], beta[2], y[2];
  for (int h = 0; h < 2; ++h) {
    mean[h] = (V)load_lanes(b.mean + c + 16 * h, lanes.half[h]);
    scale[h] = (V)load_lanes(b.scale + c + 16 * h, lanes.half[h]);
    beta[h] = (V)load_lanes(b.beta + c + 16 * h, lanes.half[h]);
  }
  for (int64_t r = first; r < end; ++r) {
    fetch_ahead<float, Z>(b.z, r, b.ld_z, c);
    if (b.residual) fetch_ahead<float, T>(b.residual, r, b.ld_residual, c);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = c + 16 * h;
      V u = ((V)load_lanes(row<Z>(b.z, r, b.ld_z) + at, lanes.half[h]) - mean[h]) * scale[h] + beta[h];
      if (b.residual) u += (V)load_lanes(row<T>(b.residual, r, b.ld_residual) + at, lanes.half[h]);
      y[h] = activate<A, float>(u);
    }
    T* to = row<T>(b.y, r, b.ld_y) + c;
    store_32(to, narrow((__m512)y[0], (__m512)y[1], to), lanes, b.stream);
  }
}

// A narrow block column by column, a wide one in the order of its memory.
template <Activation A, class Z, class T>
static void affine_in_place(const AffineBlock<float>& b) {
  const int64_t step = b.cols <= 64 ? b.rows : 1;
  for (int64_t r = 0; r < b.rows; r += step)
    for (int64_t c = 0; c < b.cols; c += 32) affine_columns<A, Z, T>(b, c, r, r + step);
  if (b.stream) end_streaming();
}

template <class T>
static void round_block(float* block, int64_t ld, int64_t rows, int64_t cols, void* memory, int64_t ld_memory,
                        bool stream) {
  store_lines(block, ld, rows, cols, static_cast<T*>(memory), ld_memory, stream,
              [](float* from, __m256i v, auto lanes) { store_lanes(from, widen(v, static_cast<T*>(nullptr)), lanes); });
}

template <int A, class T>
static constexpr void fill_affine(InPlaceKernels<float>* k) {
  if constexpr (A < kActivationCount) {
    k->affine[A] = affine_in_place<static_cast<Activation>(A), T, T>;
    k->affine_of_tile[A] = affine_in_place<static_cast<Activation>(A), float, T>;
    fill_affine<A + 1, T>(k);
  }
}
#endif

template <class C, class T>
static constexpr InPlaceKernels<C> in_place_kernels() {
  InPlaceKernels<C> k{};
#if defined(__AVX512F__)
  if constexpr (kIsSmall<T>) {
    fill_affine<0, T>(&k);
    fill_gradients<0, C, T, C>(&k.reduce, &k.apply);
    k.round = round_block<T>;
  }
#endif
  return k;
}
