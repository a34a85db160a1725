// 3x3 depthwise convolutions as depthwise3_narrow.inl says, where there are 32 registers: a window of the inputs slides
// along a line in them, so that a column loads only what is new to it, 3 or 6 vectors for 9 multiplications.
//
// Budget: 9 filters or 9 sums, 9 of the window, or 12 to 15 of those of two lines, which share theirs; 1 or 2 more.
//
// T: of memory. 16-bit numbers are converted as they are loaded; two lines at once convert those that they share once.

// Whether two lines are worth it: where loads cost conversions.
template <class C, class T>
constexpr bool kPairs = !__is_same(C, T);

// A column of R lines.
template <class C, int R>
struct WindowColumn {
  Vector<C> of[R];
};

template <class C, class T, int R>
FCB_INLINE WindowColumn<C, R> window_column(const T* const (&lines)[R], int64_t at) {
  WindowColumn<C, R> column;
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r) column.of[r] = load(lines[r] + at);
  return column;
}

// Calls f(output column, the windows' three columns) along R lines, from `channel` on. S: the stride.
template <class C, int S, class T, int R, class F>
FCB_INLINE void slide(const PanelLines& in, const T* const (&lines)[R], F f) {
  using Column = WindowColumn<C, R>;
  const int64_t columns = in.columns, step = in.tap_step, last = in.right ? columns - 1 : columns;
  if (columns == 0) return;
  Column a{}, b, c;
  if (!in.left) a = window_column<C>(lines, 0);
  const auto next = [&](int64_t j, int64_t at) { return j == last ? Column{} : window_column<C>(lines, at); };
  if constexpr (S == 1) {
    b = window_column<C>(lines, step);
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
      b = window_column<C>(lines, at), c = next(j, at + step);
      f(j, a, b, c);
      if (j + 1 == columns) return;
      b = window_column<C>(lines, at + 2 * step), a = next(j + 1, at + 3 * step);
      f(j + 1, c, b, a);
    }
  }
}

// Of the windows that begin with row `first` of the columns.
template <class C, int R>
FCB_INLINE Vector<C> window_product(const WindowColumn<C, R>& a, const WindowColumn<C, R>& b,
                                    const WindowColumn<C, R>& c, int first, const Vector<C> (&f)[9]) {
  Vector<C> sum = a.of[first] * f[0];
  sum += b.of[first] * f[1];
  sum += c.of[first] * f[2];
#pragma GCC unroll 2
  for (int l = 1; l < 3; ++l) {
    sum += a.of[first + l] * f[3 * l];
    sum += b.of[first + l] * f[3 * l + 1];
    sum += c.of[first + l] * f[3 * l + 2];
  }
  return sum;
}

// The rows of L output lines' windows, which share them, from line l on.
template <class T, int S, int L>
struct WindowLines {
  static constexpr int kRows = S * (L - 1) + 3;
  const T* rows[kRows];
};

template <class T, int S, int L>
FCB_INLINE WindowLines<T, S, L> window_lines(const PanelLines& in, int64_t l, int64_t channel) {
  WindowLines<T, S, L> lines;
#pragma GCC unroll 5
  for (int r = 0; r < lines.kRows; ++r)
    lines.rows[r] = r < 3 ? window_line<T>(in, l, r, channel) : window_line<T>(in, l + 1, r - S, channel);
  return lines;
}

// A vector of channels of L output lines, whose windows share rows, from line l on.
template <class C, class T, int S, int L, bool Stream>
FCB_INLINE void depthwise3_line(const PanelLines& in, int64_t l, int64_t channel, const Vector<C> (&f)[9],
                                const T** ahead, const PanelTarget<C>& out) {
  C* const to = out.data + l * out.ld_line + channel;
  const int64_t ahead_step = in.ahead ? L * kLanes<C> : 0;
  slide<C, S>(in, window_lines<T, S, L>(in, l, channel).rows,
              [&](int64_t j, const auto& a, const auto& b, const auto& c) {
                fetch_step<T, S>(ahead, ahead_step);
#pragma GCC unroll 2
                for (int i = 0; i < L; ++i) {
                  const Vector<C> sum = window_product<C>(a, b, c, i * S, f);
                  C* const at = to + i * out.ld_line + j * out.ld_column;
                  Stream ? stream(at, sum) : store(at, sum);
                }
              });
}

