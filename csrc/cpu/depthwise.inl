// Depthwise convolutions on lines of panels: every row is kDepthwisePanel channels of a pixel, in scratch, whatever the
// image's layout, type and number of channels; zeros stand for padding and for channels beyond the last.

// Columns whose sums share a load of the filters: 7 x 2 vectors of 32 registers, as images are often multiples of 7
// wide; 4 x 2 of 16.
constexpr int kDepthwiseColumns = kTileRows >= 12 ? 7 : 4;
// Vectors of channels whose products with dz are summed at once, and taps: 9 x 2 sums of 32 registers, 9 of 16.
constexpr int kDepthwiseVectors = kTileRows / 6;
constexpr int kDepthwiseTaps = 9;

// Step: the distance of the columns that neighbours read where it is known, else 0.
template <class C, int R, int Step>
FCB_INLINE void depthwise_columns(const PanelLines<C>& in, const C* const* sources, int64_t at, const C* filters,
                                  C* out, int64_t ld) {
  const int64_t step = Step ? Step : in.step;
  Vector<C> acc[R][2] = {};
  for (int64_t t = 0; t < in.taps; ++t, filters += kDepthwisePanel) {
    const Vector<C> f0 = load(filters), f1 = load(filters + kLanes<C>);
    const C* a = sources[t] + at;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r][0] += load(a + r * step) * f0;
      acc[r][1] += load(a + r * step + kLanes<C>) * f1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    store(out + r * ld, acc[r][0]);
    store(out + r * ld + kLanes<C>, acc[r][1]);
  }
}

// The last columns of a line: `left` of them, fewer than kDepthwiseColumns.
template <class C, int R, int Step>
FCB_INLINE void depthwise_last_columns(const PanelLines<C>& in, const C* const* sources, int64_t at, int64_t left,
                                       const C* filters, C* out, int64_t ld) {
  if constexpr (R > 0) {
    if (left == R) return depthwise_columns<C, R, Step>(in, sources, at, filters, out, ld);
    depthwise_last_columns<C, R - 1, Step>(in, sources, at, left, filters, out, ld);
  }
}

template <class C, int Step>
static void depthwise_lines(PanelLines<C> in, const C* filters, C* out, int64_t ld_line, int64_t ld_column) {
  constexpr int R = kDepthwiseColumns;
  for (int64_t l = 0; l < in.lines; ++l) {
    const C* const* sources = in.sources + l * in.taps;
    for (int64_t v = 0; v < kDepthwisePanel; v += 2 * kLanes<C>) {
      C* to = out + l * ld_line + v;
      int64_t at = in.offset + v, c = 0;
      for (; c + R <= in.columns; c += R, at += R * in.step)
        depthwise_columns<C, R, Step>(in, sources, at, filters + v, to + c * ld_column, ld_column);
      depthwise_last_columns<C, R - 1, Step>(in, sources, at, in.columns - c, filters + v, to + c * ld_column,
                                             ld_column);
    }
  }
}

template <class C>
static void depthwise(const PanelLines<C>& in, const C* filters, C* out, int64_t ld_line, int64_t ld_column) {
  constexpr int kOne = kDepthwisePanel, kTwo = 2 * kDepthwisePanel;  // strides 1 and 2
  const auto lines = in.step == kOne   ? depthwise_lines<C, kOne>
                     : in.step == kTwo ? depthwise_lines<C, kTwo>
                                       : depthwise_lines<C, 0>;
  lines(in, filters, out, ld_line, ld_column);
}

// sums[T][panel] += for taps [first, first + T) and a few vectors of channels.
template <class C, int T>
FCB_INLINE void depthwise_outer_taps(const PanelLines<C>& in, int64_t first, const C* const* dz, int64_t dz_offset,
                                     C* sums) {
  constexpr int V = kDepthwiseVectors;
  Vector<C> acc[T][V] = {};
  for (int64_t l = 0; l < in.lines; ++l) {
    const C* x[T];
#pragma GCC unroll 9
    for (int t = 0; t < T; ++t) x[t] = in.sources[l * in.taps + first + t] + in.offset;
    const C* g = dz[l] + dz_offset;
    for (int64_t c = 0; c < in.columns; ++c, g += kDepthwisePanel)
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

template <class C, int T>
FCB_INLINE void depthwise_outer_last(const PanelLines<C>& in, int64_t first, const C* const* dz, int64_t dz_offset,
                                     C* sums) {
  if constexpr (T > 0) {
    if (in.taps - first == T) return depthwise_outer_taps<C, T>(in, first, dz, dz_offset, sums);
    depthwise_outer_last<C, T - 1>(in, first, dz, dz_offset, sums);
  }
}

template <class C>
static void depthwise_outer(const PanelLines<C>& in, const C* const* dz, int64_t dz_offset, C* sums) {
  constexpr int T = kDepthwiseTaps;
  PanelLines<C> part = in;
  for (int64_t v = 0; v < kDepthwisePanel; v += kDepthwiseVectors * kLanes<C>) {
    part.offset = in.offset + v;
    int64_t t = 0;
    for (; t + T <= in.taps; t += T)
      depthwise_outer_taps<C, T>(part, t, dz, dz_offset + v, sums + t * kDepthwisePanel + v);
    depthwise_outer_last<C, T - 1>(part, t, dz, dz_offset + v, sums + t * kDepthwisePanel + v);
  }
}

template <class C>
static void depthwise_copy(const C* from, int64_t ld, int64_t rows, int64_t cols, C* to) {
  for (int64_t r = 0; r < rows; ++r, from += ld, to += kDepthwisePanel)
    if (cols == kDepthwisePanel) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < kDepthwisePanel; v += kLanes<C>) store(to + v, load(from + v));
    } else {
      for (int64_t i = 0; i < kDepthwisePanel; ++i) to[i] = i < cols ? from[i] : C(0);
    }
}

// Channels of the input beside channels of the output, `multiplier` of them each.
template <class C>
static void depthwise_spread(const C* from, int64_t rows, int64_t cols, int64_t multiplier, C* to) {
  for (int64_t r = 0; r < rows; ++r, from += kDepthwisePanel, to += kDepthwisePanel) {
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
