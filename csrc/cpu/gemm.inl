// Register tiles: small matrix products whose accumulators never leave the registers.
//
// Budget with 32 registers (AVX-512): 12 rows x 2 vectors or 6 x 4 = 24 accumulators, 2 or 4 for the filters, 1 for the
// broadcast. With 16 registers (AVX2, SSE2): 6 x 2 = 12, 2, 1. A 14-row tile makes gcc 12 spill.
template <class C>
constexpr int64_t kPanel = 2 * kLanes<C>;
constexpr int kTileRows = FCB_TILE_ROWS;

// Of N vectors of columns: N vectors of the filters and R broadcasts feed N * R multiplications, so wide tiles load
// less. One vector takes 12 rows, for fewer sums would wait for each other.
template <int N>
constexpr int kRows = N == 1 ? 12 : 2 * kTileRows / N;
constexpr int kMaxVectors = kTileRows >= 12 ? 4 : 2;

// acc[r] += element k of row r of a times N vectors of row k of b, k < K.
template <class C, int R, int N, int K>
FCB_INLINE void accumulate(const C* const (&a)[R], int64_t begin, const C* b, int64_t ldb, Vector<C> (&acc)[R][N]) {
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k, b += ldb) {
    Vector<C> v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) v[n] = load(b + n * kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<C> x = broadcast(a[r][begin + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) add_product(&acc[r][n], x, v[n]);
    }
  }
}

// Asks for the first cache lines of R rows: each tap's are short runs, which the hardware does not foresee (+1 .. 4 %).
template <class C, int R>
FCB_INLINE void fetch_rows(const C* const* rows, int64_t offset, int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(C), kLines = 4;
  for (int r = 0; r < R; ++r)
    for (int64_t k = 0; k < depth && k < kLines * kLine; k += kLine) __builtin_prefetch(rows[r] + offset + k);
}

// In straight runs of kStep of the depth: the end of a short loop is one that the processor does not foresee.
constexpr int kStep = 4;

// Memory that is asked for evenly: a line, or a part of one again, every kStep, with no branch that the processor could
// not foresee (+4 %).
struct Fetch {
  const char* at;
  int64_t step;  // bytes
};
constexpr int kFetches = 3;

// Stretches of more than a line a kStep are asked for at several places at once, as far as there are places left. What
// would be still more is not asked for. `any`: a valid address, for no memory; a null one would be looked up in the
// page tables each time.
template <class C>
FCB_INLINE void plan_fetches(const Stretch<C> (&stretches)[kFetches], int64_t steps, const C* any,
                             Fetch (&fetches)[kFetches]) {
  constexpr int64_t kLine = 64;
  int count = 0, left = kFetches;
  for (const Stretch<C>& s : stretches) left -= s.begin != s.end;
  for (const Stretch<C>& s : stretches) {
    const int64_t bytes = (s.end - s.begin) * sizeof(C);
    if (bytes == 0) continue;
    const int64_t wanted = (bytes + steps * kLine - 1) / (steps * kLine), places = wanted <= left ? wanted : left + 1;
    const int64_t part = bytes / places, step = part / steps;
    left -= places - 1;
    for (int64_t i = 0; i < places; ++i)
      fetches[count++] = {reinterpret_cast<const char*>(s.begin) + i * part, step < kLine ? step : kLine};
  }
  while (count < kFetches) fetches[count++] = {reinterpret_cast<const char*>(any), 0};
}

FCB_INLINE void fetch(Fetch* f) {
  __builtin_prefetch(f->at, 0, 2);
  f->at += f->step;
}

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
    if (to.block.residual) residual = row<char>(to.block.residual, first, ld_residual);
    if (!to.block.stream) result = row<char>(to.block.y, first, ld_result);
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

template <int N>
FCB_INLINE void ask_for_row(const char** row, int64_t ld, int64_t vector) {
  if (!*row) return;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) __builtin_prefetch(*row + n * vector);
  *row += ld;
}

template <class C, int N>
FCB_INLINE void move_row(RowsInTransit<C>* t) {
  if (--t->left > 0) return;
  t->left = t->steps;
  if (t->rows > 0) stream_row<C, N>(t);
  ask_for_row<N>(&t->residual, t->ld_residual, t->vector);
  ask_for_row<N>(&t->result, t->ld_result, t->vector);
}

// What goes on while a product is computed.
template <class C>
struct Meanwhile {
  Fetch ahead[kFetches];
  RowsInTransit<C> rows;
};

