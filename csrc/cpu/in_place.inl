// Elementwise work on 16-bit numbers where they lie: loaded, converted, computed, converted, stored. Forward's a cache
// line of 32 channels at a time, or two: streaming stores are twice as fast where two adjacent lines follow each other.

#if defined(__AVX512F__)
// 32 * Lines channels from c on, of rows [first, end). Z: of z, T: of memory.
template <Activation A, class Z, class T, int Lines>
FCB_INLINE void affine_columns(const AffineBlock<float>& b, int64_t c, int64_t first, int64_t end) {
  using V = Vector<float>;
  constexpr int kVectors = 2 * Lines;
  __mmask16 lanes[kVectors];
  V mean[kVectors], scale[kVectors], beta[kVectors], y[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = c + 16 * v;
    lanes[v] = lanes_of(b.cols - at).half[0];
    mean[v] = (V)load_lanes(b.mean + at, lanes[v]);
    scale[v] = (V)load_lanes(b.scale + at, lanes[v]);
    beta[v] = (V)load_lanes(b.beta + at, lanes[v]);
  }
  for (int64_t r = first; r < end; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + 16 * v;
      if (v % 2 == 0) {
        if constexpr (!__is_same(Z, float)) fetch_ahead<float, Z>(b.z, r, b.ld_z, at);
        if (b.residual) fetch_ahead<float, T>(b.residual, r, b.ld_residual, at);
      }
      V u = ((V)load_lanes(row<Z>(b.z, r, b.ld_z) + at, lanes[v]) - mean[v]) * scale[v] + beta[v];
      if (b.residual) u += (V)load_lanes(row<T>(b.residual, r, b.ld_residual) + at, lanes[v]);
      y[v] = activate<A, float>(u);
    }
#pragma GCC unroll 2
    for (int l = 0; l < Lines; ++l) {
      T* to = row<T>(b.y, r, b.ld_y) + c + 32 * l;
      store_32(to, narrow((__m512)y[2 * l], (__m512)y[2 * l + 1], to), {{lanes[2 * l], lanes[2 * l + 1]}}, b.stream);
    }
  }
}

// A narrow block column by column, a wide one in the order of its memory.
template <Activation A, class Z, class T>
static void affine_in_place(const AffineBlock<float>& b) {
  const int64_t step = b.cols <= 64 ? b.rows : 1;
  for (int64_t r = 0; r < b.rows; r += step) {
    int64_t c = 0;
    for (; c + 32 < b.cols; c += 64) affine_columns<A, Z, T, 2>(b, c, r, r + step);
    if (c < b.cols) affine_columns<A, Z, T, 1>(b, c, r, r + step);
  }
  if constexpr (!__is_same(Z, float))
    if (b.stream) end_streaming();
}

#include "tile_lines.inl"

template <class T>
static void emit_sums_in_place(const AffineBlock<float>& b) {
  for (int64_t r = 0; r < b.rows; ++r)
    for (int64_t c = 0; c < b.cols; c += 32) {
      const Lanes lanes = lanes_of(b.cols - c);
      const float* from = row<float>(b.z, r, b.ld_z) + c;
      T* to = row<T>(b.y, r, b.ld_y) + c;
      store_32(to, narrow(load_lanes(from, lanes.half[0]), load_lanes(from + 16, lanes.half[1]), to), lanes, b.stream);
    }
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
    k->affine_of_tile[A] = affine_of_tile<static_cast<Activation>(A), T>;
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
    k.emit_sums = emit_sums_in_place<T>;
    fill_gradients<0, C, T, C>(&k.reduce, &k.apply);
    k.round = round_block<T>;
    k.depthwise = depthwise3<C, T>;
    k.depthwise_outer = depthwise3_outer<C, T>;
  }
#endif
  return k;
}
