// Products of bfloat16 on AMX: tiles of 16 rows of 64 bytes, of which there are 8.
//
// Budget: 2 x 2 accumulators of 16 x 16 floats, 2 tiles of rows, 2 of filters: 4 loads (8 cycles each from L1) for 4
// products (16 cycles each). Products are exact and summed in float, to nearest; subnormals count as 0.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

static void amx_begin(int64_t chunk) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    const bool left = t == 4 || t == 5, right = t >= 6;
    config.row_bytes[t] = static_cast<uint16_t>(left ? 2 * chunk : 64);
    config.rows[t] = static_cast<uint8_t>(right ? chunk / 2 : 16);
  }
  __asm__ volatile("" : : "r"(&config) : "memory");  // the intrinsic names only the first 8 bytes
  _tile_loadconfig(&config);
}

static void amx_end() { _tile_release(); }

constexpr int64_t kAmxRows = 32, kAmxPanel = 32;  // of the 2 x 2 tiles
constexpr int64_t kAmxTile = 16;

FCB_INLINE void amx_zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The accumulators as [32][ld], from and to memory.
FCB_INLINE void amx_load(const float* tile, int64_t ld) {
  const int64_t bytes = ld * static_cast<int64_t>(sizeof(float));
  _tile_loadd(0, tile, bytes);
  _tile_loadd(1, tile + kAmxTile, bytes);
  _tile_loadd(2, tile + kAmxTile * ld, bytes);
  _tile_loadd(3, tile + kAmxTile * ld + kAmxTile, bytes);
}
FCB_INLINE void amx_store(float* tile, int64_t ld) {
  const int64_t bytes = ld * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, tile, bytes);
  _tile_stored(1, tile + kAmxTile, bytes);
  _tile_stored(2, tile + kAmxTile * ld, bytes);
  _tile_stored(3, tile + kAmxTile * ld + kAmxTile, bytes);
}

// The same where they are of 64 rows and 16 columns.
FCB_INLINE void amx_store_tall(float* tile, int64_t ld) {
  const int64_t bytes = ld * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, tile, bytes);
  _tile_stored(1, tile + kAmxTile * ld, bytes);
  _tile_stored(2, tile + 2 * kAmxTile * ld, bytes);
  _tile_stored(3, tile + 3 * kAmxTile * ld, bytes);
}

// After a product. Where tiles wait for L2, a step was measured to take up to 1.4 times as long, unless floating-point
// instructions of the vector units run beside it: one for each product, scalar, is enough; integer ones do nothing.
FCB_INLINE void amx_keep_awake() {
  __m128 zero = _mm_setzero_ps();
  __asm__ volatile("vaddss %0, %0, %0" : "+v"(zero));
}

// What products read once for all they do next: a hint keeps it from displacing the other operand in L1.
enum class AmxOnce { kNeither, kRows, kFilters };

// A macro: the tile's number is a part of the instruction.
#define FCB_AMX_LOAD(tile, once, from, row_bytes) \
  do {                                            \
    if constexpr (once)                           \
      _tile_stream_loadd(tile, from, row_bytes);  \
    else                                          \
      _tile_loadd(tile, from, row_bytes);         \
  } while (false)

FCB_INLINE void amx_fetch(AmxFetch* f) {
  for (int64_t i = 0; i < f->lines && f->at < f->end; ++i, f->at += f->distance) _mm_prefetch(f->at, _MM_HINT_T1);
}

// The next slice: rows of one line.
static void amx_emit_slice(AmxEmission* e) {
  AffineBlock<float>& b = e->block;
  b.rows = e->slice < e->line ? e->slice : e->line;
  if (e->ahead)
    for (int64_t r = 0; r < b.rows; ++r, e->ahead += b.ld_residual * sizeof(BFloat16))
      for (int64_t c = 0; c < b.cols; c += kAmxPanel) _mm_prefetch(e->ahead + c * sizeof(BFloat16), _MM_HINT_T1);
  e->emit(b);
  e->rows -= b.rows, e->line -= b.rows;
  const int64_t gap = e->line == 0 ? e->gap : 0;
  if (e->line == 0) e->line = e->width < e->rows ? e->width : e->rows;
  e->row += b.rows + gap;
  b.z = static_cast<const float*>(b.z) + (b.rows + gap) * b.ld_z;
  b.y = static_cast<BFloat16*>(b.y) + b.rows * b.ld_y;
  if (b.residual) b.residual = static_cast<const BFloat16*>(b.residual) + b.rows * b.ld_residual;
}

