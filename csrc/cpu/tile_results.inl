// What becomes of the sums of a register tile, or of a tile in L1: results that go to memory while they are at hand.

// Whether whole tiles add the residual themselves: tiles of few columns would call `emit` often.
constexpr bool kClampsResidual = kFewRows;
// Whether they store sums as 16-bit numbers, too: those that have no scale.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kStoresNarrowSums = true;
#else
constexpr bool kStoresNarrowSums = false;
#endif

// Rows of results on their way to memory, and what is asked for that the tile's own results need there, a row every so
// many kSteps of the multiplications: they would wait for a whole tile's lines at once.
template <class C>
struct RowsInTransit {
  int64_t steps, left;
  const C* sums = nullptr;  // `rows` of the tile before, to be streamed
  C* to = nullptr;
  int64_t rows = 0, ld_to = 0;
  const char *residual = nullptr, *result = nullptr;   // to be asked for
  int64_t ld_residual = 0, ld_result = 0, vector = 0;  // bytes

  // Of tiles that take so many kSteps.
  RowsInTransit(int64_t steps_of_tile, int64_t tile_rows) {
    steps = left = steps_of_tile > tile_rows ? steps_of_tile / (tile_rows + 1) : 1;
  }

  void begin_tile(const GemmOutput<C>& to, int64_t first) {
    left = steps;
    if (!to.emit) return;
    const int64_t bytes = bytes_of<C>(to.rows);
    ld_residual = to.block.ld_residual * bytes, ld_result = to.block.ld_y * bytes, vector = kLanes<C> * bytes;
    const bool in_place = to.block.residual == to.block.y;  // asked for but once: as what is written
    if (to.block.residual && !in_place) residual = row<char>(to.block.residual, first, ld_residual);
    if (!to.block.stream || in_place) result = row<char>(to.block.y, first, ld_result);
  }
  bool asks() const { return residual || result; }
};

template <class C, int N>
FCB_INLINE void stream_row(RowsInTransit<C>* t) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) stream(t->to + n * kLanes<C>, load(t->sums + n * kLanes<C>));
  t->sums += N * kLanes<C>;
  t->to += t->ld_to;
  --t->rows;
}

// Write: to be written, for which no other core may keep the line.
template <class C, int N, bool Write>
FCB_INLINE void ask_for_row(const char** row, int64_t ld, int64_t vector) {
  if (!*row) return;
  constexpr int kVectorsOfLine =
      64 / sizeof(Vector<C>);  // of rows that begin with a line; of others some are not asked for
#pragma GCC unroll 4
  for (int n = 0; n < N; n += kVectorsOfLine) __builtin_prefetch(*row + n * vector, Write);
  *row += ld;
}

template <class C, int N>
FCB_INLINE void move_row(RowsInTransit<C>* t) {
  if (--t->left != 0) return;
  t->left = t->steps;
  if (t->rows > 0) stream_row<C, N>(t);
  ask_for_row<C, N, false>(&t->residual, t->ld_residual, t->vector);
  ask_for_row<C, N, true>(&t->result, t->ld_result, t->vector);
}

template <class C, int R, int N>
FCB_INLINE void load_tile(const C* tile, int64_t rows, Vector<C> (&acc)[R][N]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r == rows) return;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = load(tile + (r * N + n) * kLanes<C>);
  }
}

template <class C, int R, int N>
FCB_INLINE void store_tile(const Vector<C> (&acc)[R][N], int64_t rows, C* tile) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r == rows) return;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(tile + (r * N + n) * kLanes<C>, acc[r][n]);
  }
}

// `to.block` of rows from `first` on, whose sums lie in a tile.
template <class C>
FCB_INLINE AffineBlock<C> rows_of(const GemmOutput<C>& to, int64_t first, int64_t rows, const C* tile, int64_t ld) {
  AffineBlock<C> b = to.block;
  b.z = tile, b.ld_z = ld, b.rows = rows;
  const int64_t bytes = bytes_of<C>(to.rows);
  b.y = row<char>(b.y, first, b.ld_y * bytes);
  if (b.residual) b.residual = row<char>(b.residual, first, b.ld_residual * bytes);
  return b;
}

template <class C>
FCB_INLINE void emit_rows(const C* tile, int64_t ld, int64_t first, int64_t rows, const GemmOutput<C>& to) {
  if (to.emit) to.emit(rows_of(to, first, rows, tile, ld));
}

