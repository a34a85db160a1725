// Vectors of the unit's width in the compiler's vector extension, and what it lacks: loads, exp, erf.
// Included by an ISA unit inside its own namespace, which defines FCB_VECTOR_BYTES.

template <class C>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(FCB_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(FCB_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FCB_VECTOR_BYTES)));
  typedef uint16_t Halves __attribute__((vector_size(FCB_VECTOR_BYTES / 2)));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(FCB_VECTOR_BYTES)));
};
template <class C>
using Vector = typename Simd<C>::Vector;

// Rows of a register tile of two vectors of columns. Few beside 16 registers (AVX2 and below): so are its sums, and
// what is not multiplication shows beside them.
constexpr int kTileRows = FCB_TILE_ROWS;
constexpr bool kFewRows = kTileRows < 12;

template <class C>
constexpr int64_t kLanes = FCB_VECTOR_BYTES / sizeof(C);

template <class C>
FCB_INLINE Vector<C> load(const C* from) {
  Vector<C> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class C>
FCB_INLINE void store(C* to, Vector<C> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// A store past the caches, of whole vectors to addresses aligned to them: it saves reading the lines first.
FCB_INLINE void stream(float* to, Vector<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(to, (__m256)v);
#else
  store(to, v);
#endif
}

FCB_INLINE void stream(double* to, Vector<double> v) { store(to, v); }

// The same of so many bytes, whole vectors of any type.
FCB_INLINE void stream_bytes(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += FCB_VECTOR_BYTES)
    stream(reinterpret_cast<float*>(static_cast<char*>(to) + i),
           load(reinterpret_cast<const float*>(static_cast<const char*>(from) + i)));
}

// Orders streamed stores before whatever tells other threads that they are done.
FCB_INLINE void end_streaming() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
FCB_INLINE __m256i mask_of(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` lanes, 0 < count < kLanes; the others are 0, and their memory is not touched.
FCB_INLINE Vector<float> load_part(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_maskload_ps(from, mask_of(count));
#else
  Vector<float> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
#endif
}

FCB_INLINE Vector<double> load_part(const double* from, int64_t count) {
  Vector<double> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <class C>
FCB_INLINE void store_part(C* to, Vector<C> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)v);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) return _mm256_maskstore_ps(to, mask_of(count), (__m256)v);
#endif
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

// x - 0 is x for every x, so the compiler broadcasts without an addition.
template <class C>
FCB_INLINE Vector<C> broadcast(C x) {
  return x - Vector<C>{};
}

// acc += x * y. Of AVX2's 16 registers a tile needs nearly all: left to itself, gcc 12 moves its sums around among them
// and spills some.
template <class V>
FCB_INLINE void add_product(V* acc, V x, V y) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof((*acc)[0]) == 4)
    asm("vfmadd231ps %2, %1, %0" : "+x"(*acc) : "x"(x), "x"(y));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(*acc) : "x"(x), "x"(y));
#else
  *acc += x * y;
#endif
}

#if defined(FCB_PAIRS)
// acc += the products of the pair x by the pairs v, of N vectors: all are bfloat16, two in the place of a float.
template <class C, int N>
FCB_INLINE void add_products(Vector<C> (&acc)[N], const C& x, const Vector<C> (&v)[N]) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const __m512bh pair = (__m512bh)_mm512_set1_epi32(bits);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) acc[n] = (Vector<C>)_mm512_dpbf16_ps((__m512)acc[n], pair, (__m512bh)v[n]);
}
#else
// acc += x * v, of N vectors.
template <class C, int N>
FCB_INLINE void add_products(Vector<C> (&acc)[N], const C& x, const Vector<C> (&v)[N]) {
  const Vector<C> broadcasted = broadcast(x);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) add_product(&acc[n], broadcasted, v[n]);
}
#endif

// Of two vectors in one piece, so that x takes a register for no longer than it must: gcc 12 keeps several rows' at a
// time and runs out of registers. Sanitizers see no loads of assembly.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
template <class C>
FCB_INLINE void add_products(Vector<C> (&acc)[2], const C& x, const Vector<C> (&v)[2]) {
  Vector<C> broadcasted;
  if constexpr (sizeof(C) == 4)
    asm("vbroadcastss %5, %2\n\tvfmadd231ps %3, %2, %0\n\tvfmadd231ps %4, %2, %1"
        : "+&x"(acc[0]), "+x"(acc[1]), "=&x"(broadcasted)
        : "x"(v[0]), "x"(v[1]), "m"(x));
  else
    asm("vbroadcastsd %5, %2\n\tvfmadd231pd %3, %2, %0\n\tvfmadd231pd %4, %2, %1"
        : "+&x"(acc[0]), "+x"(acc[1]), "=&x"(broadcasted)
        : "x"(v[0]), "x"(v[1]), "m"(x));
}
#endif

// a > b ? a : b and a < b ? a : b, in an instruction if there is one: b where either is NaN.
template <class V>
FCB_INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && sizeof(a[0]) == 4) return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}
template <class V>
FCB_INLINE V smaller(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4) return (V)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && sizeof(a[0]) == 4) return (V)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}

// to[c][r] = from[r][c] for kLanes rows and columns.
template <class C>
FCB_INLINE void transpose_square(const C* from, int64_t ld_from, C* to, int64_t ld_to) {
  for (int64_t r = 0; r < kLanes<C>; ++r)
    for (int64_t c = 0; c < kLanes<C>; ++c) to[c * ld_to + r] = from[r * ld_from + c];
}

#if defined(__AVX512F__)
// Interleaving row i with row i + 8, four times over, moves each element to its place.
FCB_INLINE void transpose_square(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  __m512 rows[16], next[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) rows[r] = _mm512_loadu_ps(from + r * ld_from);
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      next[2 * r] = _mm512_permutex2var_ps(rows[r], low, rows[r + 8]);
      next[2 * r + 1] = _mm512_permutex2var_ps(rows[r], high, rows[r + 8]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) rows[r] = next[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_storeu_ps(to + r * ld_to, rows[r]);
}
#elif defined(__AVX2__)
// As loads of halves bring rows r and r + 4 together, two interleavings of quarters are left.
FCB_INLINE void transpose_square(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256 rows[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const float* const row = from + r * ld_from + 4 * half;
      rows[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * ld_from), 1);
    }
    const __m256 low01 = _mm256_unpacklo_ps(rows[0], rows[1]), high01 = _mm256_unpackhi_ps(rows[0], rows[1]);
    const __m256 low23 = _mm256_unpacklo_ps(rows[2], rows[3]), high23 = _mm256_unpackhi_ps(rows[2], rows[3]);
    float* const out = to + 4 * half * ld_to;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(low01, low23, 0x44));
    _mm256_storeu_ps(out + ld_to, _mm256_shuffle_ps(low01, low23, 0xee));
    _mm256_storeu_ps(out + 2 * ld_to, _mm256_shuffle_ps(high01, high23, 0x44));
    _mm256_storeu_ps(out + 3 * ld_to, _mm256_shuffle_ps(high01, high23, 0xee));
  }
}
#endif

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2; exp(r) by its Taylor series to r^7 (error below 2^-25).
// 2^n in two factors, so that results down to the smallest denormal and up to infinity come out right.
FCB_INLINE Vector<float> exp_of(Vector<float> x) {
  using V = Vector<float>;
  using I = Simd<float>::Integers;
  x = x < -104.0f ? V{} - 104.0f : x;
  x = x > 89.0f ? V{} + 89.0f : x;
  const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (x * 1.44269504f + magic) - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I exponent = __builtin_convertvector(n, I), half = exponent >> 1;
  const I low = (half + 127) << 23, high = (exponent - half + 127) << 23;
  return p * (V)low * (V)high;
}

FCB_INLINE Vector<double> exp_of(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

FCB_INLINE Vector<double> erf_of(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

// erf(x) = x P(x^2) for |x| < 1, else sign(x) (1 - exp(-x^2) Q(1 / (1 + |x|))). P and Q are least-squares fits at
// Chebyshev nodes; the error is below 2.2 * 2^-24 absolute.
FCB_INLINE Vector<float> erf_of(Vector<float> x) {
  using V = Vector<float>;
  const V a = x < V{} ? -x : x, s = x * x;
  V p = s * 7.882497106e-05f - 8.018854991e-04f;
  p = p * s + 5.189311943e-03f;
  p = p * s - 2.685432880e-02f;
  p = p * s + 1.128359746e-01f;
  p = p * s - 3.761262690e-01f;
  p = p * s + 1.128379166e+00f;
  const V t = (V{} + 1.0f) / (a + 1.0f);
  V q = t * -6.337831839e-01f + 1.379131505e+00f;
  q = q * t - 6.976206157e-01f;
  q = q * t - 5.843879859e-01f;
  q = q * t + 4.118107385e-01f;
  q = q * t + 5.380572130e-01f;
  q = q * t + 5.668651007e-01f;
  q = q * t - 1.122274648e-04f;
  const V tail = 1.0f - exp_of(-s) * q;
  return a < 1.0f ? p * x : (x < V{} ? -tail : tail);
}