static void amx_emit(AmxEmission* e) {
  while (e->rows > 0) amx_emit_slice(e);
}

// Before rows of the tile up to `end` take its next sums.
FCB_INLINE void amx_emit_before(AmxEmission* e, int64_t end) {
  while (e->rows > 0 && e->row < end) amx_emit_slice(e);
}

// What the products of a step leave time for: slot() is called after each of its four.
class AmxSlices {
 public:
  explicit AmxSlices(AmxEmission* e) : e_(e) {}
  FCB_INLINE_MEMBER void slot(int product) {
    amx_keep_awake();
    if (product != 1 || e_->rows == 0 || --e_->wait > 0) return;
    e_->wait = e_->steps;
    amx_emit_slice(e_);
  }
  FCB_INLINE_MEMBER void emit_before(int64_t end) { amx_emit_before(e_, end); }

 private:
  AmxEmission* e_;
};

// Adds the products of 32 rows from `first` on and of steps [begin, end). Each tile is loaded for the next
// step right after its last product in this one: the longest time for what comes from L2.
template <AmxOnce Once, class Emitter>
FCB_INLINE void amx_multiply_chunks(const AmxRows& in, int64_t first, int64_t begin, int64_t end,
                                    const uint16_t* filters, AmxFetch* fetch, Emitter* emitter) {
  constexpr bool kRows = Once == AmxOnce::kRows, kFilters = Once == AmxOnce::kFilters;
  const int64_t row_bytes = in.stride * 2, half = in.filter_half, lower = kAmxTile * in.stride;
  const uint16_t* const from = in.rows + first * in.stride;
  if (begin == end) return;
  const uint16_t* rows = from + in.step_offset[begin];
  FCB_AMX_LOAD(4, kRows, rows, row_bytes);
  FCB_AMX_LOAD(5, kRows, rows + lower, row_bytes);
  FCB_AMX_LOAD(6, kFilters, filters, 64);
  FCB_AMX_LOAD(7, kFilters, filters + half, 64);
  for (int64_t step = begin + 1; step < end; ++step) {
    filters += in.filter_step, rows = from + in.step_offset[step];
    _tile_dpbf16ps(0, 4, 6);
    emitter->slot(0);
    _tile_dpbf16ps(1, 4, 7);
    FCB_AMX_LOAD(4, kRows, rows, row_bytes);
    amx_fetch(fetch);
    emitter->slot(1);
    _tile_dpbf16ps(3, 5, 7);
    FCB_AMX_LOAD(7, kFilters, filters + half, 64);
    emitter->slot(2);
    _tile_dpbf16ps(2, 5, 6);
    FCB_AMX_LOAD(6, kFilters, filters, 64);
    FCB_AMX_LOAD(5, kRows, rows + lower, row_bytes);
    emitter->slot(3);
  }
  _tile_dpbf16ps(0, 4, 6);
  emitter->slot(0);
  _tile_dpbf16ps(1, 4, 7);
  amx_fetch(fetch);
  emitter->slot(1);
  _tile_dpbf16ps(2, 5, 6);
  emitter->slot(2);
  _tile_dpbf16ps(3, 5, 7);
  emitter->slot(3);
}

