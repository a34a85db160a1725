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

// Calls f(output column, the window's three columns) along line `l`, from `channel` on. S: the stride.
template <class C, int S, class F>
FCB_INLINE void slide(const PanelLines<C>& in, int64_t l, int64_t channel, F f) {
  const int64_t columns = in.columns, step = in.tap_step, last = in.right ? columns - 1 : columns;
  if (columns == 0) return;
  const C* const lines[3] = {in.sources[9 * l] + in.offset + channel, in.sources[9 * l + 3] + in.offset + channel,
                             in.sources[9 * l + 6] + in.offset + channel};
  WindowColumn<C> a{}, b, c;
  if (!in.left) a = window_column(lines, 0);
  const auto next = [&](int64_t j, int64_t at) { return j == last ? WindowColumn<C>{} : window_column(lines, at); };
  if constexpr (S == 1) {
    b = window_column(lines, step);
    int64_t at = 2 * step;
    for (int64_t j = 0; j < columns; j += 3, at += 3 * step) {
      c = next(j, at);
      f(j, a, b, c);
      if (j + 1 == columns) return;
      a = next(j + 1, at + step);
      f(j + 1, b, c, a);
      if (j + 2 == columns) return;
      b = next(j + 2, at + 2 * step);
      f(j + 2, c, a, b);
    }
  } else {
    int64_t at = step;
    for (int64_t j = 0; j < columns; j += 2, at += 4 * step) {
      b = window_column(lines, at), c = next(j, at + step);
      f(j, a, b, c);
      if (j + 1 == columns) return;
      b = window_column(lines, at + 2 * step), a = next(j + 1, at + 3 * step);
      f(j + 1, c, b, a);
    }
  }
}

// Asks for what the windows of a vector of channels step over by a column, and moves on.
template <class C, int S>
FCB_INLINE void fetch_step(const C** next, int64_t step) {
#pragma GCC unroll 4
  for (int i = 0; i < S * S; ++i, *next += step) __builtin_prefetch(*next, 0, 2);
}

// Where `vector`, of so many of channels, begins to do so.
template <class C, int S>
FCB_INLINE const C* first_ahead(const PanelLines<C>& in, int64_t vector) {
  return in.ahead ? in.ahead + vector * in.lines * in.columns * S * S * kLanes<C> : in.sources[0];
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
  const C* ahead = first_ahead<C, S>(in, channel / kLanes<C>);
  const int64_t ahead_step = in.ahead ? kLanes<C> : 0;
  for (int64_t l = 0; l < in.lines; ++l) {
    C* to = out.data + l * out.ld_line + channel;
    slide<C, S>(in, l, channel, [&](int64_t j, const auto& a, const auto& b, const auto& c) {
      fetch_step<C, S>(&ahead, ahead_step);
      const Vector<C> sum = window_product(a, b, c, f);
      Stream ? stream(to + j * out.ld_column, sum) : store(to + j * out.ld_column, sum);
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
  const C* ahead = first_ahead<C, S>(in, channel / kLanes<C>);
  const int64_t ahead_step = in.ahead ? kLanes<C> : 0;
  for (int64_t l = 0; l < in.lines; ++l) {
    const C* g = dz[l] + dz_offset + channel;
    slide<C, S>(in, l, channel, [&](int64_t j, const auto& a, const auto& b, const auto& c) {
      fetch_step<C, S>(&ahead, ahead_step);
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
