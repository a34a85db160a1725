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

// 32 rows from `first` on.
FCB_INLINE void amx_multiply_rows(const AmxRows& in, int64_t first, const uint16_t* filters, float* tile) {
  const int64_t row_bytes = in.stride * 2, half = in.chunk * kAmxTile;
  constexpr int64_t kTileBytes = kAmxPanel * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t t = 0; t < in.taps; ++t) {
    const uint16_t* rows = in.rows + in.tap_offset[t] + first * in.stride;
    for (int64_t j = 0; j < in.chunks; ++j, rows += in.chunk, filters += 2 * half) {
      _tile_loadd(6, filters, 64);
      _tile_loadd(4, rows, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, filters + half, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, rows + kAmxTile * in.stride, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, tile, kTileBytes);
  _tile_stored(1, tile + kAmxTile, kTileBytes);
  _tile_stored(2, tile + kAmxTile * kAmxPanel, kTileBytes);
  _tile_stored(3, tile + kAmxTile * kAmxPanel + kAmxTile, kTileBytes);
}

// The last 32 rows end with the last row: some are computed twice rather than any read behind it.
static void amx_multiply(const AmxRows& in, const uint16_t* filters, float* tile) {
  for (int64_t r = 0; r < in.count; r += kAmxRows) {
    const int64_t first = in.count < kAmxRows || r + kAmxRows <= in.count ? r : in.count - kAmxRows;
    amx_multiply_rows(in, first, filters, tile + first * kAmxPanel);
  }
}

// 16 columns of two rows, as pairs.
FCB_INLINE __m512i amx_pairs(const uint16_t* even, const uint16_t* odd, __mmask16 columns) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even ? columns : 0, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd ? columns : 0, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 16 columns that lie apart.
FCB_INLINE void amx_gather(const uint16_t* row, int64_t column_stride, int64_t cols, uint16_t* packed) {
  for (int64_t c = 0; c < kAmxTile; ++c) packed[2 * c] = row && c < cols ? row[c * column_stride] : 0;
}

static void amx_pack(const uint16_t* const* rows, int64_t column_stride, int64_t cols, int64_t chunks, int64_t chunk,
                     uint16_t* packed) {
  for (int64_t j = 0; j < chunks; ++j, rows += chunk)
    for (int64_t c = 0; c < kAmxPanel; c += kAmxTile) {
      const int64_t width = cols <= c ? 0 : cols - c < kAmxTile ? cols - c : kAmxTile, skipped = c * column_stride;
      for (int64_t k = 0; k < chunk; k += 2, packed += 2 * kAmxTile) {
        const uint16_t *even = rows[k] ? rows[k] + skipped : nullptr,
                       *odd = rows[k + 1] ? rows[k + 1] + skipped : nullptr;
        if (column_stride == 1) {
          _mm512_storeu_si512(packed, amx_pairs(even, odd, static_cast<__mmask16>((1u << width) - 1)));
        } else {
          amx_gather(even, column_stride, width, packed);
          amx_gather(odd, column_stride, width, packed + 1);
        }
      }
    }
}
