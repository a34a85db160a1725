// Elementwise work on 16-bit numbers where they lie: loaded, converted, computed, converted, stored. Forward's 32
// channels (a cache line) at a time.

#if defined(__AVX512F__)
// 32 channels as two vectors, of which the last may be missing in part.
struct Lanes {
  __mmask16 half[2];
  __mmask32 all() const { return half[0] | static_cast<__mmask32>(half[1]) << 16; }
};
FCB_INLINE Lanes lanes_of(int64_t count) {
  const uint32_t all = count >= 32 ? ~0u : (1u << count) - 1;
  return {{static_cast<__mmask16>(all), static_cast<__mmask16>(all >> 16)}};
}

template <class T>
FCB_INLINE void store_32(T* to, __m512i both, const Lanes& lanes, bool stream) {
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  else
    _mm512_mask_storeu_epi16(to, lanes.all(), both);
}

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
  for (int64_t c = 0; c < cols; c += 32) {
    const Lanes lanes = lanes_of(cols - c);
    for (int64_t r = 0; r < rows; ++r) {
      float* from = block + r * ld + c;
      T* to = row<T>(memory, r, ld_memory) + c;
      const __m512i both = narrow(load_lanes(from, lanes.half[0]), load_lanes(from + 16, lanes.half[1]), to);
      store_32(to, both, lanes, stream);
      store_lanes(from, widen(_mm512_castsi512_si256(both), to), lanes.half[0]);
      store_lanes(from + 16, widen(_mm512_extracti64x4_epi64(both, 1), to), lanes.half[1]);
    }
  }
  if (stream) end_streaming();
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
