// How operands are laid out for AMX: lines of pixels staged, filters packed, rows transposed or paired.

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