// Whether the windows of line l + 1 begin S rows below those of line l.
template <int S>
FCB_INLINE bool shares_rows(const PanelLines& in, int64_t l) {
  const void* const* of = in.sources + 9 * l;
  return l + 1 < in.lines && of[9] == of[3 * S] && (S == 2 || of[12] == of[6]);
}

// A vector of channels, from `channel` on.
template <class C, class T, int S, bool Stream>
static void depthwise3_lines(const PanelLines& in, int64_t channel, const C* filters, const PanelTarget<C>& out) {
  Vector<C> f[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) f[t] = load(filters + t * kDepthwisePanel + channel);
  const T* ahead = first_ahead<C, T, S>(in, channel / kLanes<C>);
  int64_t l = 0;
  while (l < in.lines)
    if (kPairs<C, T> && shares_rows<S>(in, l))
      depthwise3_line<C, T, S, 2, Stream>(in, l, channel, f, &ahead, out), l += 2;
    else
      depthwise3_line<C, T, S, 1, Stream>(in, l, channel, f, &ahead, out), ++l;
}

template <class C, class T>
static void depthwise3(const PanelLines& in, const C* filters, const PanelTarget<C>& out) {
  if constexpr (kFewRows) return depthwise3_narrow<C, T>(in, filters, out);
  const bool one = in.step == in.tap_step;
  const auto lines = out.stream ? (one ? depthwise3_lines<C, T, 1, true> : depthwise3_lines<C, T, 2, true>)
                                : (one ? depthwise3_lines<C, T, 1, false> : depthwise3_lines<C, T, 2, false>);
  for (int64_t c = 0; c < in.cols; c += kLanes<C>) lines(in, c, filters, out);
}

// sums += windows * the rows at dz[l] + dz_offset, of a vector of channels of L output lines, as depthwise3_line.
template <class C, class T, int S, int L>
FCB_INLINE void depthwise3_outer_line(const PanelLines& in, int64_t l, int64_t channel, const C* const* dz,
                                      int64_t dz_offset, int64_t dz_step, const T** ahead, Vector<C> (&sums)[9]) {
  const int64_t ahead_step = in.ahead ? L * kLanes<C> : 0;
  slide<C, S>(in, window_lines<T, S, L>(in, l, channel).rows,
              [&](int64_t j, const auto& a, const auto& b, const auto& c) {
                fetch_step<T, S>(ahead, ahead_step);
#pragma GCC unroll 2
                for (int i = 0; i < L; ++i) {
                  const Vector<C> d = load(dz[l + i] + dz_offset + channel + j * dz_step);
#pragma GCC unroll 3
                  for (int t = 0; t < 3; ++t) {
                    sums[3 * t] += a.of[i * S + t] * d;
                    sums[3 * t + 1] += b.of[i * S + t] * d;
                    sums[3 * t + 2] += c.of[i * S + t] * d;
                  }
                }
              });
}

// sums[9][kDepthwisePanel] += window * dz, of a vector of channels.
template <class C, class T, int S>
static void depthwise3_outer_lines(const PanelLines& in, int64_t channel, const C* const* dz, int64_t dz_offset,
                                   int64_t dz_step, C* sums) {
  Vector<C> acc[9] = {};
  const T* ahead = first_ahead<C, T, S>(in, channel / kLanes<C>);
  int64_t l = 0;
  while (l < in.lines)
    if (kPairs<C, T> && shares_rows<S>(in, l))
      depthwise3_outer_line<C, T, S, 2>(in, l, channel, dz, dz_offset, dz_step, &ahead, acc), l += 2;
    else
      depthwise3_outer_line<C, T, S, 1>(in, l, channel, dz, dz_offset, dz_step, &ahead, acc), ++l;
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    C* to = sums + t * kDepthwisePanel + channel;
    store(to, load(to) + acc[t]);
  }
}

template <class C, class T>
static void depthwise3_outer(const PanelLines& in, const C* const* dz, int64_t dz_offset, int64_t dz_step, C* sums) {
  if constexpr (kFewRows) return depthwise3_outer_narrow<C, T>(in, dz, dz_offset, dz_step, sums);
  const auto lines = in.step == in.tap_step ? depthwise3_outer_lines<C, T, 1> : depthwise3_outer_lines<C, T, 2>;
  for (int64_t c = 0; c < in.cols; c += kLanes<C>) lines(in, c, dz, dz_offset, dz_step, sums);
}