// The same of 64 rows and 16 columns: half as many filters pass, which are all there is to read where rows stay in L1.
template <class Emitter>
FCB_INLINE void amx_multiply_tall(const AmxRows& in, const uint16_t* filters, AmxFetch* fetch, Emitter* emitter) {
  const int64_t row_bytes = in.stride * 2, lower = kAmxTile * in.stride, steps = in.taps * in.chunks;
  const uint16_t* rows = in.rows + in.step_offset[0];
  _tile_stream_loadd(7, filters, 64);
  _tile_loadd(4, rows, row_bytes);
  _tile_loadd(5, rows + lower, row_bytes);
  for (int64_t step = 1; step <= steps; ++step) {
    const uint16_t* const next = in.rows + in.step_offset[step < steps ? step : 0];
    if (step < steps) filters += in.filter_step;
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(4, rows + 2 * lower, row_bytes);
    emitter->slot(0);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(5, rows + 3 * lower, row_bytes);
    amx_fetch(fetch);
    emitter->slot(1);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(4, next, row_bytes);
    emitter->slot(2);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stream_loadd(7, filters, 64);
    _tile_loadd(5, next + lower, row_bytes);
    emitter->slot(3);
    rows = next;
  }
}

// The last 32 rows end with the last row: some are computed twice rather than any read behind it. They lie in the tile
// as if they did not; then those twice computed are dropped.
FCB_INLINE int64_t amx_first_row(const AmxRows& in, int64_t r) {
  return in.count < kAmxRows || r + kAmxRows <= in.count ? r : in.count - kAmxRows;
}
static void amx_close_up(const AmxRows& in, float* tile, int64_t ld) {
  const int64_t last = (in.count - 1) / kAmxRows * kAmxRows, twice = last - amx_first_row(in, last);
  if (twice == 0) return;
  for (int64_t r = last; r < in.count; ++r)
    __builtin_memcpy(tile + r * ld, tile + (r + twice) * ld, kAmxPanel * sizeof *tile);
}

// Sums in memory, parts of a single tap's depth one after the other: a part's filters are in L1 for all rows.
template <AmxOnce Once, class Emitter>
FCB_INLINE void amx_multiply_with(const AmxRows& in, const uint16_t* filters, float* tile, int64_t ld, AmxFetch* fetch,
                                  Emitter* emitter) {
  constexpr int64_t kPartChunks = 18;  // 36 KiB of filters
  const int64_t steps = in.taps * in.chunks;
  const int64_t parts = Once == AmxOnce::kRows ? (steps + kPartChunks - 1) / kPartChunks : 1;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = p * steps / parts, end = (p + 1) * steps / parts;
    for (int64_t r = 0; r < in.count; r += kAmxRows) {
      p > 0 ? amx_load(tile + r * ld, ld) : amx_zero();
      amx_multiply_chunks<Once>(in, amx_first_row(in, r), begin, end, filters, fetch, emitter);
      emitter->emit_before(r + kAmxRows);
      amx_store(tile + r * ld, ld);
    }
    filters += (end - begin) * in.filter_step;
  }
}

static void amx_multiply(const AmxRows& in, const uint16_t* filters, float* tile, int64_t ld, AmxAside* aside) {
  AmxSlices slices(&aside->emission);
  if (in.taps == 1)
    amx_multiply_with<AmxOnce::kRows>(in, filters, tile, ld, &aside->fetch, &slices);
  else
    amx_multiply_with<AmxOnce::kNeither>(in, filters, tile, ld, &aside->fetch, &slices);
  amx_close_up(in, tile, ld);
}

#include "amx_lines.inl"

// A call of memcpy for each pixel of a strided line would take three times as long.
static void amx_copy_pixels(const uint16_t* from, int64_t distance, int64_t count, int64_t elements, uint16_t* to,
                            int64_t to_distance) {
  constexpr int64_t kVector = 32;
  const int64_t whole = elements / kVector * kVector;
  const __mmask32 rest = (1u << (elements - whole)) - 1;
  for (int64_t i = 0; i < count; ++i, from += distance, to += to_distance) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < whole; c += kVector) _mm512_storeu_si512(to + c, _mm512_loadu_si512(from + c));
    if (rest) _mm512_mask_storeu_epi16(to + whole, rest, _mm512_maskz_loadu_epi16(rest, from + whole));
  }
}

