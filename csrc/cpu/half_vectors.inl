// Vectors of 16-bit numbers in memory; the pointer only tells the type.

#if defined(__AVX512F__)
FCB_INLINE __m512 widen(__m256i v, const Half*) { return _mm512_cvtph_ps(v); }
FCB_INLINE __m512 widen(__m256i v, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
// The upper halves of numbers, rounded as to_bfloat16() does; the lower ones are of no meaning. Of a NaN the upper half
// is cut: it has come of arithmetic, or of 16 bits, so that this is a NaN.
FCB_INLINE __m512i rounded_bits(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits, half);
}

FCB_INLINE __m256i narrow(__m512 v, const Half*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
FCB_INLINE __m256i narrow(__m512 v, const BFloat16*) {
#if defined(__AVX512BF16__)  // subnormals become 0
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(v), 16));
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
#elif defined(__AVX2__)
FCB_INLINE __m256 widen(__m128i v, const Half*) { return _mm256_cvtph_ps(v); }
FCB_INLINE __m256 widen(__m128i v, const BFloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
// The upper halves of numbers, rounded as to_bfloat16() does, below zeros. Of a NaN the upper half is cut: it has come
// of arithmetic, or of 16 bits, so that this is a NaN.
FCB_INLINE __m256i rounded_bits(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}
FCB_INLINE __m128i narrow(__m256 v, const Half*) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
FCB_INLINE __m128i narrow(__m256 v, const BFloat16*) {
  const __m256i bits = rounded_bits(v);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
FCB_INLINE __m256i narrow(__m256 low, __m256 high, const BFloat16*) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bits(low), rounded_bits(high)), 0xd8);
}

template <class N>
FCB_INLINE N number_at(const void* from) {
  N n;
  __builtin_memcpy(&n, from, sizeof n);
  return n;
}

// The first `count` halves, 0 < count < 8, and zeros: by two overlapping numbers, as nothing beyond is to be touched.
FCB_INLINE __m128i load_halves(const void* memory, int64_t count) {
  const uint16_t* const from = static_cast<const uint16_t*>(memory);
  if (count < 4) {
    uint64_t low = from[count - 1];
    low = count == 1 ? low : low << (16 * (count - 1)) | number_at<uint32_t>(from);
    return _mm_cvtsi64_si128(static_cast<int64_t>(low));
  }
  const uint64_t last = number_at<uint64_t>(from + count - 4);
  return _mm_set_epi64x(static_cast<int64_t>(count == 4 ? 0 : last >> (16 * (8 - count))), number_at<int64_t>(from));
}
FCB_INLINE void store_halves(void* memory, __m128i v, int64_t count) {
  uint16_t* const to = static_cast<uint16_t*>(memory);
  alignas(16) uint16_t all[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), v);
  if (count < 4) {
    if (count > 1) __builtin_memcpy(to, all, 4);
    to[count - 1] = all[count - 1];
    return;
  }
  __builtin_memcpy(to, all, 8);
  __builtin_memcpy(to + count - 4, all + count - 4, 8);
}

template <class T>
FCB_INLINE Vector<float> load_16_bit(const T* from) {
  return (Vector<float>)widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), from);
}
template <class T>
FCB_INLINE void store_16_bit(T* to, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow((__m256)v, to));
}
template <class T>
FCB_INLINE void stream_16_bit(T* to, Vector<float> v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), narrow((__m256)v, to));
}
FCB_INLINE Vector<float> load(const Half* from) { return load_16_bit(from); }
FCB_INLINE Vector<float> load(const BFloat16* from) { return load_16_bit(from); }
FCB_INLINE Vector<float> load_part(const Half* from, int64_t n) {
  return (Vector<float>)widen(load_halves(from, n), from);
}
FCB_INLINE Vector<float> load_part(const BFloat16* from, int64_t n) {
  return (Vector<float>)widen(load_halves(from, n), from);
}
FCB_INLINE void store(Half* to, Vector<float> v) { store_16_bit(to, v); }
FCB_INLINE void store(BFloat16* to, Vector<float> v) { store_16_bit(to, v); }
FCB_INLINE void store_part(Half* to, Vector<float> v, int64_t n) { store_halves(to, narrow((__m256)v, to), n); }
FCB_INLINE void store_part(BFloat16* to, Vector<float> v, int64_t n) { store_halves(to, narrow((__m256)v, to), n); }
FCB_INLINE void stream(Half* to, Vector<float> v) { stream_16_bit(to, v); }
FCB_INLINE void stream(BFloat16* to, Vector<float> v) { stream_16_bit(to, v); }
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
#elif defined(__AVX2__)
  store_halves(to, (__m128i)halves, n);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = halves[i];
#endif
}
