// What this processor can do, measured by loops that do nothing else. benchmarks/hardware.py compiles it for the machine
// that it runs on, and calls it on as many threads as are measured.
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
// Fused multiply-adds need latency x throughput = 4 x 2 = 8 chains at least; 12 fit into 16 registers too.
#define CHAINS 12

#define FMA_LOOP(name, type)                                                           \
  double name(int64_t rounds) {                                                        \
    typedef type vector __attribute__((vector_size(VECTOR)));                          \
    const int64_t lanes = VECTOR / sizeof(type);                                       \
    vector sums[CHAINS], factor, term;                                                 \
    for (int lane = 0; lane < lanes; ++lane) factor[lane] = (type)0.5, term[lane] = 1; \
    for (int i = 0; i < CHAINS; ++i) sums[i] = term * (type)i;                         \
    for (int64_t round = 0; round < rounds; ++round)                                   \
      for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * factor + term;              \
    volatile type sink = 0; /* so that the sums are needed */                          \
    for (int i = 0; i < CHAINS; ++i) sink += sums[i][0];                               \
    return 2.0 * CHAINS * lanes * (double)rounds;                                      \
  }

// Floating-point operations done.
FMA_LOOP(fma_float32, float)
FMA_LOOP(fma_float64, double)

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Products of bfloat16 tiles; 0 where the system does not permit AMX. Four chains hide the latency.
double amx_bfloat16(int64_t rounds) {
  enum { kRequestPermission = 0x1023, kTileData = 18, kRows = 16, kRowBytes = 64 };
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } __attribute__((packed)) config = {.palette = 1};
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = kRowBytes, config.rows[tile] = kRows;
  __asm__ volatile("" : : "r"(&config) : "memory");  // the intrinsic tells gcc of 8 bytes of it only
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2 * kRows * 16 * 32 * (double)rounds;
}
#else
double amx_bfloat16(int64_t rounds) { return (void)rounds, 0; }
#endif

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs.
double pairs_bfloat16(int64_t rounds) {
  __m512 sums[CHAINS];
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3f003f00);  // 0.5 and 0.5
  for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_set1_ps((float)i);
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
  volatile float sink = 0;
  for (int i = 0; i < CHAINS; ++i) sink += sums[i][0];
  return 2.0 * CHAINS * 32 * (double)rounds;
}
#else
double pairs_bfloat16(int64_t rounds) { return (void)rounds, 0; }
#endif

typedef float line __attribute__((vector_size(VECTOR)));

// Several streams at once: one alone does not keep enough lines in flight.
#define STREAMS 4

// Reads so many bytes, a multiple of STREAMS * 4 KiB.
float read_memory(const char *from, int64_t bytes) {
  const int64_t part = bytes / STREAMS;
  line sums[STREAMS] = {};
  for (int64_t at = 0; at < part; at += VECTOR)
    for (int i = 0; i < STREAMS; ++i) sums[i] += *(const line *)(from + i * part + at);
  line sum = sums[0] + sums[1] + sums[2] + sums[3];
  return sum[0];
}

static inline void store(char *to, line value, int stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_ps((float *)to, (__m512)value);
#elif defined(__AVX__)
  if (stream) return _mm256_stream_ps((float *)to, (__m256)value);
#endif
  *(line *)to = value;
}

// Writes so many bytes; `stream`: past the caches.
void write_memory(char *to, int64_t bytes, int stream) {
  const line value = {1};
  for (int64_t at = 0; at < bytes; at += VECTOR) store(to + at, value, stream);
}

// Reads and writes so many bytes each.
void copy_memory(const char *from, char *to, int64_t bytes, int stream) {
  const int64_t part = bytes / STREAMS;
  for (int64_t at = 0; at < part; at += VECTOR)
    for (int i = 0; i < STREAMS; ++i) store(to + i * part + at, *(const line *)(from + i * part + at), stream);
}
