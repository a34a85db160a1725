// The transforms of Winograd's F(MxM, 3x3): a 3x3 filter on a window of (M + 2)^2 pixels gives MxM outputs by (M + 2)^2
// products in place of 9 M^2 (Winograd 1980; Lavin and Gray 2015). With window d, filter g and outputs y, all small
// matrices, and * element by element,
//   y = A'[(G g G') * (B' d B)]A.
// WinogradLine<M> has the products of B', G and A' with a line; here are those with both sides of a matrix.
template <int M>
struct WinogradLine;
#include "winograd2.inl"
#include "winograd4.inl"

// planes[(M+2)^2][count][ld]: the transformed windows of in.taps = (M+2)^2 pixels each, channels in.offset .. +
// in.depth.
template <class C, int M>
static void winograd_window(const GatheredRows<C>& in, C* planes, int64_t ld, int64_t plane) {
  constexpr int W = M + 2;
  for (int64_t r = 0; r < in.count; ++r)
    for_vectors<C>(in.depth, [&](auto read, auto write, int64_t c) {
      Vector<C> lines[W][W], from[W], to[W];
#pragma GCC unroll 6
      for (int x = 0; x < W; ++x) {
#pragma GCC unroll 6
        for (int y = 0; y < W; ++y) from[y] = read(in.rows[(y * W + x) * in.row_stride + r] + in.offset + c);
        WinogradLine<M>::window(from, to);
#pragma GCC unroll 6
        for (int y = 0; y < W; ++y) lines[y][x] = to[y];
      }
#pragma GCC unroll 6
      for (int y = 0; y < W; ++y) {
        WinogradLine<M>::window(lines[y], to);
#pragma GCC unroll 6
        for (int x = 0; x < W; ++x) write(planes + (y * W + x) * plane + r * ld + c, to[x]);
      }
    });
}

// transformed[(M+2)^2][plane] of filters[9][depth][panel].
template <class C, int M>
static void winograd_filter(const C* filters, int64_t depth, C* transformed, int64_t plane) {
  constexpr int W = M + 2;
  const int64_t tap = depth * kPanel<C>;
  for (int64_t i = 0; i < tap; i += kLanes<C>) {
    Vector<C> lines[W][3], from[3], to[W];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
#pragma GCC unroll 3
      for (int y = 0; y < 3; ++y) from[y] = load(filters + (3 * y + x) * tap + i);
      WinogradLine<M>::filter(from, to);
#pragma GCC unroll 6
      for (int y = 0; y < W; ++y) lines[y][x] = to[y];
    }
#pragma GCC unroll 6
    for (int y = 0; y < W; ++y) {
      WinogradLine<M>::filter(lines[y], to);
#pragma GCC unroll 6
      for (int x = 0; x < W; ++x) store(transformed + (y * W + x) * plane + i, to[x]);
    }
  }
}

// The M x M outputs of each of `count` adjacent windows from planes[(M+2)^2][count][panel]: `lines` lines, M or fewer,
// of `pixels` rows each, M * count or up to M - 1 less.
template <class C, int M>
static void winograd_output(const C* planes, int64_t plane, int64_t count, int64_t pixels, int64_t lines, C* rows) {
  constexpr int W = M + 2;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < kPanel<C>; c += kLanes<C>) {
      Vector<C> half[M][W], from[W], to[M];
#pragma GCC unroll 6
      for (int x = 0; x < W; ++x) {
#pragma GCC unroll 6
        for (int y = 0; y < W; ++y) from[y] = load(planes + (y * W + x) * plane + r * kPanel<C> + c);
        WinogradLine<M>::output(from, to);
#pragma GCC unroll 4
        for (int y = 0; y < M; ++y) half[y][x] = to[y];
      }
#pragma GCC unroll 4
      for (int y = 0; y < M; ++y) {
        if (y >= lines) break;
        WinogradLine<M>::output(half[y], to);
#pragma GCC unroll 4
        for (int x = 0; x < M; ++x)
          if (M * r + x < pixels) store(rows + (y * pixels + M * r + x) * kPanel<C> + c, to[x]);
      }
    }
}
