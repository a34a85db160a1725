// Convolutions of few source channels: the window of a position lies in planes, one a channel and phase of the stride
// (phase_lines.h), in which the windows of neighbouring positions are neighbours. So the rows of a register tile are
// at constant distances, and the tile has one address in place of one a row.

// The elements at from[0], from[stride], ..
FCB_INLINE Vector<float> load_strided(const float* from, int64_t stride) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return (Vector<float>)_mm512_i32gather_ps(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride)), from, 4);
#else
  Vector<float> v;
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = from[i * stride];
  return v;
#endif
}
FCB_INLINE Vector<double> load_strided(const double* from, int64_t stride) {
  Vector<double> v;
  for (int64_t i = 0; i < kLanes<double>; ++i) v[i] = from[i * stride];
  return v;
}

// to[planes][ld] = from[columns][planes]', the last column in part: `elements` in all.
template <class C>
static void split(const C* from, int64_t elements, int64_t planes, C* to, int64_t ld) {
  for (int64_t q = 0; q < planes; ++q, ++from, --elements, to += ld) {
    const int64_t columns = (elements + planes - 1) / planes;
    int64_t c = 0;
    for (; c + kLanes<C> <= columns; c += kLanes<C>) store(to + c, load_strided(from + c * planes, planes));
    for (; c < columns; ++c) to[c] = from[c * planes];
  }
}

// acc = R rows of the product, from row `first` on. Calls each() once for each of the depth.
template <class C, int R, class F>
FCB_INLINE void shifted_sums(const ShiftedRows<C>& in, int64_t first, const C* filters, Vector<C> (&acc)[R][2],
                             F each) {
  for (int64_t k = 0; k < in.depth; ++k, filters += kPanel<C>) {
    each();
    const C* a = in.from + in.offsets[k] + first;
    const Vector<C> b0 = load(filters), b1 = load(filters + kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<C> x = broadcast(a[r]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
}

template <class C, int R>
static void shifted_tile(const ShiftedRows<C>& in, int64_t first, const C* filters, C* tile) {
  Vector<C> acc[R][2] = {};
  shifted_sums<C, R>(in, first, filters, acc, [] {});
  store_tile<C, R, 2>(acc, R, tile + first * kPanel<C>);
}

template <class C>
static __attribute__((noinline)) void whole_shifted_tile(const ShiftedRows<C>& in, int64_t first, const C* filters,
                                                         const GemmOutput<C>& to) {
  Vector<C> acc[kTileRows][2] = {};
  RowsInTransit<C> rows(in.depth, kTileRows);
  rows.begin_tile(to, first);
  if (rows.asks())
    shifted_sums<C, kTileRows>(in, first, filters, acc, [&] { move_row<C, 2>(&rows); });
  else
    shifted_sums<C, kTileRows>(in, first, filters, acc, [] {});
  finish_tile<C, kTileRows, 2>(acc, first, to, &rows);
  while (rows.rows > 0) stream_row<C, 2>(&rows);
}

// The rest in tiles of few sizes, for there is code for each; 4 rows still are 8 sums at a time. Rows may be computed
// twice, with the same result.
template <class C>
static void rest_of_shifted(const ShiftedRows<C>& in, int64_t r, const C* filters, C* tile) {
  for (; kTileRows > 8 && r + 8 <= in.count; r += 8) shifted_tile<C, 8>(in, r, filters, tile);
  for (; r + 4 <= in.count; r += 4) shifted_tile<C, 4>(in, r, filters, tile);
  if (r < in.count && in.count >= 4) return shifted_tile<C, 4>(in, in.count - 4, filters, tile);
  for (; r < in.count; ++r) shifted_tile<C, 1>(in, r, filters, tile);
}

template <class C>
static void multiply_shifted(const ShiftedRows<C>& in, const C* filters, const GemmOutput<C>& to) {
  int64_t r = 0;
  for (; r + kTileRows <= in.count; r += kTileRows) whole_shifted_tile<C>(in, r, filters, to);
  if (r == in.count) return;
  rest_of_shifted(in, r, filters, to.tile);
  emit_rows(to.tile + r * kPanel<C>, kPanel<C>, r, in.count - r, to);
}

template <class C>
static void copy_windows(const GatheredRows<C>& in, C* to, int64_t ld) {
  for (int64_t r = 0; r < in.count; ++r, to += ld) {
    C* next = to;
    for (int64_t t = 0; t < in.taps; ++t, next += in.depth) {
      const C* from = in.rows[t * in.row_stride + r] + in.offset;
      for_vectors<C>(in.depth, [&](auto read, auto write, int64_t c) { write(next + c, read(from + c)); });
    }
    for (; next < to + ld; ++next) *next = 0;
  }
}

template <class C, int R>
FCB_INLINE void add_rows(const Vector<C> (&acc)[R][2], const ColumnSegment<C>& s, int64_t row, int64_t rows) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r >= rows || !s.to[row + r]) continue;
    C* sums = s.to[row + r] + s.position;
    store(sums, load(sums) + acc[r][0]);
    store(sums + kLanes<C>, load(sums + kLanes<C>) + acc[r][1]);
  }
}

template <class C>
static void add_rows(const C* tile, const ColumnSegment<C>& s, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, tile += kPanel<C>) {
    if (!s.to[row + r]) continue;
    C* sums = s.to[row + r] + s.position;
    const C* from = tile + s.column;
    for_vectors<C>(s.count,
                   [&](auto read, auto write, int64_t c) { write(sums + c, read(sums + c) + read(from + c)); });
  }
}

// Where a whole tile goes to one line, its rows are added from the registers.
template <class C, int R>
static void add_columns_tile(const C* a, int64_t lda, const C* b, int64_t depth, const ColumnSegments<C>& to) {
  Vector<C> acc[R][2] = {};
  product_sums<C, R, 2>(a, lda, b, kPanel<C>, depth, nullptr, acc);
  if (to.segments->count == kPanel<C>) return add_rows<C, R>(acc, *to.segments, to.row, to.rows);
  C tile[R * kPanel<C>];
  store_tile<C, R, 2>(acc, R, tile);
  for (int64_t s = 0; s < to.count; ++s) add_rows<C>(tile, to.segments[s], to.row, to.rows);
}

template <class C>
static void add_columns(const C* a, int64_t lda, const C* b, int64_t depth, const ColumnSegments<C>& to) {
  if (kTileRows > 4 && to.rows <= 4) return add_columns_tile<C, 4>(a, lda, b, depth, to);
  if (kTileRows > 8 && to.rows <= 8) return add_columns_tile<C, 8>(a, lda, b, depth, to);
  add_columns_tile<C, kTileRows>(a, lda, b, depth, to);
}
