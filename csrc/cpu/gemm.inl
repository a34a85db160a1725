// Register tiles: small matrix products whose accumulators never leave the registers.
//
// Budget with 32 registers (AVX-512): 12 rows x 2 vectors or 6 x 4 = 24 accumulators, 2 or 4 for the filters, 1 for the
// broadcast. With 16 registers (AVX2, SSE2): 6 x 2 = 12, 2, 1. A 14-row tile makes gcc 12 spill.
template <class C>
constexpr int64_t kPanel = 2 * kLanes<C>;

// Of N vectors of columns: N vectors of the filters and R broadcasts feed N * R multiplications, so wide tiles load
// less. One vector takes 12 rows, for fewer sums would wait for each other.
template <int N>
constexpr int kRows = N == 1 ? 12 : 2 * kTileRows / N;
constexpr int kMaxVectors = kFewRows ? 2 : 4;

// Tiles of few rows: a block's are nearly equal then, none of fewer rows than its sums need not to wait for each other.
template <int N>
constexpr bool kEvenTiles = kFewRows && N == 2;

// acc[r] += element k of row r of a times N vectors of row k of b, k < K.
template <class C, int R, int N, int K>
FCB_INLINE void accumulate(const C* const (&a)[R], int64_t begin, const C* b, int64_t ldb, Vector<C> (&acc)[R][N]) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k, b += ldb) {
    Vector<C> v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) v[n] = load(b + n * kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) add_products<C>(acc[r], a[r][begin + k], v);
  }
}

// Keeps gcc from adding to a pointer for each row, or line of filters, where one index serves all.
template <class T>
FCB_INLINE void hide(T* value) {
  if (kFewRows) asm("" : "+r"(*value));
}

// Asks for the first cache lines of R rows: each tap's are short runs, which the hardware does not foresee (+1 .. 4 %).
template <class C, int R>
FCB_INLINE void fetch_rows(const C* const* rows, int64_t offset, int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(C), kLines = 4;
  for (int r = 0; r < R; ++r)
    for (int64_t k = 0; k < depth && k < kLines * kLine; k += kLine) __builtin_prefetch(rows[r] + offset + k);
}

// In straight runs of kStep of the depth: the end of a short loop is one that the processor does not foresee. Steps of
// 12 multiplications are short beside what else a run does, which shows where another thread shares the core (+5 %).
constexpr int kStep = kFewRows ? 8 : 4;

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

// What goes on while a product is computed.
template <class C>
struct Meanwhile {
  Fetch ahead[kFetches];
  RowsInTransit<C> rows;
};

// The sums of `valid` rows from `first` on, and of the last one again up to R. LdB: the distance of the filters' rows
// where it is known.
template <int LdB, class C, int R, int N>
FCB_INLINE void multiply_rows(const GatheredRows<C>& in, int64_t first, int64_t valid, const Filters<C>& b,
                              Meanwhile<C>* meanwhile, Vector<C> (&acc)[R][N]) {
  const C* filters = b.rows;
  const int64_t ldb = LdB ? LdB : b.ld;
  Fetch own[kFetches];  // in registers, which tiles of few rows leave
  if (kFewRows)
#pragma GCC unroll 3
    for (int i = 0; i < kFetches; ++i) own[i] = meanwhile->ahead[i];
  Fetch(&ahead)[kFetches] = kFewRows ? own : meanwhile->ahead;
  const int64_t whole = in.depth / kStep * kStep;
  for (int64_t t = 0; t < in.taps; ++t) {
    const C* const* rows = in.rows + t * in.row_stride + first;
    const C* a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = rows[r < valid ? r : valid - 1] + in.offset;
    if (t + 1 < in.taps && valid == R) fetch_rows<C, R>(rows + in.row_stride, in.offset, in.depth);
    int64_t k = 0;
    for (; k < whole; k += kStep, filters += kStep * ldb) {
#pragma GCC unroll 3
      for (Fetch& f : ahead) fetch(&f);
      move_row<C, N>(&meanwhile->rows);
      hide(&k);
      hide(&filters);
      accumulate<C, R, N, kStep>(a, k, filters, ldb, acc);
    }
    for (; k < in.depth; ++k, filters += ldb) accumulate<C, R, N, 1>(a, k, filters, ldb, acc);
  }
  if (kFewRows)
#pragma GCC unroll 3
    for (int i = 0; i < kFetches; ++i) meanwhile->ahead[i].at = own[i].at;
}

// A whole tile. A function of its own, for the sake of its registers.
template <class C, int N, int R = kRows<N>>
static __attribute__((noinline)) void gemm_tile(const GatheredRows<C>& in, int64_t first, const Filters<C>& filters,
                                                Meanwhile<C>* meanwhile, const GemmOutput<C>& to) {
  Vector<C> acc[R][N] = {};
  if (to.add) load_tile<C, R, N>(to.tile + first * N * kLanes<C>, R, acc);
  meanwhile->rows.begin_tile(to, first);
  constexpr int kLdB = kFewRows ? N * kLanes<C> : 0;
  if (kLdB && filters.ld == kLdB)
    multiply_rows<kLdB, C, R, N>(in, first, R, filters, meanwhile, acc);
  else
    multiply_rows<0, C, R, N>(in, first, R, filters, meanwhile, acc);
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
  multiply_rows<0, C, R, N>(in, first, rows, filters, meanwhile, acc);
  store_tile<C, R, N>(acc, rows, tile);
}

template <class C>
FCB_INLINE void convert_rows(const GatheredRows<C>& in, int64_t first, int64_t rows) {
  const RowConversion<C>& c = in.conversion;
  if (c.load) c.load(c.from + first, in.offset, rows, in.depth, c.to + first * c.ld + in.offset, c.ld);
}

// Returns the number of rows done: all, but where they are too few for one such tile, or two.
template <class C, int N>
FCB_INLINE int64_t even_tiles(const GatheredRows<C>& in, const Filters<C>& filters, Meanwhile<C>* meanwhile,
                              const GemmOutput<C>& to) {
  constexpr int R = kRows<N>;
  const int64_t tiles = (in.count + R - 1) / R;
  int64_t first = 0;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t rows = (in.count - first + left - 1) / left;
    if (rows < R - 2) break;
    convert_rows(in, first, rows);
    if (rows == R)
      gemm_tile<C, N, R>(in, first, filters, meanwhile, to);
    else if (rows == R - 1)
      gemm_tile<C, N, R - 1>(in, first, filters, meanwhile, to);
    else
      gemm_tile<C, N, R - 2>(in, first, filters, meanwhile, to);
    first += rows;
  }
  return first;
}

template <class C, int N>
static void gemm_of(const GatheredRows<C>& in, const Filters<C>& filters, const GemmOutput<C>& to) {
  constexpr int64_t R = kRows<N>, kLd = N * kLanes<C>;
  const int64_t tile_steps = in.taps * (in.depth / kStep), steps = (in.count + R - 1) / R * tile_steps;
  Meanwhile<C> meanwhile{{}, {tile_steps, R}};
  plan_fetches(in.ahead, steps > 0 ? steps : 1, filters.rows, meanwhile.ahead);
  int64_t first = 0;
  if constexpr (kEvenTiles<N>) {
    first = even_tiles<C, N>(in, filters, &meanwhile, to);
  } else {
    for (; first + R <= in.count; first += R) {
      convert_rows(in, first, R);
      gemm_tile<C, N>(in, first, filters, &meanwhile, to);
    }
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
