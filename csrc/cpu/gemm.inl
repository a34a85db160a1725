// Register tiles: small matrix products whose accumulators never leave the registers.
//
// Budget with 32 registers (AVX-512): 12 rows x 2 vectors = 24 accumulators, 2 for the filters, 1 for the broadcast.
// With 16 registers (AVX2, SSE2): 6 x 2 = 12, 2, 1. A 14-row tile makes gcc 12 spill.
template <class C>
constexpr int64_t kPanel = 2 * kLanes<C>;
constexpr int kTileRows = FCB_TILE_ROWS;

// acc[r] += row r of a times b, over begin <= k < end; element k of row r is a[r][k].
template <class C, int R>
FCB_INLINE void accumulate(const C* const (&a)[R], const C* b, int64_t begin, int64_t end, Vector<C> (&acc)[R][2]) {
  b += begin * kPanel<C>;
#pragma GCC unroll 4
  for (int64_t k = begin; k < end; ++k, b += kPanel<C>) {
    const Vector<C> b0 = load(b), b1 = load(b + kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<C> x = broadcast(a[r][k]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
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

// Memory that is asked for a few lines at a time, so that the multiplications do not wait for them.
template <class C>
struct Fetch {
  static constexpr int64_t kStep = 16;  // of the depth: 16 * 12 * 2 multiplications hide some lines from the L3
  static constexpr int64_t kLine = 64 / sizeof(C);
  const C *next, *end;
  int64_t lines;  // a step
};

template <class C>
FCB_INLINE void fetch(Fetch<C>* f) {
  for (int64_t i = 0; i < f->lines && f->next < f->end; ++i, f->next += Fetch<C>::kLine)
    __builtin_prefetch(f->next, 0, 2);
}

template <class C, int R>
static void gemm_tile(const GatheredRows<C>& in, int64_t first, const C* filters, C* tile, Fetch<C>* ahead) {
  Vector<C> acc[R][2] = {};
  for (int64_t t = 0; t < in.taps; ++t) {
    const C* const* rows = in.rows + t * in.row_stride + first;
    const C* a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = rows[r] + in.offset;
    if (t + 1 < in.taps) fetch_rows<C, R>(rows + in.row_stride, in.offset, in.depth);
    const int64_t step = ahead->lines > 0 ? Fetch<C>::kStep : in.depth;
    for (int64_t k = 0; k < in.depth; k += step) {
      fetch(ahead);
      accumulate<C, R>(a, filters, k, k + step < in.depth ? k + step : in.depth, acc);
    }
    filters += in.depth * kPanel<C>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(tile + r * kPanel<C>, acc[r][0]);
    store(tile + r * kPanel<C> + kLanes<C>, acc[r][1]);
  }
}

template <class C, int R = kTileRows>
FCB_INLINE void gemm_rows(const GatheredRows<C>& in, int64_t first, int64_t rows, const C* filters, C* tile,
                          Fetch<C>* ahead) {
  if constexpr (R > 0) {
    if (rows == R) return gemm_tile<C, R>(in, first, filters, tile + first * kPanel<C>, ahead);
    gemm_rows<C, R - 1>(in, first, rows, filters, tile, ahead);
  }
}

// In tiles of about as many rows: one of few rows has too few accumulators to keep the multipliers busy.
template <class C>
static void gemm(const GatheredRows<C>& in, const C* filters, C* tile) {
  const int64_t tiles = (in.count + kTileRows - 1) / kTileRows;
  const int64_t steps = tiles * in.taps * ((in.depth + Fetch<C>::kStep - 1) / Fetch<C>::kStep);
  const int64_t lines = (in.ahead_end - in.ahead) / Fetch<C>::kLine;
  Fetch<C> ahead{in.ahead, in.ahead_end, steps == 0 ? 0 : (lines + steps - 1) / steps};
  for (int64_t t = 0, first = 0, rows; t < tiles; ++t, first += rows) {
    rows = (in.count - first + tiles - t - 1) / (tiles - t);
    gemm_rows(in, first, rows, filters, tile, &ahead);
  }
}

// Asks for the next line of `ahead`.
template <class C>
FCB_INLINE void fetch(Ahead<C>* ahead) {
  if (ahead->row == ahead->count) return;
  __builtin_prefetch(ahead->rows[ahead->row] + ahead->offset + ahead->line * Ahead<C>::kLine, 0, 1);
  if (++ahead->line < ahead->lines) return;
  ahead->line = 0;
  ++ahead->row;
}

// acc += a' b over `depth`.
template <class C, int R>
FCB_INLINE void accumulate_outer(const C* a, const C* b, int64_t depth, Vector<C> (&acc)[R][2]) {
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kPanel<C>) {
    const Vector<C> b0 = load(b), b1 = load(b + kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<C> x = broadcast(a[r]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
}

template <class C, int R>
static void outer_tile(const C* a, const C* b, int64_t depth, bool add, C* tile, Ahead<C>* ahead) {
  Vector<C> acc[R][2] = {};  // of this block alone: adding it to the tile once errs less than adding each product
  const int64_t step = ahead ? ahead->steps : depth;
  for (int64_t k = 0; k < depth; k += step) {
    if (ahead) fetch(ahead);
    accumulate_outer<C, R>(a + k * kTileRows, b + k * kPanel<C>, k + step < depth ? step : depth - k, acc);
  }
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

// A few rows at a time, panel by panel: few streams of memory are read, and whole lines of a panel are written at once.
template <class C, int Width>
static void pack(const C* const* rows, int64_t offset, int64_t count, int64_t valid, C* packed, int64_t panel) {
  constexpr int64_t kRows = 8;
  const int64_t whole = valid / Width * Width;
  for (int64_t first = 0; first < count; first += kRows, packed += kRows * Width) {
    const int64_t n = count - first < kRows ? count - first : kRows;
    C* to = packed;
    for (int64_t c = 0; c < whole; c += Width, to += panel)
      for (int64_t r = 0; r < n; ++r) __builtin_memcpy(to + r * Width, rows[first + r] + offset + c, Width * sizeof(C));
    if (whole < valid)
      for (int64_t r = 0; r < n; ++r)
        pack_part<C, Width>(rows[first + r] + offset + whole, valid - whole, to + r * Width);
  }
}

template <class C>
static void transpose(const C* from, int64_t ld, int64_t rows, int64_t depth, C* packed) {
  constexpr int64_t L = kLanes<C>;
  for (int64_t c = 0; c < kPanel<C>; c += L)
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t count = rows - c < L ? rows - c : L, part = depth - k < L ? depth - k : L;
      if (count == L && part == L)
        transpose_square(from + c * ld + k, ld, packed + k * kPanel<C> + c, kPanel<C>);
      else
        for (int64_t i = 0; i < part; ++i)
          for (int64_t r = 0; r < L; ++r)
            packed[(k + i) * kPanel<C> + c + r] = r < count ? from[(c + r) * ld + k + i] : 0;
    }
}

template <class C>
static void add_rows(const C* tile, int64_t rows, int64_t cols, C* const* to, int64_t offset) {
  for (int64_t r = 0; r < rows; ++r, tile += kPanel<C>) {
    if (!to[r]) continue;
    C* sums = to[r] + offset;
    for_vectors<C>(cols, [&](auto read, auto write, int64_t c) { write(sums + c, read(sums + c) + read(tile + c)); });
  }
}
