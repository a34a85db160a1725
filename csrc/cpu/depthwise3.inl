// 3x3 depthwise convolutions whose taps are neighbours, at strides 1 and 2: a window of the inputs slides along a line
// in registers, so that a column loads only what is new to it, 3 or 6 vectors for 9 multiplications.
//
// Budget of 32 registers: 9 filters or 9 sums, 9 of the window, 1 or 2 more. 16 are too few.
constexpr bool kSlides = kTileRows >= 12;

template <class C>
static bool slides(const PanelLines<C>& in) {
  return kSlides && in.taps == 9 && in.row_taps == 3 && (in.step == in.tap_step || in.step == 2 * in.tap_step);
}

// A column of a window.
template <class C>
struct WindowColumn {
  Vector<C> of[3];  // lines
};

template <class C>
FCB_INLINE WindowColumn<C> window_column(const C* const (&lines)[3], int64_t at) {
  return {{load(lines[0] + at), load(lines[1] + at), load(lines[2] + at)}};
}

// Calls f(output column, the window's three columns). S: the stride; the lines' pixels are `step` apart.
template <class C, int S, class F>
FCB_INLINE void slide(const C* const (&lines)[3], int64_t step, int64_t columns, F f) {
  if (columns == 0) return;
  WindowColumn<C> a = window_column(lines, 0), b, c;
  if constexpr (S == 1) {
    b = window_column(lines, step);
    int64_t at = 2 * step;
    for (int64_t j = 0; j < columns; j += 3, at += 3 * step) {
      c = window_column(lines, at);
      f(j, a, b, c);
      if (j + 1 == columns) return;
      a = window_column(lines, at + step);
      f(j + 1, b, c, a);
      if (j + 2 == columns) return;
      b = window_column(lines, at + 2 * step);
      f(j + 2, c, a, b);
    }
  } else {
    int64_t at = step;
    for (int64_t j = 0; j < columns; j += 2, at += 4 * step) {
      b = window_column(lines, at), c = window_column(lines, at + step);
      f(j, a, b, c);
      if (j + 1 == columns) return;
      b = window_column(lines, at + 2 * step), a = window_column(lines, at + 3 * step);
      f(j + 1, c, b, a);
    }
  }
}

template <class C>
FCB_INLINE Vector<C> window_product(const WindowColumn<C>& a, const WindowColumn<C>& b, const WindowColumn<C>& c,
                                    const Vector<C> (&f)[9]) {
  Vector<C> sum = a.of[0] * f[0];
  sum += b.of[0] * f[1];
  sum += c.of[0] * f[2];
#pragma GCC unroll 2
  for (int l = 1; l < 3; ++l) {
    sum += a.of[l] * f[3 * l];
    sum += b.of[l] * f[3 * l + 1];
    sum += c.of[l] * f[3 * l + 2];
  }
  return sum;
}

// A vector of channels, from `channel` on.
template <class C, int S, bool Stream>
static void depthwise3_lines(const PanelLines<C>& in, int64_t channel, const C* filters, const PanelTarget<C>& out) {
  Vector<C> f[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) f[t] = load(filters + t * kDepthwisePanel + channel);
  const int64_t columns = in.columns, step = in.tap_step, ld = out.ld_column;
  for (int64_t l = 0; l < in.lines; ++l) {
    const C* const* sources = in.sources + l * 9;
    const int64_t at = in.offset + channel;
    const C* const lines[3] = {sources[0] + at, sources[3] + at, sources[6] + at};
    C* to = out.data + l * out.ld_line + channel;
    slide<C, S>(lines, step, columns, [&](int64_t j, const auto& a, const auto& b, const auto& c) {
      const Vector<C> sum = window_product(a, b, c, f);
      Stream ? stream(to + j * ld, sum) : store(to + j * ld, sum);
    });
  }
}

template <class C>
static void depthwise3(const PanelLines<C>& in, const C* filters, const PanelTarget<C>& out) {
  const bool one = in.step == in.tap_step;
  const auto lines = out.stream ? (one ? depthwise3_lines<C, 1, true> : depthwise3_lines<C, 2, true>)
                                : (one ? depthwise3_lines<C, 1, false> : depthwise3_lines<C, 2, false>);
  for (int64_t c = 0; c < in.cols; c += kLanes<C>) lines(in, c, filters, out);
}

// sums[9][kDepthwisePanel] += window * dz, of a vector of channels.
template <class C, int S>
static void depthwise3_outer_lines(const PanelLines<C>& in, int64_t channel, const C* const* dz, int64_t dz_offset,
                                   int64_t dz_step, C* sums) {
  Vector<C> acc[9] = {};
  const int64_t columns = in.columns, step = in.tap_step;
  for (int64_t l = 0; l < in.lines; ++l) {
    const C* const* sources = in.sources + l * 9;
    const int64_t at = in.offset + channel;
    const C* const lines[3] = {sources[0] + at, sources[3] + at, sources[6] + at};
    const C* g = dz[l] + dz_offset + channel;
    slide<C, S>(lines, step, columns, [&](int64_t j, const auto& a, const auto& b, const auto& c) {
      const Vector<C> d = load(g + j * dz_step);
#pragma GCC unroll 3
      for (int t = 0; t < 3; ++t) {
        acc[3 * t] += a.of[t] * d;
        acc[3 * t + 1] += b.of[t] * d;
        acc[3 * t + 2] += c.of[t] * d;
      }
    });
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    C* to = sums + t * kDepthwisePanel + channel;
    store(to, load(to) + acc[t]);
  }
}

template <class C>
static void depthwise3_outer(const PanelLines<C>& in, const C* const* dz, int64_t dz_offset, int64_t dz_step, C* sums) {
  const auto lines = in.step == in.tap_step ? depthwise3_outer_lines<C, 1> : depthwise3_outer_lines<C, 2>;
  for (int64_t c = 0; c < in.cols; c += kLanes<C>) lines(in, c, dz, dz_offset, dz_step, sums);
}
