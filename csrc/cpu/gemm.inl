// Register tiles: small matrix products whose accumulators never leave the registers.
//
// Budget with 32 registers (AVX-512): 12 rows x 2 vectors = 24 accumulators, 2 for the filters, 1 for the broadcast.
// With 16 registers (AVX2, SSE2): 6 x 2 = 12, 2, 1. A 14-row tile makes gcc 12 spill.
template <class C>
constexpr int64_t kPanel = 2 * kLanes<C>;
constexpr int kTileRows = FCB_TILE_ROWS;

// acc[r] += row r of a times b, over `depth`; element k of row r is a[r][k].
template <class C, int R>
FCB_INLINE void accumulate(const C* const (&a)[R], const C* b, int64_t depth, Vector<C> (&acc)[R][2]) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, b += kPanel<C>) {
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

template <class C, int R>
static void gemm_tile(const GatheredRows<C>& in, int64_t first, const C* filters, C* tile) {
  Vector<C> acc[R][2] = {};
  for (int64_t t = 0; t < in.taps; ++t) {
    const C* const* rows = in.rows + t * in.row_stride + first;
    const C* a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = rows[r] + in.offset;
    if (t + 1 < in.taps) fetch_rows<C, R>(rows + in.row_stride, in.offset, in.depth);
    accumulate<C, R>(a, filters, in.depth, acc);
    filters += in.depth * kPanel<C>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(tile + r * kPanel<C>, acc[r][0]);
    store(tile + r * kPanel<C> + kLanes<C>, acc[r][1]);
  }
}

template <class C, int R>
static void gemm_remainder(const GatheredRows<C>& in, int64_t first, const C* filters, C* tile) {
  if constexpr (R > 0) {
    if (in.count - first == R) return gemm_tile<C, R>(in, first, filters, tile);
    gemm_remainder<C, R - 1>(in, first, filters, tile);
  }
}

template <class C>
static void gemm(const GatheredRows<C>& in, const C* filters, C* tile) {
  int64_t first = 0;
  for (; first + kTileRows <= in.count; first += kTileRows)
    gemm_tile<C, kTileRows>(in, first, filters, tile + first * kPanel<C>);
  gemm_remainder<C, kTileRows - 1>(in, first, filters, tile + first * kPanel<C>);
}

template <class C>
static void outer(const C* a, const C* b, int64_t depth, C* tile) {
  constexpr int R = kTileRows;
  Vector<C> acc[R][2] = {};  // of this block alone: adding it to the tile once errs less than adding each product
  for (int64_t k = 0; k < depth; ++k, a += R, b += kPanel<C>) {
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
      C* to = tile + r * kPanel<C> + v * kLanes<C>;
      store(to, load(to) + acc[r][v]);
    }
}

template <class C>
static void pack_rows(const C* const* rows, int64_t offset, int64_t count, int64_t valid, C* packed) {
  constexpr int R = kTileRows;
  for (int64_t i = 0; i < count; ++i, packed += R) {
    const C* from = rows[i] + offset;
    if (valid >= R) {
      __builtin_memcpy(packed, from, R * sizeof(C));
    } else {
      for (int r = 0; r < R; ++r) packed[r] = r < valid ? from[r] : C(0);
    }
  }
}
