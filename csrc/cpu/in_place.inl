// Elementwise work on 16-bit numbers where they lie: loaded, converted, computed, converted, stored. Forward's a cache
// line of 32 channels at a time, or two: streaming stores are twice as fast where two adjacent lines follow each other.

#if defined(__AVX512F__)
// Up to 32 channels from c on, of rows [first, end). Z: of z, T: of memory.
template <Activation A, class Z, class T>
FCB_INLINE void affine_columns(const AffineBlock<float>& b, int64_t c, int64_t first, int64_t end) {
  using V = Vector<float>;
  const Lanes lanes = lanes_of(b.cols - c);
  V mean[2], scale[2], beta[2], y[2];
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const int64_t at = c + 16 * v;
    mean[v] = (V)load_lanes(b.mean + at, lanes.half[v]);
    scale[v] = (V)load_lanes(b.scale + at, lanes.half[v]);
    beta[v] = (V)load_lanes(b.beta + at, lanes.half[v]);
  }
  for (int64_t r = first; r < end; ++r) {
    if constexpr (!__is_same(Z, float)) fetch_ahead<float, Z>(b.z, r, b.ld_z, c);
    if (b.residual) fetch_ahead<float, T>(b.residual, r, b.ld_residual, c);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int64_t at = c + 16 * v;
      V u = ((V)load_lanes(row<Z>(b.z, r, b.ld_z) + at, lanes.half[v]) - mean[v]) * scale[v] + beta[v];
      if (b.residual) u += (V)load_lanes(row<T>(b.residual, r, b.ld_residual) + at, lanes.half[v]);
      y[v] = activate<A, float>(u);
    }
    T* to = row<T>(b.y, r, b.ld_y) + c;
    store_32(to, narrow((__m512)y[0], (__m512)y[1], to), lanes, b.stream);
  }
}

#include "tile_lines.inl"

// All channels of rows [first, end).
template <Activation A, class Z, class T>
FCB_INLINE void affine_rows(const AffineBlock<float>& b, int64_t first, int64_t end) {
  int64_t c = 0;
  for (; c + 64 <= b.cols; c += 64) affine_lines<A, Z, T, 2>(b, c, first, end);
  if (c + 32 <= b.cols) affine_lines<A, Z, T, 1>(b, c, first, end), c += 32;
  if (c < b.cols) affine_columns<A, Z, T>(b, c, first, end);
}

template <Activation A, class T>
static void affine_of_tile(const AffineBlock<float>& b) {
  affine_rows<A, float, T>(b, 0, b.rows);
}

constexpr int64_t kRowsAtOnce = 4;

// A narrow block column by column, of a wide one few rows at once, for that is nearly the order of its memory.
template <Activation A, class T>
static void affine_in_place(const AffineBlock<float>& b) {
  const int64_t step = b.cols <= 64 ? b.rows : kRowsAtOnce;
  for (int64_t r = 0; r < b.rows; r += step) affine_rows<A, T, T>(b, r, r + step < b.rows ? r + step : b.rows);
  if (b.stream) end_streaming();
}

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

#elif defined(__AVX2__)
// The kernels of elementwise.inl, of other types.
template <Activation A, class Z, class T, bool InCache>
FCB_INLINE void affine_narrow(const AffineBlock<float>& b) {
  b.stream ? affine_block<float, A, true, InCache, false, Z, T>(b)
           : affine_block<float, A, false, InCache, false, Z, T>(b);
}

template <Activation A, class T>
static void affine_of_tile(const AffineBlock<float>& b) {
  affine_narrow<A, float, T, true>(b);
}

template <Activation A, class T>
static void affine_in_place(const AffineBlock<float>& b) {
  affine_narrow<A, T, T, false>(b);
  if (b.stream) end_streaming();
}

template <class T>
static void emit_sums_in_place(const AffineBlock<float>& b) {
  for (int64_t r = 0; r < b.rows; ++r)
    for_vectors<float>(b.cols, [&](auto read, auto write, int64_t c) {
      const Vector<float> z = read(row<float>(b.z, r, b.ld_z) + c);
      T* const y = row<T>(b.y, r, b.ld_y) + c;
      b.stream ? stream(y, z) : write(y, z);
    });
}

template <class T>
static void round_block(float* block, int64_t ld, int64_t rows, int64_t cols, void* memory, int64_t ld_memory,
                        bool streams) {
  for (int64_t r = 0; r < rows; ++r)
    for_vectors<float>(cols, [&](auto read, auto write, int64_t c) {
      float* const from = block + r * ld + c;
      T* const to = row<T>(memory, r, ld_memory) + c;
      if (!streams) __builtin_prefetch(to + kFetchRows * ld_memory, 1);
      const __m128i stored = narrow((__m256)read(from), to);
      const Vector<float> left = (Vector<float>)widen(stored, to);
      streams ? stream(to, left) : write(to, left);
      write(from, left);
    });
  if (streams) end_streaming();
}
#endif

#if defined(__AVX2__)
template <int A, class T>
static constexpr void fill_affine(InPlaceKernels<float>* k) {
  if constexpr (A < kActivationCount) {
    k->affine[A] = affine_in_place<static_cast<Activation>(A), T>;
    k->affine_of_tile[A] = affine_of_tile<static_cast<Activation>(A), T>;
    fill_affine<A + 1, T>(k);
  }
}
#endif

template <class C, class T>
static constexpr InPlaceKernels<C> in_place_kernels() {
  InPlaceKernels<C> k{};
#if defined(__AVX2__)
  if constexpr (kIsSmall<T>) {
    fill_affine<0, T>(&k);
    k.emit_sums = emit_sums_in_place<T>;
    fill_gradients<0, C, T, C>(&k.reduce, &k.apply);
    k.round = round_block<T>;
    k.depthwise = depthwise3<C, T>;
    if constexpr (kFewRows) k.depthwise_clamped = depthwise3_clamped<C, T>;
    k.depthwise_outer = depthwise3_outer<C, T>;
  }
#endif
  return k;
}
