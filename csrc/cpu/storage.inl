// Blocks of the compute type from and to memory of a data type.

FCB_INLINE float to_compute(float x) { return x; }
FCB_INLINE double to_compute(double x) { return x; }
FCB_INLINE float to_compute(Half x) { return to_float(x); }
FCB_INLINE float to_compute(BFloat16 x) { return to_float(x); }
FCB_INLINE void to_storage(float x, float* to) { *to = x; }
FCB_INLINE void to_storage(double x, double* to) { *to = x; }
FCB_INLINE void to_storage(float x, Half* to) { *to = to_half(x); }
FCB_INLINE void to_storage(float x, BFloat16* to) { *to = to_bfloat16(x); }

// Vectors of 16-bit types; the pointer only tells the type.
#if defined(__AVX512F__)
FCB_INLINE __m512 widen(__m256i v, const Half*) { return _mm512_cvtph_ps(v); }
FCB_INLINE __m512 widen(__m256i v, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
FCB_INLINE __m256i narrow(__m512 v, const Half*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
FCB_INLINE __m256i narrow(__m512 v, const BFloat16*) {
#if defined(__AVX512BF16__)  // subnormals become 0
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16), one = _mm512_set1_epi32(1);
  const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, one));
  __m512i result = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  result = _mm512_mask_or_epi32(result, nan, high, _mm512_set1_epi32(0x40));  // as to_bfloat16()
  return _mm512_cvtepi32_epi16(result);
#endif
}

// The first `count` lanes.
FCB_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// The lanes that the mask leaves out are 0, and their memory is not touched.
FCB_INLINE __m512 load_lanes(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
template <class T>
FCB_INLINE __m512 load_lanes(const T* from, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, from), from);
}
FCB_INLINE void store_lanes(float* to, __m512 v, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, v); }
template <class T>
FCB_INLINE void store_lanes(T* to, __m512 v, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, narrow(v, to));
}

// As load(), store() and their parts, of vectors of float.
template <class T>
FCB_INLINE Vector<float> load_16_bit(const T* from, __mmask16 lanes) {
  return (Vector<float>)load_lanes(from, lanes);
}
FCB_INLINE Vector<float> load(const Half* from) { return load_16_bit(from, 0xffff); }
FCB_INLINE Vector<float> load(const BFloat16* from) { return load_16_bit(from, 0xffff); }
FCB_INLINE Vector<float> load_part(const Half* from, int64_t n) { return load_16_bit(from, first_lanes(n)); }
FCB_INLINE Vector<float> load_part(const BFloat16* from, int64_t n) { return load_16_bit(from, first_lanes(n)); }
FCB_INLINE void store(Half* to, Vector<float> v) { store_lanes(to, (__m512)v, 0xffff); }
FCB_INLINE void store(BFloat16* to, Vector<float> v) { store_lanes(to, (__m512)v, 0xffff); }
FCB_INLINE void store_part(Half* to, Vector<float> v, int64_t n) { store_lanes(to, (__m512)v, first_lanes(n)); }
FCB_INLINE void store_part(BFloat16* to, Vector<float> v, int64_t n) { store_lanes(to, (__m512)v, first_lanes(n)); }
#else
FCB_INLINE Vector<float> widen(Simd<float>::Halves v) {
  return (Vector<float>)(__builtin_convertvector(v, Simd<float>::Bits) << 16);
}
FCB_INLINE Vector<float> load(const BFloat16* from) {
  Simd<float>::Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return widen(v);
}
FCB_INLINE Vector<float> load_part(const BFloat16* from, int64_t n) {
  Simd<float>::Halves v{};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i].bits;
  return widen(v);
}
#endif

// The upper halves of numbers: what of a bfloat16 there is.
FCB_INLINE Simd<float>::Halves upper_halves(Vector<float> v) {
  return __builtin_convertvector((Simd<float>::Bits)v >> 16, Simd<float>::Halves);
}
FCB_INLINE void store(uint16_t* to, Vector<float> v) {
  const auto halves = upper_halves(v);
  __builtin_memcpy(to, &halves, sizeof halves);
}
FCB_INLINE void store_part(uint16_t* to, Vector<float> v, int64_t n) {
  const auto halves = upper_halves(v);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, first_lanes(n), (__m256i)halves);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = halves[i];
#endif
}

template <class T>
constexpr bool kIsSmall = __is_same(T, Half) || __is_same(T, BFloat16);

template <class C, class T>
FCB_INLINE void row_to_compute(const T* from, int64_t count, C* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (kIsSmall<T>) {
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, load_lanes(from + i, 0xffff));
    if (i == count) return;
    return store_lanes(to + i, load_lanes(from + i, first_lanes(count - i)), first_lanes(count - i));
  }
