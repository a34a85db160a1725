// Depthwise convolutions on lines in scratch: a row is the channels of a pixel, zeros stand for padding and for
// channels beyond the last, whatever the image's layout, type and number of channels.

// Columns whose sums share a load of the filters: 7 x 2 vectors of 32 registers, as images are often multiples of 7
// wide; 4 x 2 of 16.
constexpr int kDepthwiseColumns = kFewRows ? 4 : 7;
// Vectors of channels whose products with dz are summed at once, and taps: 9 x 2 sums of 32 registers, 9 of 16.
constexpr int kDepthwiseVectors = kTileRows / 6;
constexpr int kDepthwiseTaps = 9;

template <class C>
FCB_INLINE void put(const PanelTarget<C>& out, C* to, Vector<C> v) {
  out.stream ? stream(to, v) : store(to, v);
}

// R columns, V vectors of channels.
template <class C, int R, int V>
FCB_INLINE void depthwise_columns(const PanelLines& in, const void* const* sources, int64_t at, const C* filters,
                                  const PanelTarget<C>& out, C* to) {
  Vector<C> acc[R][V] = {};
  for (int64_t t = 0; t < in.taps; ++t, filters += kDepthwisePanel) {
    Vector<C> f[V];
    for (int v = 0; v < V; ++v) f[v] = load(filters + v * kLanes<C>);
    const C* a = static_cast<const C*>(sources[t]) + at;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += load(a + r * in.step + v * kLanes<C>) * f[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) put(out, to + r * out.ld_column + v * kLanes<C>, acc[r][v]);
}

// The last columns of a line: `left` of them, fewer than kDepthwiseColumns.
template <class C, int R, int V>
FCB_INLINE void depthwise_last_columns(const PanelLines& in, const void* const* sources, int64_t at, int64_t left,
                                       const C* filters, const PanelTarget<C>& out, C* to) {
  if constexpr (R > 0) {
    if (left == R) return depthwise_columns<C, R, V>(in, sources, at, filters, out, to);
    depthwise_last_columns<C, R - 1, V>(in, sources, at, left, filters, out, to);
  }
}

// V vectors of channels from channel c on.
template <class C, int V>
static void depthwise_lines(PanelLines in, int64_t c, const C* filters, PanelTarget<C> out) {
  constexpr int R = kDepthwiseColumns;
  for (int64_t l = 0; l < in.lines; ++l) {
    const void* const* sources = in.sources + l * in.taps;
    C* to = out.data + l * out.ld_line + c;
    int64_t at = in.offset + c, done = 0;
    for (; done + R <= in.columns; done += R, at += R * in.step, to += R * out.ld_column)
      depthwise_columns<C, R, V>(in, sources, at, filters + c, out, to);
    depthwise_last_columns<C, R - 1, V>(in, sources, at, in.columns - done, filters + c, out, to);
  }
}

template <class C>
static void depthwise(const PanelLines& in, const C* filters, const PanelTarget<C>& out) {
  if (slides(in)) {
    depthwise3<C, C>(in, filters, out);
  } else {
    int64_t c = 0;
    for (; c + kLanes<C> < in.cols; c += 2 * kLanes<C>) depthwise_lines<C, 2>(in, c, filters, out);
    if (c < in.cols) depthwise_lines<C, 1>(in, c, filters, out);
  }
}

// sums[T][panel] += for taps [first, first + T) and a few vectors of channels.
template <class C, int T, int V>
FCB_INLINE void depthwise_outer_taps(const PanelLines& in, int64_t first, const C* const* dz, int64_t dz_offset,
                                     int64_t dz_step, C* sums) {
  Vector<C> acc[T][V] = {};
  for (int64_t l = 0; l < in.lines; ++l) {
    const C* x[T];
#pragma GCC unroll 9
    for (int t = 0; t < T; ++t) x[t] = static_cast<const C*>(in.sources[l * in.taps + first + t]) + in.offset;
    const C* g = dz[l] + dz_offset;
    for (int64_t c = 0; c < in.columns; ++c, g += dz_step)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vector<C> d = load(g + v * kLanes<C>);
#pragma GCC unroll 9
        for (int t = 0; t < T; ++t) acc[t][v] += load(x[t] + c * in.step + v * kLanes<C>) * d;
      }
  }
#pragma GCC unroll 9
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) {
      C* to = sums + t * kDepthwisePanel + v * kLanes<C>;
      store(to, load(to) + acc[t][v]);
    }
}

template <class C, int T, int V>
FCB_INLINE void depthwise_outer_last(const PanelLines& in, int64_t first, const C* const* dz, int64_t dz_offset,
                                     int64_t dz_step, C* sums) {
  if constexpr (T > 0) {
    if (in.taps - first == T) return depthwise_outer_taps<C, T, V>(in, first, dz, dz_offset, dz_step, sums);
    depthwise_outer_last<C, T - 1, V>(in, first, dz, dz_offset, dz_step, sums);
  }
}

template <class C, int V>
static void depthwise_outer_vectors(const PanelLines& in, const C* const* dz, int64_t dz_offset, int64_t dz_step,
                                    C* sums) {
  constexpr int T = kDepthwiseTaps;
  int64_t t = 0;
  for (; t + T <= in.taps; t += T)
    depthwise_outer_taps<C, T, V>(in, t, dz, dz_offset, dz_step, sums + t * kDepthwisePanel);
  depthwise_outer_last<C, T - 1, V>(in, t, dz, dz_offset, dz_step, sums + t * kDepthwisePanel);
}

template <class C>
static void depthwise_outer(const PanelLines& in, const C* const* dz, int64_t dz_offset, int64_t dz_step, C* sums) {
  if (slides(in)) return depthwise3_outer<C, C>(in, dz, dz_offset, dz_step, sums);
  constexpr int V = kDepthwiseVectors;
  PanelLines part = in;
  for (int64_t c = 0; c < in.cols; c += V * kLanes<C>) {
    part.offset = in.offset + c;
    const auto vectors = in.cols - c <= kLanes<C> ? depthwise_outer_vectors<C, 1> : depthwise_outer_vectors<C, V>;
    vectors(part, dz, dz_offset + c, dz_step, sums + c);
  }
}

template <class C>
static void depthwise_copy(const C* from, int64_t ld, int64_t rows, int64_t cols, C* to, int64_t ld_to, int64_t width) {
  const int64_t ahead = fetch_distance<C>(ld);
  for (int64_t r = 0; r < rows; ++r, from += ld, to += ld_to) {
    for_vectors<C>(cols, [&](auto read, auto write, int64_t c) {
      __builtin_prefetch(from + c + ahead);
      write(to + c, read(from + c));
    });
    for (int64_t c = cols; c < width; ++c) to[c] = C(0);
  }
}

// Channels of the input beside channels of the output, `multiplier` of them each.
template <class C>
static void depthwise_spread(const C* from, int64_t rows, int64_t cols, int64_t multiplier, C* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; ++r, from += kDepthwisePanel, to += ld_to) {
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t m = 0; m < multiplier; ++m) to[c * multiplier + m] = from[c];
    for (int64_t i = cols * multiplier; i < kDepthwisePanel; ++i) to[i] = C(0);
  }
}

template <class C>
static void depthwise_fold(C* block, int64_t rows, int64_t cols, int64_t multiplier) {
  for (int64_t r = 0; r < rows; ++r, block += kDepthwisePanel)
    for (int64_t c = 0; c < cols; ++c) {
      C sum = block[c * multiplier];
      for (int64_t m = 1; m < multiplier; ++m) sum += block[c * multiplier + m];
      block[c] = sum;
    }
}
