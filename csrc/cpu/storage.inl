// Blocks of the compute type from and to memory of a data type.

FCB_INLINE float to_compute(float x) { return x; }
FCB_INLINE double to_compute(double x) { return x; }
FCB_INLINE float to_compute(Half x) { return to_float(x); }
FCB_INLINE float to_compute(BFloat16 x) { return to_float(x); }
FCB_INLINE void to_storage(float x, float* to) { *to = x; }
FCB_INLINE void to_storage(double x, double* to) { *to = x; }
FCB_INLINE void to_storage(float x, Half* to) { *to = to_half(x); }
FCB_INLINE void to_storage(float x, BFloat16* to) { *to = to_bfloat16(x); }

#if defined(__AVX2__)
template <class T>
constexpr bool kLoadsVectors = true;
#else
template <class T>
constexpr bool kLoadsVectors = !__is_same(T, Half);
#endif

template <class T>
constexpr bool kIsSmall = __is_same(T, Half) || __is_same(T, BFloat16);

// Asks for what lies `ahead` elements behind the results: their stores would wait for it, one for the other.
template <class C, class T>
FCB_INLINE void row_to_compute(const T* from, int64_t count, C* to, [[maybe_unused]] int64_t ahead) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (kIsSmall<T>) {
#pragma GCC unroll 4
    for (; i + 16 <= count; i += 16) {
      __builtin_prefetch(to + ahead + i, 1);
      _mm512_storeu_ps(to + i, widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)), from));
    }
    if (i == count) return;
    return store_lanes(to + i, load_lanes(from + i, first_lanes(count - i)), first_lanes(count - i));
  }
#elif defined(__AVX2__)
  if constexpr (kIsSmall<T>) {
    for (; i + 8 <= count; i += 8) {
      __builtin_prefetch(to + ahead + i, 1);
      store(to + i, load(from + i));
    }
    if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
    return;
  }
#endif
  for (; i < count; ++i) to[i] = to_compute(from[i]);
}

// A store waits for its line, and stores wait for each other: so the lines of a row are asked for this many rows ahead.
constexpr int64_t kFetchRows = 16;

#if defined(__AVX512F__)
// 32 numbers as a cache line.
template <class T>
FCB_INLINE __m512i narrow(__m512 low, __m512 high, const T* type) {
  if constexpr (__is_same(T, BFloat16)) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i pairs =
        _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded_bits(low), 16), rounded_bits(high));
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), pairs);
#endif
  }
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

// N vectors of consecutive numbers.
template <class C, int N, class T>
FCB_INLINE void store_vectors(T* to, const Vector<C> (&v)[N]) {
  constexpr int kPairs = __is_same(T, BFloat16) ? N / 2 : 0;  // which cost less than their halves
#pragma GCC unroll 4
  for (int n = 0; n < 2 * kPairs; n += 2)
    if constexpr (kPairs > 0) _mm512_storeu_si512(to + n * 16, narrow((__m512)v[n], (__m512)v[n + 1], to));
#pragma GCC unroll 4
  for (int n = 2 * kPairs; n < N; ++n) store(to + n * kLanes<C>, v[n]);
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
        if (!stream) __builtin_prefetch(to + kFetchRows * ld_memory, 1);
        const __m512i both = narrow(load_lanes(from, lanes.half[0]), load_lanes(from + 16, lanes.half[1]), to);
        store_32(to, both, lanes, stream);
        kept(from, _mm512_castsi512_si256(both), lanes.half[0]);
        kept(from + 16, _mm512_extracti64x4_epi64(both, 1), lanes.half[1]);
      }
  if (stream) end_streaming();
}
#endif

#if !defined(__AVX512F__)
template <class C, int N, class T>
FCB_INLINE void store_vectors(T* to, const Vector<C> (&v)[N]) {
#if defined(__AVX2__)
  if constexpr (N == 2 && __is_same(T, BFloat16))  // a pair costs less than its halves
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow((__m256)v[0], (__m256)v[1], to));
#endif
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(to + n * kLanes<C>, v[n]);
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
template <class C, class T>
constexpr bool kStreamsRows = true;
#else
template <class C, class T>
constexpr bool kStreamsRows = __is_same(T, C);  // others are not streamed, or by lines
#endif

// A whole aligned row past the caches.
template <class C, class T>
FCB_INLINE void stream_row(const C* from, int64_t count, T* to) {
  if constexpr (kStreamsRows<C, T>)
    for (int64_t i = 0; i < count; i += kLanes<C>) stream(to + i, load(from + i));
}

