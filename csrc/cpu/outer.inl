// Outer products: tiles of sums over the rows of two blocks, and what brings blocks into the form that they read.

// Asks for the next line of `ahead`.
template <class C>
FCB_INLINE void fetch(Ahead<C>* ahead) {
  if (ahead->row == ahead->count) return;
  __builtin_prefetch(ahead->rows[ahead->row] + ahead->offset + ahead->line * Ahead<C>::kLine, 0, 1);
  if (++ahead->line < ahead->lines) return;
  ahead->line = 0;
  ++ahead->row;
}

// acc += K rows of a, transposed, times as many of N vectors of b.
template <class C, int R, int N, int K>
FCB_INLINE void outer_steps(const C* a, int64_t lda, const C* b, int64_t ldb, Vector<C> (&acc)[R][N]) {
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k, a += lda, b += ldb) {
    Vector<C> v[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) v[n] = load(b + n * kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) add_products<C>(acc[r], a[r], v);
  }
}

// Beside 32 registers a step is 24 multiplications, long enough for a loop. With 12 of them the loop's own instructions
// show, most of all where another thread shares the core, and with it the instructions that start in a cycle: so they
// come in runs (+10 % there), and a line is asked for before a run.
template <class C, int R, int N>
FCB_INLINE void sum_in_runs(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, Ahead<C>* ahead,
                            Vector<C> (&acc)[R][N]) {
  constexpr int kRun = 4;
  int64_t k = 0, left = ahead ? 0 : depth;  // before the next line is asked for
  for (; k + kRun <= depth; k += kRun, left -= kRun, a += kRun * lda, b += kRun * ldb) {
    if (left <= 0) {
      fetch(ahead);
      left += ahead->steps;
    }
    outer_steps<C, R, N, kRun>(a, lda, b, ldb, acc);
  }
  for (; k < depth; ++k, a += lda, b += ldb) outer_steps<C, R, N, 1>(a, lda, b, ldb, acc);
}

// acc += a' b over `depth`: R columns of a, N vectors of columns of b.
template <class C, int R, int N>
FCB_INLINE void product_sums(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, Ahead<C>* ahead,
                             Vector<C> (&acc)[R][N]) {
  if constexpr (kFewRows) return sum_in_runs<C, R, N>(a, lda, b, ldb, depth, ahead, acc);
  const int64_t step = ahead ? ahead->steps : depth;
  for (int64_t k = 0; k < depth;) {
    if (ahead) fetch(ahead);
    for (const int64_t end = k + step < depth ? k + step : depth; k < end; ++k, a += lda, b += ldb)
      outer_steps<C, R, N, 1>(a, lda, b, ldb, acc);
  }
}

template <class C, int R>
static void outer_tile(const C* a, const C* b, int64_t depth, bool add, C* tile, Ahead<C>* ahead) {
  Vector<C> acc[R][2] = {};  // of this block alone: adding it to the tile once errs less than adding each product
  product_sums<C, R, 2>(a, kTileRows, b, kPanel<C>, depth, ahead, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) {
      C* to = tile + r * kPanel<C> + v * kLanes<C>;
      store(to, add ? load(to) + acc[r][v] : acc[r][v]);
    }
}

// Of a partial tile no more rows than 8 accumulators need are computed: fewer would wait for each other's additions.
template <class C>
static void outer(const C* a, const C* b, int64_t depth, int64_t rows, bool add, C* tile, Ahead<C>* ahead) {
  if (kTileRows > 4 && rows <= 4) return outer_tile<C, 4>(a, b, depth, add, tile, ahead);
  if (kTileRows > 8 && rows <= 8) return outer_tile<C, 8>(a, b, depth, add, tile, ahead);
  outer_tile<C, kTileRows>(a, b, depth, add, tile, ahead);
}

// The first `valid` of Width elements, zeros as the others.
template <class C, int Width>
FCB_INLINE void pack_part(const C* from, int64_t valid, C* to) {
  for (int64_t c = 0; c < Width; c += kLanes<C>, valid -= kLanes<C>) {
    const Vector<C> v = valid >= kLanes<C> ? load(from + c) : valid > 0 ? load_part(from + c, valid) : Vector<C>{};
    Width - c >= kLanes<C> ? store(to + c, v) : store_part(to + c, v, Width - c);
  }
}

// Width elements of each of some rows, less than a vector: all but the last in whole vectors, of which the next row
// takes the place of what is too much.
template <class C, int Width>
FCB_INLINE void pack_short(const C* const* rows, int64_t offset, int64_t count, C* to) {
  for (int64_t r = 0; r + 1 < count; ++r) store(to + r * Width, load(rows[r] + offset));
  __builtin_memcpy(to + (count - 1) * Width, rows[count - 1] + offset, Width * sizeof(C));
}

// A few rows at a time, panel by panel: few streams of memory are read, and whole lines of a panel are written at once.
template <class C, int Width>
static void pack(const C* const* rows, int64_t offset, int64_t count, int64_t valid, C* packed, int64_t panel) {
  constexpr int64_t kGroup = 8;
  const int64_t whole = valid / Width * Width;
  for (int64_t first = 0; first < count; first += kGroup, packed += kGroup * Width) {
    const int64_t n = count - first < kGroup ? count - first : kGroup;
    C* to = packed;
    int64_t c = 0;
    if constexpr (Width < kLanes<C> && kFewRows)  // +15 % on AVX2; not measured with 12 of 16
      for (; c + kLanes<C> <= valid; c += Width, to += panel) pack_short<C, Width>(rows + first, offset + c, n, to);
    for (; c < whole; c += Width, to += panel)
      for (int64_t r = 0; r < n; ++r) __builtin_memcpy(to + r * Width, rows[first + r] + offset + c, Width * sizeof(C));
    if (whole < valid)
      for (int64_t r = 0; r < n; ++r)
        pack_part<C, Width>(rows[first + r] + offset + whole, valid - whole, to + r * Width);
  }
}

template <class C>
static void transpose(const C* from, int64_t ld, int64_t rows, int64_t depth, C* packed, int64_t panel) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t c = 0; c < panel; c += L)
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t count = rows - c < L ? rows - c : L, part = depth - k < L ? depth - k : L;
      if (count == L && part == L)
        transpose_square(from + c * ld + k, ld, packed + k * panel + c, panel);
      else
        for (int64_t i = 0; i < part; ++i)
          for (int64_t r = 0; r < L; ++r) packed[(k + i) * panel + c + r] = r < count ? from[(c + r) * ld + k + i] : 0;
    }
}