#elif defined(__AVX2__)
  if constexpr (__is_same(T, Half))
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = to_compute(from[i]);
}

#if defined(__AVX512F__)
// 32 numbers as a cache line.
template <class T>
FCB_INLINE __m512i narrow(__m512 low, __m512 high, const T* type) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, BFloat16)) return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#endif
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low, type)), narrow(high, type), 1);
}

// 32 channels as two vectors, of which the last may be missing in part.
struct Lanes {
  __mmask16 half[2];
  __mmask32 all() const { return half[0] | static_cast<__mmask32>(half[1]) << 16; }
};
FCB_INLINE Lanes lanes_of(int64_t count) {
  const uint32_t all = count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
  return {{static_cast<__mmask16>(all), static_cast<__mmask16>(all >> 16)}};
}

template <class T>
FCB_INLINE void store_32(T* to, __m512i both, const Lanes& lanes, bool stream) {
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  else
    _mm512_mask_storeu_epi16(to, lanes.all(), both);
}

// Stores rows of channels two cache lines at a time, which suits streaming, and calls kept(from, 16 numbers as stored,
// which of them are).
template <class C, class T, class F>
FCB_INLINE void store_lines(C* block, int64_t ld, int64_t rows, int64_t cols, T* memory, int64_t ld_memory, bool stream,
                            F kept) {
  for (int64_t two = 0; two < cols; two += 64)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = two; c < two + 64 && c < cols; c += 32) {
        const Lanes lanes = lanes_of(cols - c);
        C* from = block + r * ld + c;
        T* to = memory + r * ld_memory + c;
        const __m512i both = narrow(load_lanes(from, lanes.half[0]), load_lanes(from + 16, lanes.half[1]), to);
        store_32(to, both, lanes, stream);
        kept(from, _mm512_castsi512_si256(both), lanes.half[0]);
        kept(from + 16, _mm512_extracti64x4_epi64(both, 1), lanes.half[1]);
      }
  if (stream) end_streaming();
}
#endif

// A whole aligned row past the caches; only memory of the compute type.
template <class C, class T>
FCB_INLINE void stream_row(const C* from, int64_t count, T* to) {
  if constexpr (__is_same(T, C))
    for (int64_t i = 0; i < count; i += kLanes<C>) stream(to + i, load(from + i));
}

template <class C, class T>
FCB_INLINE void row_to_storage(const C* from, int64_t count, T* to) {
  int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (__is_same(T, Half))
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  if constexpr (__is_same(T, C))
    for (; i + kLanes<C> <= count; i += kLanes<C>) store(to + i, load(from + i));
  for (; i < count; ++i) to_storage(from[i], to + i);
}

// A store waits for its line, and stores wait for each other: so the lines of a row are asked for this many rows ahead.
constexpr int64_t kFetchRows = 16;

template <class T>
FCB_INLINE void fetch_row(const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 1);
}

// Whole rows where channels are consecutive, whole columns where pixels are, single elements elsewhere.
template <class C, class T>
static void load_block(const void* memory, int64_t pixel_stride, int64_t channel_stride, int64_t rows, int64_t cols,
                       C* block, int64_t ld) {
  const T* from = static_cast<const T*>(memory);
  if (channel_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) row_to_compute(from + r * pixel_stride, cols, block + r * ld);
    return;
  }
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {  // 16 pixels by `cols` channels: the block's lines stay in L1
    const int64_t r1 = r0 + 16 < rows ? r0 + 16 : rows;
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = r0; r < r1; ++r) block[r * ld + c] = to_compute(from[r * pixel_stride + c * channel_stride]);
  }
}

template <class C, class T>
static void store_block(const C* block, int64_t ld, int64_t rows, int64_t cols, void* memory, int64_t pixel_stride,
                        int64_t channel_stride, bool streaming) {
  T* to = static_cast<T*>(memory);
#if defined(__AVX512F__)
  if constexpr (kIsSmall<T>)
    if (channel_stride == 1)
      return store_lines(block, ld, rows, cols, to, pixel_stride, streaming, [](const C*, __m256i, __mmask16) {});
#endif
  if (streaming) {
    for (int64_t r = 0; r < rows; ++r) stream_row(block + r * ld, cols, to + r * pixel_stride);
    return end_streaming();
  }
  if (channel_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      fetch_row(to + (r + kFetchRows) * pixel_stride, cols);
      row_to_storage(block + r * ld, cols, to + r * pixel_stride);
    }
    return;
  }
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    const int64_t r1 = r0 + 16 < rows ? r0 + 16 : rows;
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = r0; r < r1; ++r) to_storage(block[r * ld + c], to + r * pixel_stride + c * channel_stride);
  }
}