// acc = y, as GemmOutput::clamps says. Bounded: from above, too. T: of the residual; void: there is none.
template <bool Bounded, class T, class C, int R, int N>
FCB_INLINE void clamp_tile(const GemmOutput<C>& to, [[maybe_unused]] int64_t first, Vector<C> (&acc)[R][N]) {
  const Vector<C> low = broadcast(to.low), high = broadcast(to.high);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Vector<C> mean = load(to.block.mean + n * kLanes<C>), scale = load(to.block.scale + n * kLanes<C>),
                    beta = load(to.block.beta + n * kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vector<C> u = (acc[r][n] - mean) * scale + beta;
      if constexpr (!__is_same(T, void))
        u += load(row<T>(to.block.residual, first + r, to.block.ld_residual) + n * kLanes<C>);
      const Vector<C> y = larger(low, u);
      acc[r][n] = Bounded ? smaller(high, y) : y;
    }
  }
}

template <class T, class C, int R, int N>
FCB_INLINE void clamp_tile_with(const GemmOutput<C>& to, int64_t first, Vector<C> (&acc)[R][N]) {
  to.high < __builtin_huge_val() ? clamp_tile<true, T, C, R, N>(to, first, acc)
                                 : clamp_tile<false, T, C, R, N>(to, first, acc);
}

template <class C, int R, int N>
FCB_INLINE void clamp_tile(const GemmOutput<C>& to, int64_t first, Vector<C> (&acc)[R][N]) {
  if (!kClampsResidual || !to.block.residual) return clamp_tile_with<void, C, R, N>(to, first, acc);
#if defined(__AVX2__)
  if constexpr (kClampsResidual && __is_same(C, float)) {
    if (to.rows == RowType::kFloat16) return clamp_tile_with<Half, C, R, N>(to, first, acc);
    if (to.rows == RowType::kBFloat16) return clamp_tile_with<BFloat16, C, R, N>(to, first, acc);
  }
#endif
  clamp_tile_with<C, C, R, N>(to, first, acc);
}

template <class T, class C, int R, int N>
FCB_INLINE void store_rows(const Vector<C> (&acc)[R][N], void* to, int64_t ld) {
  T* y = static_cast<T*>(to);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, y += ld) store_vectors<C, N>(y, acc[r]);
}

// The same, of whichever type they have there.
template <class C, int R, int N>
FCB_INLINE void store_rows(const Vector<C> (&acc)[R][N], const GemmOutput<C>& to, int64_t first) {
  const int64_t ld = to.block.ld_y;
  void* const y = row<char>(to.block.y, first, ld * bytes_of<C>(to.rows));
#if defined(__AVX2__)
  if constexpr (__is_same(C, float)) {
    if (to.rows == RowType::kFloat16) return store_rows<Half, C, R, N>(acc, y, ld);
    if (to.rows == RowType::kBFloat16) return store_rows<BFloat16, C, R, N>(acc, y, ld);
  }
#endif
  store_rows<C, C, R, N>(acc, y, ld);
}

// Results that are to be streamed stay in the tile while the next one is computed; others go from the registers to
// where they belong, if `emit` need not be called for them.
template <class C, int R, int N>
FCB_INLINE void finish_tile(Vector<C> (&acc)[R][N], int64_t first, const GemmOutput<C>& to, RowsInTransit<C>* rows) {
  constexpr int64_t kLd = N * kLanes<C>;
  while (rows->rows > 0) stream_row<C, N>(rows);
  C* tile = to.tile + (to.keep ? first * kLd : 0);
  const bool computed = to.rows == RowType::kCompute, stores = to.block.cols == kLd && !to.keep && !to.block.stream;
  const bool clamps = to.clamps && to.block.cols == kLd && !to.keep && (computed || stores);
  const bool narrow_sums = kStoresNarrowSums && !computed && !to.block.scale;
  const bool done = clamps || narrow_sums || to.emit == emit_sums<C>;
  if (clamps) clamp_tile<C, R, N>(to, first, acc);
  if (done && stores) return store_rows<C, R, N>(acc, to, first);
  store_tile<C, R, N>(acc, R, tile);
  if (!to.emit) return;
  AffineBlock<C> b = rows_of(to, first, R, tile, kLd);
  if (b.stream && computed) {
    rows->sums = tile, rows->rows = R, rows->to = static_cast<C*>(b.y), rows->ld_to = b.ld_y;
    if (done) return;
    b.y = tile, b.ld_y = kLd, b.stream = false;
  }
  to.emit(b);
}