// 16 columns of two rows, as pairs.
FCB_INLINE __m512i amx_pairs(const uint16_t* even, const uint16_t* odd, __mmask16 columns) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even ? columns : 0, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd ? columns : 0, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 16 x 16 elements of 32 bits.
FCB_INLINE void amx_transpose_16(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // v[i + j]: column j of each lane, of rows i .. i + 3
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // the 4 x 4 matrix of lanes of each j
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x44), b = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xee);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[j + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// 16 columns that lie apart, each of consecutive elements from `first` on: whole pairs of them.
FCB_INLINE void amx_pack_columns(const uint16_t* first, int64_t column_stride, int64_t cols, int64_t depth,
                                 int64_t chunk, uint16_t* packed) {
  const __mmask32 mask = depth >= 32 ? ~0u : (1u << depth) - 1;
  __m512i v[16];
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) v[c] = _mm512_maskz_loadu_epi16(c < cols ? mask : 0, first + c * column_stride);
  amx_transpose_16(v);
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k)
    if (k < chunk / 2) _mm512_storeu_si512(packed + k * 2 * kAmxTile, v[k]);
}

FCB_INLINE void amx_pack_rows(const uint16_t* const* rows, int64_t skipped, int64_t cols, int64_t chunk,
                              uint16_t* packed) {
  const __mmask16 columns = static_cast<__mmask16>((1u << cols) - 1);
  for (int64_t k = 0; k < chunk; k += 2, packed += 2 * kAmxTile) {
    const uint16_t *even = rows[k] ? rows[k] + skipped : nullptr, *odd = rows[k + 1] ? rows[k + 1] + skipped : nullptr;
    _mm512_storeu_si512(packed, amx_pairs(even, odd, columns));
  }
}

// The same element by element: of merged taps.
FCB_INLINE void amx_pack_elements(const uint16_t* const* rows, int64_t skipped, int64_t column_stride, int64_t cols,
                                  int64_t chunk, uint16_t* packed) {
  for (int64_t k = 0; k < chunk; ++k)
    for (int64_t c = 0; c < kAmxTile; ++c)
      packed[(k / 2 * kAmxTile + c) * 2 + k % 2] = rows[k] && c < cols ? rows[k][skipped + c * column_stride] : 0;
}

// How many of the rows point to consecutive elements, the others being null; -1: they do not.
FCB_INLINE int64_t amx_consecutive(const uint16_t* const* rows, int64_t chunk) {
  int64_t depth = 0;
  while (depth < chunk && rows[depth] && rows[depth] == rows[0] + depth) ++depth;
  for (int64_t k = depth; k < chunk; ++k)
    if (rows[k]) return -1;
  return depth;
}

static void amx_pack(const uint16_t* const* rows, int64_t column_stride, int64_t cols, int64_t chunks, int64_t chunk,
                     uint16_t* of_tap, int64_t chunk_distance, int64_t half_distance) {
  for (int64_t j = 0; j < chunks; ++j, rows += chunk) {
    const int64_t depth = amx_consecutive(rows, chunk);
    uint16_t* packed = of_tap + j * chunk_distance;
    for (int64_t c = 0; c < kAmxPanel; c += kAmxTile, packed += half_distance) {
      const int64_t width = cols <= c ? 0 : cols - c < kAmxTile ? cols - c : kAmxTile, skipped = c * column_stride;
      if (column_stride == 1)
        amx_pack_rows(rows, skipped, width, chunk, packed);
      else if (depth <= 0 || width == 0)
        amx_pack_elements(rows, skipped, column_stride, width, chunk, packed);
      else
        amx_pack_columns(rows[0] + skipped, column_stride, width, depth, chunk, packed);
    }
  }
}

FCB_INLINE __m512i amx_row(const uint16_t* rows, int64_t stride, int64_t r, int64_t count, __mmask32 columns) {
  return r < count ? _mm512_maskz_loadu_epi16(columns, rows + r * stride) : _mm512_setzero_si512();
}

FCB_INLINE __mmask32 amx_columns(int64_t left) { return left >= kAmxPanel ? ~0u : (1u << left) - 1; }

