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

// Transforms a matrix of vectors: `line` does a column, then a row, of which only the first `lines` are wanted.
// read(y, x) has and write(y, x, v) takes the elements.
template <int InY, int InX, int OutY, int OutX, class C, class Line, class Read, class Write>
FCB_INLINE void transform_matrix(Line line, Read read, Write write, int64_t lines = OutY) {
  Vector<C> half[OutY][InX], from[InY], column[OutY], to[OutX];
#pragma GCC unroll 6
  for (int x = 0; x < InX; ++x) {
#pragma GCC unroll 6
    for (int y = 0; y < InY; ++y) from[y] = read(y, x);
    line(from, column);
#pragma GCC unroll 6
    for (int y = 0; y < OutY; ++y) half[y][x] = column[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < OutY; ++y) {
    if (y >= lines) break;
    line(half[y], to);
#pragma GCC unroll 6
    for (int x = 0; x < OutX; ++x) write(y, x, to[x]);
  }
}

// Asks for the pixels of a window that the one before it has not, its columns from Old on; `rows` has Pitch pixels for
// each line of a window.
template <int Pitch, int Height, int Width, int Old, class C>
FCB_INLINE void fetch_window(const C* const* rows, int64_t row_stride, int64_t offset) {
#pragma GCC unroll 6
  for (int y = 0; y < Height; ++y)
#pragma GCC unroll 6
    for (int x = Old; x < Width; ++x) __builtin_prefetch(rows[(y * Pitch + x) * row_stride] + offset);
}

// Which of M + 2 planes in a line the n-th of `Count` goes to: all, or those of the first points and of infinity.
template <int M, int Count>
constexpr int plane_of(int n) {
  return n + 1 < Count ? n : M + 1;
}

// Channels in.offset + begin .. end of each row: `line` of matrices of InY x InX pixels, of Pitch x Pitch in the table.
template <int M, int Pitch, int InY, int InX, int OutY, int OutX, class C, class Line>
FCB_INLINE void channels_to_planes(const GatheredRows<C>& in, int64_t begin, int64_t end, C* planes,
                                   const PlaneLayout<C>& to, Line line) {
  constexpr int kOld = InX == OutX ? 2 : 0;
  for (int64_t r = 0; r < in.count; ++r, planes += to.ld)
    for_vectors<C>(end - begin, [&](auto read, auto write, int64_t c) {
      const int64_t channel = in.offset + begin + c;
      if (r + 1 < in.count) fetch_window<Pitch, InY, InX, kOld>(in.rows + r + 1, in.row_stride, channel);
      transform_matrix<InY, InX, OutY, OutX, C>(
          line, [&](int y, int x) { return read(in.rows[(y * Pitch + x) * in.row_stride + r] + channel); },
          [&](int y, int x, Vector<C> v) {
            write(planes + (plane_of<M, OutY>(y) * (M + 2) + plane_of<M, OutX>(x)) * to.plane + c, v);
          });
    });
}

// The same with few registers, which hold nothing of what the lambda has captured: only the addresses of a window's
// pixels and planes are read again for each vector, one a load or a store.
template <int M, int Pitch, int InY, int InX, int OutY, int OutX, class C, class Line>
FCB_INLINE void channels_to_planes_lean(const GatheredRows<C>& in, int64_t begin, int64_t end, C* planes,
                                        const PlaneLayout<C>& to, Line line) {
  constexpr int kOld = InX == OutX ? 2 : 0;
  constexpr int64_t kLine = 64 / sizeof(C);
  const int64_t plane = to.plane, count = in.count, channel = in.offset + begin;
  for (int64_t r = 0; r < count; ++r, planes += to.ld) {
    const C* from[InY][InX];
#pragma GCC unroll 6
    for (int y = 0; y < InY; ++y)
#pragma GCC unroll 6
      for (int x = 0; x < InX; ++x) from[y][x] = in.rows[(y * Pitch + x) * in.row_stride + r] + channel;
    for_vectors<C>(
        end - begin, [&](auto read, auto write, int64_t c) __attribute__((always_inline)) {
          if (c % kLine == 0 && r + 1 < count)
            fetch_window<Pitch, InY, InX, kOld>(in.rows + r + 1, in.row_stride, channel + c);
          C* const at = planes + c;
          transform_matrix<InY, InX, OutY, OutX, C>(
              line, [&](int y, int x) { return read(from[y][x] + c); },
              [&](int y, int x, Vector<C> v) {
                write(at + (plane_of<M, OutY>(y) * (M + 2) + plane_of<M, OutX>(x)) * plane, v);
              });
        });
  }
}

// A block of depth after the other, so that each plane is written from its beginning to its end.
template <int M, int Pitch, int InY, int InX, int OutY, int OutX, class C, class Line>
FCB_INLINE void pixels_to_planes(const GatheredRows<C>& in, const PlaneLayout<C>& to, Line line) {
  for (int64_t k = 0; k < in.depth; k += kPlaneDepth)
    if constexpr (kFewRows)
      channels_to_planes_lean<M, Pitch, InY, InX, OutY, OutX>(in, k,
                                                              k + kPlaneDepth < in.depth ? k + kPlaneDepth : in.depth,
                                                              to.planes + k / kPlaneDepth * to.block, to, line);
    else
      channels_to_planes<M, Pitch, InY, InX, OutY, OutX>(in, k, k + kPlaneDepth < in.depth ? k + kPlaneDepth : in.depth,
                                                         to.planes + k / kPlaneDepth * to.block, to, line);
}

// B' d B of in.taps = (M+2)^2 pixels, of which windows of fewer outputs than M x M take what they need.
template <class C, int M, int Height, int Width>
static void winograd_window(const GatheredRows<C>& in, const PlaneLayout<C>& to) {
  constexpr int Y = Height + 2, X = Width + 2;
  pixels_to_planes<M, M + 2, Y, X, Y, X>(in, to, [](const auto& from, auto& to) { WinogradLine<M>::window(from, to); });
}

// A dy A' of in.taps = M^2 pixels.
template <class C, int M>
static void winograd_gradient(const GatheredRows<C>& in, const PlaneLayout<C>& to) {
  pixels_to_planes<M, M, M, M, M + 2, M + 2>(in, to,
                                             [](const auto& from, auto& to) { WinogradLine<M>::gradient(from, to); });
}

// G g G' of a panel of filters[9][depth][ld], the taps `tap` elements apart.
template <class C, int M, class Write>
FCB_INLINE void filters_to_planes(const C* filters, int64_t tap, int64_t ld, int64_t depth, C* planes, int64_t plane,
                                  Write write) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < kPanel<C>; c += kLanes<C>)
      transform_matrix<3, 3, M + 2, M + 2, C>(
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

// Of the lines of G g G', two at a time: 0 and that of infinity, then those of a and -a, and so on, which share what
// they are made of. So few planes stay in an L1 of 32 KiB until they are multiplied.
template <class C, int M, int Pair>
static void winograd_filter_lines(const C* filters, int64_t tap, int64_t ld, int64_t depth, C* planes, int64_t plane) {
  constexpr int kLow = Pair == 0 ? 0 : 2 * Pair - 1, kHigh = Pair == 0 ? M + 1 : 2 * Pair;
  const auto line = [](const auto& from, auto& to) { WinogradLine<M>::filter(from, to); };
  for (int64_t k = 0; k < depth; ++k, filters += ld)
    for (int64_t c = 0; c < kPanel<C>; c += kLanes<C>) {
      Vector<C> from[3], column[M + 2], half[2][3], to[M + 2];
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) from[y] = load(filters + (3 * y + x) * tap + c);
        line(from, column);
        half[0][x] = column[kLow], half[1][x] = column[kHigh];
      }
#pragma GCC unroll 2
      for (int y = 0; y < 2; ++y) {
        line(half[y], to);
#pragma GCC unroll 6
        for (int x = 0; x < M + 2; ++x) store(planes + (y * (M + 2) + x) * plane + k * kPanel<C> + c, to[x]);
      }
    }
}

