// Products of planes, the multiplications of Winograd's algorithm: many small matrices of one shape, one after the
// other.
//
// The rows of `a` lie in blocks of kPlaneDepth elements of depth: a tile of one is one piece of memory, which the
// hardware reads ahead, and all its elements have constant distances from one pointer. With a pointer for each row the
// compiler runs out of registers (-12 % of the speed).

// What will be read next, asked for a cache line or a part of one every step of depth.
struct NextFilters {
  const char* from;
  int64_t step;  // bytes
};

// tile[R][panel] = or += rows a[R] * b[depth][panel].
template <class C, int R>
static void plane_tile(const C* a, int64_t block_a, const C* b, int64_t depth, C* tile, bool add, NextFilters next) {
  Vector<C> acc[R][2] = {};
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) acc[r][v] = load(tile + r * kPanel<C> + v * kLanes<C>);
  }
  for (int64_t k = 0; k < depth; k += kPlaneDepth, a += block_a) {
    const C* const end = a + (depth - k < kPlaneDepth ? depth - k : kPlaneDepth);
#pragma GCC unroll 2
    for (const C* x = a; x < end; ++x, b += kPanel<C>, next.from += next.step) {
      __builtin_prefetch(next.from, 0, 2);
      const Vector<C> b0 = load(b), b1 = load(b + kLanes<C>);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vector<C> v = broadcast(x[r * kPlaneDepth]);
        acc[r][0] += v * b0;
        acc[r][1] += v * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(tile + r * kPanel<C>, acc[r][0]);
    store(tile + r * kPanel<C> + kLanes<C>, acc[r][1]);
  }
}

template <class C, int R>
FCB_INLINE void plane_tile_of(int64_t rows, const C* a, int64_t block_a, const C* b, int64_t depth, C* tile, bool add,
                              NextFilters next) {
  if constexpr (R > 0) {
    if (rows == R) return plane_tile<C, R>(a, block_a, b, depth, tile, add, next);
    plane_tile_of<C, R - 1>(rows, a, block_a, b, depth, tile, add, next);
  }
}

// In as few tiles as can be, of equal height but for one row: full tiles and a low one would be slower.
template <class C>
FCB_INLINE void multiply_depth(const Planes<C>& in, const C* a, const C* b, const C* ahead, int64_t depth, C* c,
                               bool add) {
  const int64_t tiles = (in.rows + kTileRows - 1) / kTileRows, step = in.ahead_row * sizeof(C) / tiles;
  const char* next = reinterpret_cast<const char*>(ahead);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = t * in.rows / tiles, end = (t + 1) * in.rows / tiles;
    plane_tile_of<C, kTileRows>(end - first, a + first * kPlaneDepth, in.lda, b, depth, c + first * kPanel<C>, add,
                                {next + t * depth * step, step});
  }
}

// One plane. A pass over the rows takes no more depth than L1 has room for the filters.
template <class C>
static void multiply_plane(const Planes<C>& in) {
  constexpr int64_t kBlocks = 32768 / (kPanel<C> * sizeof(C) * kPlaneDepth), kDepth = kBlocks * kPlaneDepth;
  for (int64_t k = 0; k < in.depth; k += kDepth)
    multiply_depth(in, in.a + k / kPlaneDepth * in.lda, in.b + k * kPanel<C>, in.ahead + k * in.ahead_row,
                   in.depth - k < kDepth ? in.depth - k : kDepth, in.c, in.add || k > 0);
}

// One tile of each plane. What the next one reads of a and c is asked for: it comes from L2 in pieces that no hardware
// foresees.
template <class C, int R>
static void low_planes(const Planes<C>& in) {
  constexpr int64_t kLine = 64 / sizeof(C), kBytes = sizeof(C);
  const C *a = in.a, *b = in.b;
  const char* ahead = reinterpret_cast<const char*>(in.ahead);
  C* c = in.c;
  for (int64_t p = 0; p < in.planes; ++p, a += in.plane_a, b += in.plane_b, c += in.plane_c) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(c + in.plane_c + r * kPanel<C>);
      for (int64_t k = 0; k < in.depth; k += kLine) __builtin_prefetch(a + in.plane_a + r * kPlaneDepth + k);
    }
    plane_tile<C, R>(a, 0, b, in.depth, c, in.add, {ahead, in.ahead_row * kBytes});
    ahead += in.depth * in.ahead_row * kBytes;
  }
}

template <class C, int R = kTileRows>
static void multiply_low_planes(const Planes<C>& in) {
  if constexpr (R > 0) in.rows == R ? low_planes<C, R>(in) : multiply_low_planes<C, R - 1>(in);
}

// Asks for `lines` cache lines.
template <class C>
FCB_INLINE void fetch_lines(const C* from, int64_t lines) {
  constexpr int64_t kLine = 64 / sizeof(C);
#pragma GCC unroll 4
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * kLine, 0, 2);
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