template <class C, class T>
FCB_INLINE void row_to_storage(const C* from, int64_t count, T* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (__is_same(T, Half))
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#elif defined(__AVX2__)
  if constexpr (kIsSmall<T>) {
    for (; i + 8 <= count; i += 8) store(to + i, load(from + i));
    if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
    return;
  }
#endif
  if constexpr (__is_same(T, C))
    for (; i + kLanes<C> <= count; i += kLanes<C>) store(to + i, load(from + i));
  for (; i < count; ++i) to_storage(from[i], to + i);
}

template <class T>
FCB_INLINE void fetch_row(const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 1);
}

template <class C, class T>
FCB_INLINE void load_square(const T* from, int64_t stride, C* to, int64_t ld) {
  constexpr int64_t L = kLanes<C>;
  if constexpr (kLoadsVectors<T>) {
    C columns[L * L];
    for (int64_t c = 0; c < L; ++c) store(columns + c * L, load(from + c * stride));
    transpose_square(columns, L, to, ld);
  }
}

// The columns at from + c * stride: in squares, each of which is a part of few streams of memory.
template <class C, class T>
FCB_INLINE void load_columns(const T* from, int64_t stride, int64_t rows, int64_t cols, C* block, int64_t ld) {
  constexpr int64_t L = kLanes<C>;
  const int64_t whole_rows = rows / L * L, whole_cols = cols / L * L;
  for (int64_t c = 0; c < cols; c += L)
    for (int64_t r = 0; r < rows; r += L) {
      const T* const square = from + c * stride + r;
      C* const to = block + r * ld + c;
      if (c < whole_cols && r < whole_rows)
        load_square(square, stride, to, ld);
      else
        for (int64_t i = c; i < c + L && i < cols; ++i)
          for (int64_t k = r; k < r + L && k < rows; ++k)
            to[(k - r) * ld + i - c] = to_compute(square[(i - c) * stride + k - r]);
    }
}

constexpr int64_t kFetchElements = 512;  // ahead of a store, where rows follow each other

// Whole rows where channels are consecutive, whole columns where pixels are, single elements elsewhere.
template <class C, class T>
static void load_block(const void* memory, int64_t pixel_stride, int64_t channel_stride, int64_t rows, int64_t cols,
                       C* block, int64_t ld) {
  const T* from = static_cast<const T*>(memory);
  if (channel_stride == 1) {
    if (pixel_stride == cols && ld == cols) return row_to_compute(from, rows * cols, block, kFetchElements);
    for (int64_t r = 0; r < rows; ++r) row_to_compute(from + r * pixel_stride, cols, block + r * ld, ld);
    return;
  }
  if (kLoadsVectors<T> && pixel_stride == 1) return load_columns(from, channel_stride, rows, cols, block, ld);
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {  // 16 pixels by `cols` channels: the block's lines stay in L1
    const int64_t r1 = r0 + 16 < rows ? r0 + 16 : rows;
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = r0; r < r1; ++r) block[r * ld + c] = to_compute(from[r * pixel_stride + c * channel_stride]);
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The other way, from whole squares.
template <class C, class T>
FCB_INLINE void store_columns(const C* block, int64_t ld, int64_t rows, int64_t cols, T* to, int64_t stride) {
  constexpr int64_t L = kLanes<C>;
  const int64_t whole_rows = rows / L * L, whole_cols = cols / L * L;
  for (int64_t c = 0; c < cols; c += L)
    for (int64_t r = 0; r < rows; r += L) {
      const C* const square = block + r * ld + c;
      T* const at = to + c * stride + r;
      if (c < whole_cols && r < whole_rows) {
        C columns[L * L];
        transpose_square(square, ld, columns, L);
        for (int64_t i = 0; i < L; ++i) store(at + i * stride, load(columns + i * L));
      } else {
        for (int64_t i = 0; c + i < cols && i < L; ++i)
          for (int64_t k = 0; r + k < rows && k < L; ++k) to_storage(square[k * ld + i], at + i * stride + k);
      }
    }
}
#endif

template <class C, class T>
static void load_rows(const void* const* from, int64_t offset, int64_t rows, int64_t cols, C* to, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) row_to_compute(static_cast<const T*>(from[r]) + offset, cols, to + r * ld, ld);
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
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (pixel_stride == 1) return store_columns(block, ld, rows, cols, to, channel_stride);
#endif
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    const int64_t r1 = r0 + 16 < rows ? r0 + 16 : rows;
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = r0; r < r1; ++r) to_storage(block[r * ld + c], to + r * pixel_stride + c * channel_stride);
  }
}
