// Products of bfloat16 on AMX: tiles of 16 rows of 64 bytes, of which there are 8.
//
// Budget: 2 x 2 accumulators of 16 x 16 floats, 2 tiles of rows, 2 of filters: 4 loads (8 cycles each from L1) for 4
// products (16 cycles each). Where filters come from beyond L2, 4 x 1: 5 loads, but each filter is read once for 64
// rows. Products are exact and summed in float, to nearest; subnormals count as 0.

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

constexpr int64_t kAmxHeld = 16 << 10;  // elements of filters, 32 KiB, that stay in L1 beside rows

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
// The last step loads what it or the first one has had, for nothing: cheaper than to leave that out.
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
  else if (in.taps * in.chunks * in.chunk * kAmxPanel > kAmxHeld)
    amx_multiply_with<AmxOnce::kFilters>(in, filters, tile, ld, &aside->fetch, &slices);
  else
    amx_multiply_with<AmxOnce::kNeither>(in, filters, tile, ld, &aside->fetch, &slices);
  amx_close_up(in, tile, ld);
}

#include "amx_lines.inl"

#include "amx_pack.inl"

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