// filters[9][rows][panel] = G' s G of planes[(M+2)^2][rows][panel].
template <class C, int M>
static void winograd_filter_gradient(const C* planes, int64_t plane, int64_t rows, C* filters) {
  const int64_t tap = rows * kPanel<C>;
  for (int64_t i = 0; i < tap; i += kLanes<C>)
    transform_matrix<M + 2, M + 2, 3, 3, C>(
        [](const auto& from, auto& to) { WinogradLine<M>::filter_gradient(from, to); },
        [&](int y, int x) { return load(planes + (y * (M + 2) + x) * plane + i); },
        [&](int y, int x, Vector<C> v) { store(filters + (3 * y + x) * tap + i, v); });
}

// Those of winograd_output() that are whole, with few registers: no branch for each store.
template <class C, int M, int Height, int Width>
static void whole_outputs(const C* planes, int64_t plane, int64_t count, C* rows, int64_t pitch) {
  constexpr int Y = Height + 2, X = Width + 2;
  for (int64_t i = 0; i < count * kPanel<C>; i += kLanes<C>) {
    const C* const from = planes + i;
    C* const to = rows + (i / kPanel<C> * Width * kPanel<C> + i % kPanel<C>);
    const int64_t line = pitch * kPanel<C>;
    transform_matrix<Y, X, Height, Width, C>(
        [](const auto& from, auto& to) __attribute__((always_inline)) { WinogradLine<M>::output(from, to); },
        [&](int y, int x) __attribute__((always_inline)) {
          return load(from + (plane_of<M, Y>(y) * (M + 2) + plane_of<M, X>(x)) * plane);
        },
        [&](int y, int x, Vector<C> v) __attribute__((always_inline)) { store(to + y * line + x * kPanel<C>, v); });
  }
}

// A' m A of each of `count` adjacent windows of planes[(M+2)^2][count][panel]: `lines` lines, Height or fewer, of
// `pixels` rows each, Width * count or up to Width - 1 less; lines begin `pitch` rows apart.
template <class C, int M, int Height, int Width>
static void winograd_output(const C* planes, int64_t plane, int64_t count, int64_t pixels, int64_t lines, C* rows,
                            int64_t pitch) {
  constexpr int Y = Height + 2, X = Width + 2;
  int64_t r = 0;
  if constexpr (kFewRows) {
    if (lines == Height) r = pixels / Width, whole_outputs<C, M, Height, Width>(planes, plane, r, rows, pitch);
  }
  for (; r < count; ++r)
    for (int64_t c = 0; c < kPanel<C>; c += kLanes<C>)
      transform_matrix<Y, X, Height, Width, C>(
          [](const auto& from, auto& to) { WinogradLine<M>::output(from, to); },
          [&](int y, int x) {
            return load(planes + (plane_of<M, Y>(y) * (M + 2) + plane_of<M, X>(x)) * plane + r * kPanel<C> + c);
          },
          [&](int y, int x, Vector<C> v) {
            if (Width * r + x < pixels) store(rows + (y * pitch + Width * r + x) * kPanel<C> + c, v);
          },
          lines);
}