// 32 rows by 32 columns. Unpacking pairs rows within each 16 bytes: columns 0 .. 3 of each 8 come first, then 4 .. 7.
FCB_INLINE void amx_transpose_32(const uint16_t* rows, int64_t stride, int64_t count, __mmask32 columns, uint16_t* to,
                                 int64_t ld) {
  __m512i low[16], high[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i even = amx_row(rows, stride, 2 * i, count, columns);
    const __m512i odd = amx_row(rows, stride, 2 * i + 1, count, columns);
    low[i] = _mm512_unpacklo_epi16(even, odd);
    high[i] = _mm512_unpackhi_epi16(even, odd);
  }
  amx_transpose_16(low);
  amx_transpose_16(high);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t column = i / 4 * 8 + i % 4;
    _mm512_storeu_si512(to + column * ld, low[i]);
    _mm512_storeu_si512(to + (column + 4) * ld, high[i]);
  }
}

static void amx_transpose(const uint16_t* rows, int64_t stride, int64_t count, int64_t cols, uint16_t* columns,
                          int64_t ld) {
  for (int64_t r = 0; r < count; r += kAmxRows)
    for (int64_t c = 0; c < cols; c += kAmxPanel)
      amx_transpose_32(rows + r * stride + c, stride, count - r, amx_columns(cols - c), columns + c * ld + r, ld);
}

static void amx_pairs_of_rows(const uint16_t* rows, int64_t stride, int64_t count, int64_t cols, uint16_t* panels) {
  alignas(64) uint16_t first[32], second[32];
  for (uint16_t i = 0; i < 32; ++i) {
    first[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    second[i] = static_cast<uint16_t>(16 + i / 2 + i % 2 * 32);
  }
  const __m512i left = _mm512_load_si512(first), right = _mm512_load_si512(second);
  const int64_t depth = (count + kAmxRows - 1) / kAmxRows * kAmxRows;
  for (int64_t r = 0; r < depth; r += 2)
    for (int64_t c = 0; c < cols; c += kAmxPanel) {
      const __mmask32 columns = amx_columns(cols - c);
      const __m512i even = amx_row(rows + c, stride, r, count, columns);
      const __m512i odd = amx_row(rows + c, stride, r + 1, count, columns);
      uint16_t* to = panels + c * depth + r * kAmxPanel;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, left, odd));
      _mm512_storeu_si512(to + kAmxPanel, _mm512_permutex2var_epi16(even, right, odd));
    }
}

// Asks for the sums that are next, `lines` of them for each step.
FCB_INLINE void amx_outer_piece(const uint16_t* columns, int64_t ld, const uint16_t* panel, int64_t depth,
                                int64_t lines, const char** next) {
  constexpr int64_t kPairBytes = 2 * kAmxPanel * sizeof(uint16_t);
  for (int64_t k = 0; k < depth; k += 32, columns += 32, panel += 32 * kAmxPanel) {
    for (int64_t i = 0; i < lines; ++i, *next += 64) _mm_prefetch(*next, _MM_HINT_T0);
    _tile_loadd(6, panel, kPairBytes);
    _tile_loadd(4, columns, 2 * ld);
    _tile_dpbf16ps(0, 4, 6);
    amx_keep_awake();
    _tile_loadd(7, panel + 2 * kAmxTile, kPairBytes);
    _tile_dpbf16ps(1, 4, 7);
    amx_keep_awake();
    _tile_loadd(5, columns + kAmxTile * ld, 2 * ld);
    _tile_dpbf16ps(2, 5, 6);
    amx_keep_awake();
    _tile_dpbf16ps(3, 5, 7);
    amx_keep_awake();
  }
}

static void amx_outer(const AmxPieces& in, bool add, float* sums) {
  constexpr int64_t kLines = kAmxRows * kAmxPanel * sizeof(float) / 64;
  add ? amx_load(sums, kAmxPanel) : amx_zero();
  const char* next = reinterpret_cast<const char*>(sums + kAmxRows * kAmxPanel);
  const int64_t steps = in.pieces * in.depth / 32, lines = steps > 0 ? kLines / steps : 0;
  for (int64_t i = 0; i < in.pieces; ++i)
    amx_outer_piece(in.columns + i * in.columns_step, in.ld, in.panel + i * in.panel_step, in.depth, lines, &next);
  amx_store(sums, kAmxPanel);
}
