// The transforms of Winograd's F(MxM, 3x3): a 3x3 filter on a window of (M + 2)^2 pixels gives MxM outputs by (M + 2)^2
// products in place of 9 M^2 (Winograd 1980; Lavin and Gray 2015). With window d, filter g and outputs y, all small
// matrices, and * element by element,
//   y = A'[(G g G') * (B' d B)]A.
// The gradient by the filter is the transpose of that: dg = G'[(B' d B) * (A dy A')]G, to be summed over windows before
// the transform by G.
// WinogradLine<M> has the products of B', G, A', A and G' with a line; here are those with both sides of a matrix.
template <int M>
struct WinogradLine;
#include "winograd2.inl"
#include "winograd4.inl"

// Transforms an In x In matrix of vectors into an Out x Out one: `line` does a column, then a row, of which only the
// first `lines` are wanted. read(y, x) has and write(y, x, v) takes the elements.
template <int In, int Out, class C, class Line, class Read, class Write>
FCB_INLINE void transform_square(Line line, Read read, Write write, int64_t lines = Out) {
  Vector<C> half[Out][In], from[In], to[Out];
#pragma GCC unroll 6
  for (int x = 0; x < In; ++x) {
#pragma GCC unroll 6
    for (int y = 0; y < In; ++y) from[y] = read(y, x);
    line(from, to);
#pragma GCC unroll 6
    for (int y = 0; y < Out; ++y) half[y][x] = to[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < Out; ++y) {
    if (y >= lines) break;
    line(half[y], to);
#pragma GCC unroll 6
    for (int x = 0; x < Out; ++x) write(y, x, to[x]);
  }
}

// Asks for the pixels of a window that the one before it has not: its last M columns.
template <int In, int M, class C>
FCB_INLINE void fetch_window(const C* const* rows, int64_t row_stride, int64_t offset) {
#pragma GCC unroll 6
  for (int y = 0; y < In; ++y)
#pragma GCC unroll 6
    for (int x = In - M; x < In; ++x) __builtin_prefetch(rows[(y * In + x) * row_stride] + offset);
}

// Channels in.offset + begin .. end of each row: `line` of squares of In x In pixels.
template <int In, int M, class C, class Line>
FCB_INLINE void channels_to_planes(const GatheredRows<C>& in, int64_t begin, int64_t end, C* planes,
                                   const PlaneLayout<C>& to, Line line) {
  for (int64_t r = 0; r < in.count; ++r, planes += to.ld)
    for_vectors<C>(end - begin, [&](auto read, auto write, int64_t c) {
      const int64_t channel = in.offset + begin + c;
      if (r + 1 < in.count) fetch_window<In, M>(in.rows + r + 1, in.row_stride, channel);
      transform_square<In, M + 2, C>(
          line, [&](int y, int x) { return read(in.rows[(y * In + x) * in.row_stride + r] + channel); },
          [&](int y, int x, Vector<C> v) { write(planes + (y * (M + 2) + x) * to.plane + c, v); });
    });
}

// A block of depth after the other, so that each plane is written from its beginning to its end.
template <int In, int M, class C, class Line>
FCB_INLINE void pixels_to_planes(const GatheredRows<C>& in, const PlaneLayout<C>& to, Line line) {
  for (int64_t k = 0; k < in.depth; k += kPlaneDepth)
    channels_to_planes<In, M>(in, k, k + kPlaneDepth < in.depth ? k + kPlaneDepth : in.depth,
                              to.planes + k / kPlaneDepth * to.block, to, line);
}

// B' d B of in.taps = (M+2)^2 pixels.
template <class C, int M>
static void winograd_window(const GatheredRows<C>& in, const PlaneLayout<C>& to) {
  pixels_to_planes<M + 2, M>(in, to, [](const auto& from, auto& to) { WinogradLine<M>::window(from, to); });
}

// A dy A' of in.taps = M^2 pixels.
template <class C, int M>
static void winograd_gradient(const GatheredRows<C>& in, const PlaneLayout<C>& to) {
  pixels_to_planes<M, M>(in, to, [](const auto& from, auto& to) { WinogradLine<M>::gradient(from, to); });
}

// G g G' of a panel of filters[9][depth][ld], the taps `tap` elements apart.
template <class C, int M, class Write>
FCB_INLINE void filters_to_planes(const C* filters, int64_t tap, int64_t ld, int64_t depth, C* planes, int64_t plane,
                                  Write write) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < kPanel<C>; c += kLanes<C>)
      transform_square<3, M + 2, C>(
          [](const auto& from, auto& to) { WinogradLine<M>::filter(from, to); },
          [&](int y, int x) { return load(filters + (3 * y + x) * tap + k * ld + c); },
          [&](int y, int x, Vector<C> v) { write(planes + (y * (M + 2) + x) * plane + k * kPanel<C> + c, v); });
}

template <class C, int M>
static void winograd_filter(const C* filters, int64_t tap, int64_t ld, int64_t depth, C* planes, int64_t plane,
                            bool streams) {
  if (!streams)
    return filters_to_planes<C, M>(filters, tap, ld, depth, planes, plane, [](C* to, Vector<C> v) { store(to, v); });
  filters_to_planes<C, M>(filters, tap, ld, depth, planes, plane, [](C* to, Vector<C> v) { stream(to, v); });
  end_streaming();
}

// filters[9][rows][panel] = G' s G of planes[(M+2)^2][rows][panel].
template <class C, int M>
static void winograd_filter_gradient(const C* planes, int64_t plane, int64_t rows, C* filters) {
  const int64_t tap = rows * kPanel<C>;
  for (int64_t i = 0; i < tap; i += kLanes<C>)
    transform_square<M + 2, 3, C>([](const auto& from, auto& to) { WinogradLine<M>::filter_gradient(from, to); },
                                  [&](int y, int x) { return load(planes + (y * (M + 2) + x) * plane + i); },
                                  [&](int y, int x, Vector<C> v) { store(filters + (3 * y + x) * tap + i, v); });
}

// A' m A of each of `count` adjacent windows of planes[(M+2)^2][count][panel]: `lines` lines, M or fewer, of `pixels`
// rows each, M * count or up to M - 1 less.
template <class C, int M>
static void winograd_output(const C* planes, int64_t plane, int64_t count, int64_t pixels, int64_t lines, C* rows) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < kPanel<C>; c += kLanes<C>)
      transform_square<M + 2, M, C>(
          [](const auto& from, auto& to) { WinogradLine<M>::output(from, to); },
          [&](int y, int x) { return load(planes + (y * (M + 2) + x) * plane + r * kPanel<C> + c); },
          [&](int y, int x, Vector<C> v) {
            if (M * r + x < pixels) store(rows + (y * pixels + M * r + x) * kPanel<C> + c, v);
          },
          lines);
}