// The sums of `valid` rows from `first` on, and of the last one again up to R.
template <class C, int R, int N>
FCB_INLINE void multiply_rows(const GatheredRows<C>& in, int64_t first, int64_t valid, const Filters<C>& b,
                              Meanwhile<C>* meanwhile, Vector<C> (&acc)[R][N]) {
  const C* filters = b.rows;
  const int64_t ldb = b.ld;
  for (int64_t t = 0; t < in.taps; ++t) {
    const C* const* rows = in.rows + t * in.row_stride + first;
    const C* a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = rows[r < valid ? r : valid - 1] + in.offset;
    if (t + 1 < in.taps && valid == R) fetch_rows<C, R>(rows + in.row_stride, in.offset, in.depth);
    int64_t k = 0;
    for (; k + kStep <= in.depth; k += kStep, filters += kStep * ldb) {
#pragma GCC unroll 3
      for (Fetch& f : meanwhile->ahead) fetch(&f);
      move_row<C, N>(&meanwhile->rows);
      accumulate<C, R, N, kStep>(a, k, filters, ldb, acc);
    }
    for (; k < in.depth; ++k, filters += ldb) accumulate<C, R, N, 1>(a, k, filters, ldb, acc);
  }
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

// acc = y, as GemmOutput::clamps says. Bounded: from above, too.
template <bool Bounded, class C, int R, int N>
FCB_INLINE void clamp_tile(const GemmOutput<C>& to, Vector<C> (&acc)[R][N]) {
  const Vector<C> low = broadcast(to.low), high = broadcast(to.high);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Vector<C> mean = load(to.block.mean + n * kLanes<C>), scale = load(to.block.scale + n * kLanes<C>),
                    beta = load(to.block.beta + n * kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<C> y = larger(low, (acc[r][n] - mean) * scale + beta);
      acc[r][n] = Bounded ? smaller(high, y) : y;
    }
  }
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
#if defined(__AVX512F__)
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
  const bool done = clamps || to.emit == emit_sums<C>;
  if (clamps) to.high < __builtin_huge_val() ? clamp_tile<true, C, R, N>(to, acc) : clamp_tile<false, C, R, N>(to, acc);
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

// A whole tile, of kRows<N> rows. A function of its own, for the sake of its registers.
template <class C, int N>
static __attribute__((noinline)) void gemm_tile(const GatheredRows<C>& in, int64_t first, const Filters<C>& filters,
                                                Meanwhile<C>* meanwhile, const GemmOutput<C>& to) {
  constexpr int R = kRows<N>;
  Vector<C> acc[R][N] = {};
  if (to.add) load_tile<C, R, N>(to.tile + first * N * kLanes<C>, R, acc);
  meanwhile->rows.begin_tile(to, first);
  multiply_rows<C, R, N>(in, first, R, filters, meanwhile, acc);
  finish_tile<C, R, N>(acc, first, to, &meanwhile->rows);
}

// The last rows, by a tile of about as many.
template <class C, int N, int R>
static void gemm_rest(const GatheredRows<C>& in, int64_t first, int64_t rows, const Filters<C>& filters,
                      Meanwhile<C>* meanwhile, C* tile, bool add) {
  if constexpr (R > 1)
    if (rows <= R / 2) return gemm_rest<C, N, R / 2>(in, first, rows, filters, meanwhile, tile, add);
  Vector<C> acc[R][N] = {};
  if (add) load_tile<C, R, N>(tile, rows, acc);
  multiply_rows<C, R, N>(in, first, rows, filters, meanwhile, acc);
  store_tile<C, R, N>(acc, rows, tile);
}

template <class C>
FCB_INLINE void convert_rows(const GatheredRows<C>& in, int64_t first, int64_t rows) {
  const RowConversion<C>& c = in.conversion;
  if (c.load) c.load(c.from + first, in.offset, rows, in.depth, c.to + first * c.ld + in.offset, c.ld);
}

template <class C, int N>
static void gemm_of(const GatheredRows<C>& in, const Filters<C>& filters, const GemmOutput<C>& to) {
  constexpr int64_t R = kRows<N>, kLd = N * kLanes<C>;
  const int64_t tile_steps = in.taps * (in.depth / kStep), steps = (in.count + R - 1) / R * tile_steps;
  Meanwhile<C> meanwhile{{}, {tile_steps, R}};
  plan_fetches(in.ahead, steps > 0 ? steps : 1, filters.rows, meanwhile.ahead);
  int64_t first = 0;
  for (; first + R <= in.count; first += R) {
    convert_rows(in, first, R);
    gemm_tile<C, N>(in, first, filters, &meanwhile, to);
  }
  const int64_t rest = in.count - first;
  convert_rows(in, first, rest);
  if (rest > 0) gemm_rest<C, N, kRows<N>>(in, first, rest, filters, &meanwhile, to.tile + first * kLd, to.add);
  while (meanwhile.rows.rows > 0) stream_row<C, N>(&meanwhile.rows);
  if (rest > 0) emit_rows(to.tile + first * kLd, kLd, first, rest, to);
}

template <class C, int N = kMaxVectors>
static void gemm(const GatheredRows<C>& in, const Filters<C>& filters, const GemmOutput<C>& to) {
  if constexpr (N > 0) {
    if (filters.columns < N * kLanes<C>) return gemm<C, N - 1>(in, filters, to);
    gemm_of<C, N>(in, filters, to);
  }
}
