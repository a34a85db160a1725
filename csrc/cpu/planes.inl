// Products of planes, the multiplications of Winograd's algorithm: many small matrices of one shape, one after the
// other. Each is too short for the hardware to foresee the next one, so a tile asks for what comes after it: the rows
// of the next tile, and its share of the filters of the next plane.

// Asks for `lines` cache lines.
template <class C>
FCB_INLINE void fetch_lines(const C* from, int64_t lines) {
  constexpr int64_t kLine = 64 / sizeof(C);
#pragma GCC unroll 4
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * kLine, 0, 2);
}

// tile[R][panel] = a[R][lda] * b[depth][panel]; meanwhile asks for next_a[R][lda] and `share` lines from next_b on for
// each cache line of depth.
template <class C, int R>
static void plane_tile(const C* a, int64_t lda, const C* b, int64_t depth, C* tile, const C* next_a, const C* next_b,
                       int64_t share) {
  constexpr int64_t kLine = 64 / sizeof(C);
  Vector<C> acc[R][2] = {};
  for (int64_t k = 0; k < depth; k += kLine) {
    const int64_t end = depth - k < kLine ? depth - k : kLine;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) __builtin_prefetch(next_a + r * lda + k);
    fetch_lines(next_b, share);
    next_b += share * kLine;
    const C* rows[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) rows[r] = a + r * lda + k;
    accumulate<C, R>(rows, b, 0, end, acc);
    b += end * kPanel<C>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(tile + r * kPanel<C>, acc[r][0]);
    store(tile + r * kPanel<C> + kLanes<C>, acc[r][1]);
  }
}

template <class C, int R>
FCB_INLINE void plane_tile_of(int64_t rows, const C* a, int64_t lda, const C* b, int64_t depth, C* tile,
                              const C* next_a, const C* next_b, int64_t share) {
  if constexpr (R > 0) {
    if (rows == R) return plane_tile<C, R>(a, lda, b, depth, tile, next_a, next_b, share);
    plane_tile_of<C, R - 1>(rows, a, lda, b, depth, tile, next_a, next_b, share);
  }
}

// In as few tiles as can be, of equal height but for one row: full tiles and a low one would be slower.
template <class C>
static void multiply_planes(const Planes<C>& in) {
  const int64_t tiles = (in.rows + kTileRows - 1) / kTileRows;
  const int64_t share =
      (kPanel<C> + tiles - 1) / tiles;  // a cache line of depth is as many lines of filters as a panel
  for (int64_t p = 0; p < in.planes; ++p) {
    const C *a = in.a + p * in.plane_a, *b = in.b + p * in.plane_b;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * in.rows / tiles, end = (t + 1) * in.rows / tiles;
      const C* next_a = t + 1 < tiles ? a + end * in.lda : a + in.plane_a;
      plane_tile_of<C, kTileRows>(end - first, a + first * in.lda, in.lda, b, in.depth,
                                  in.c + p * in.plane_c + first * kPanel<C>, next_a,
                                  b + in.plane_b + t * share * in.depth, share);
    }
  }
}

// c[R][panel] = or += a[depth][R]' * b[depth][panel].
template <class C, int R, bool Add>
static void transposed_tile(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, C* c) {
  Vector<C> acc[R][2] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) fetch_lines(c + r * kPanel<C>, kPanel<C> * sizeof(C) / 64);
  for (int64_t k = 0; k < depth; ++k, a += lda, b += ldb) {
    const Vector<C> b0 = load(b), b1 = load(b + kLanes<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<C> x = broadcast(a[r]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) {
      C* to = c + r * kPanel<C> + v * kLanes<C>;
      store(to, Add ? load(to) + acc[r][v] : acc[r][v]);
    }
}

template <class C, int R, bool Add>
FCB_INLINE void transposed_tile_of(int64_t rows, const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth,
                                   C* c) {
  if constexpr (R > 0) {
    if (rows == R) return transposed_tile<C, R, Add>(a, lda, b, ldb, depth, c);
    transposed_tile_of<C, R - 1, Add>(rows, a, lda, b, ldb, depth, c);
  }
}

template <class C, bool Add>
static void transposed_planes(const Planes<C>& in) {
  const int64_t tiles = (in.rows + kTileRows - 1) / kTileRows;
  for (int64_t p = 0; p < in.planes; ++p)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * in.rows / tiles, end = (t + 1) * in.rows / tiles;
      transposed_tile_of<C, kTileRows, Add>(end - first, in.a + p * in.plane_a + first, in.lda, in.b + p * in.plane_b,
                                            in.ldb, in.depth, in.c + p * in.plane_c + first * kPanel<C>);
    }
}

template <class C>
static void multiply_transposed_planes(const Planes<C>& in) {
  in.add ? transposed_planes<C, true>(in) : transposed_planes<C, false>(in);
}
