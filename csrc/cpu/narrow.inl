// Vectors of float from and to 16-bit numbers on AVX2, which has neither masks nor a rounding to bfloat16. What is
// loaded whole is in storage.inl.
#if defined(__AVX2__) && !defined(__AVX512F__)
FCB_INLINE __m128i narrow(Vector<float> v, const Half*) {
  return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}

// The upper halves of numbers, rounded as to_bfloat16() does, as integers. Of a NaN the upper half is cut: it has come
// of arithmetic, or of 16 bits, so that this is a NaN.
FCB_INLINE __m256i rounded_halves(Vector<float> v) {
  const __m256i bits = _mm256_castps_si256((__m256)v),
                ordered = _mm256_castps_si256(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_ORD_Q));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_and_si256(_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)), ordered);
  return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
}
FCB_INLINE __m256i narrow_pair(Vector<float> low, Vector<float> high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_halves(low), rounded_halves(high)), 0xd8);
}
FCB_INLINE __m128i narrow(Vector<float> v, const BFloat16*) { return _mm256_castsi256_si128(narrow_pair(v, v)); }

FCB_INLINE void store(Half* to, Vector<float> v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(v, to)); }
FCB_INLINE void store(BFloat16* to, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(v, to));
}

template <class T>
FCB_INLINE void store_some(T* to, Vector<float> v, int64_t n) {
  T all[8];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) to[i] = all[i];
}
FCB_INLINE void store_part(Half* to, Vector<float> v, int64_t n) { store_some(to, v, n); }
FCB_INLINE void store_part(BFloat16* to, Vector<float> v, int64_t n) { store_some(to, v, n); }
FCB_INLINE Vector<float> load_part(const Half* from, int64_t n) {
  Half all[8] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = from[i];
  return load(all);
}

template <class C, int N>
FCB_INLINE void store_vectors(Half* to, const Vector<C> (&v)[N]) {
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) store(to + n * 8, v[n]);
}
template <class C, int N>
FCB_INLINE void store_vectors(BFloat16* to, const Vector<C> (&v)[N]) {
  if constexpr (N == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_pair(v[0], v[1]));
  else
    for (int n = 0; n < N; ++n) store(to + n * 8, v[n]);
}
#endif
