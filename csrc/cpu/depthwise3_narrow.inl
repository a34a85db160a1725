// 3x3 depthwise convolutions whose taps are neighbours, at strides 1 and 2, read where they lie: from an image, but for
// columns beyond it, or from lines in scratch. What any number of registers shares, and the kernels for 16.
//
// Budget of 16 registers: 7 sums, a row of 3 filters, 1 or 2 inputs; or 9 sums, 3 inputs of a column, 3 of dz. So an
// input is loaded, and converted, once for the 3 multiplications by a row of filters.

FCB_INLINE bool slides(const PanelLines& in) {
  return in.taps == 9 && in.row_taps == 3 && (in.step == in.tap_step || in.step == 2 * in.tap_step);
}

// A row of the windows of output line l, from `channel` on.
template <class T>
FCB_INLINE const T* window_line(const PanelLines& in, int64_t l, int64_t row, int64_t channel) {
  return static_cast<const T*>(in.sources[9 * l + 3 * row]) + in.offset + channel;
}

// Asks for what the windows of a vector of channels step over by a column, and moves on.
template <class T, int S>
FCB_INLINE void fetch_step(const T** next, int64_t step) {
#pragma GCC unroll 4
  for (int i = 0; i < S * S; ++i, *next += step) __builtin_prefetch(*next, 0, 2);
}

// Where `vector`, of so many of channels, begins to do so.
template <class C, class T, int S>
FCB_INLINE const T* first_ahead(const PanelLines& in, int64_t vector) {
  const T* ahead = static_cast<const T*>(in.ahead ? in.ahead : in.sources[0]);
  return in.ahead ? ahead + vector * in.lines * in.columns * S * S * kLanes<C> : ahead;
}

// Columns whose sums are in registers: images are often multiples of 7 wide.
constexpr int kNarrowColumns = 7;

// Which of R columns' first and last inputs are beyond the image.
struct Beyond {
  bool first, last;
};

// sums += a row of the windows of R columns, which begin at `from`, by its filters.
template <class C, int S, int R, class T>
FCB_INLINE void add_window_row(const T* from, int64_t step, Beyond beyond, const C* filters, Vector<C> (&sums)[R]) {
  constexpr int kInputs = S * (R - 1) + 3;
  Vector<C> f[3];
#pragma GCC unroll 3
  for (int t = 0; t < 3; ++t) f[t] = load(filters + t * kDepthwisePanel);
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i, from += step) {
    asm("" : "+r"(from));  // an addition each: gcc 12 would keep all addresses of a block, on the stack
    Vector<C> x{};
    if (!(i == 0 && beyond.first) && !(i == kInputs - 1 && beyond.last)) x = load(from);
#pragma GCC unroll 3
    for (int t = 0; t < 3; ++t)
      if (i >= t && (i - t) % S == 0 && (i - t) / S < R) add_product(&sums[(i - t) / S], x, f[t]);
  }
}

// Memory to be fetched meanwhile, from first to last; the same again and again if there is none.
template <class T>
struct NarrowAhead {
  const T* next;
  bool moves;

  template <int kElements>
  FCB_INLINE_MEMBER void fetch() {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
#pragma GCC unroll 16
    for (int i = 0; i < kElements; i += kLine) __builtin_prefetch(next + i, 0, 2);
    next += moves ? kElements : 0;
  }
};

// A store waits for its line: so those that the next R columns' take are asked for.
template <int R, class T>
FCB_INLINE void fetch_next_columns(const T* to, int64_t c, int64_t ld) {
  if (c * sizeof(T) % 64 == 0)
#pragma GCC unroll 7
    for (int r = 0; r < R; ++r) __builtin_prefetch(to + (R + r) * ld, 1);
}

// What becomes of sums: rows of them are stored as they are.
template <class C, bool Streams>
struct NarrowSums {
  static constexpr bool kStreams = Streams;
  C* data;
  int64_t ld_line, ld;

  template <int R>
  FCB_INLINE_MEMBER void put(C* to, int64_t ld_to, int64_t, const Vector<C> (&sums)[R]) const {
#pragma GCC unroll 7
    for (int r = 0; r < R; ++r, to += ld_to) store(to, sums[r]);
  }
};

// Or rows of y, as GemmOutput::clamps says.
template <class C, class T, bool Bounded, bool Streams>
struct NarrowClamps {
  static constexpr bool kStreams = Streams;
  T* data;
  int64_t ld_line, ld;
  const C *mean, *scale, *beta;
  C low, high;

  template <int R>
  FCB_INLINE_MEMBER void put(T* to, int64_t ld_to, int64_t c, const Vector<C> (&sums)[R]) const {
    const Vector<C> m = load(mean + c), f = load(scale + c), b = load(beta + c);
    const Vector<C> least = broadcast(low), most = broadcast(high);
#pragma GCC unroll 7
    for (int r = 0; r < R; ++r, to += ld_to) {
      const Vector<C> y = larger(least, (sums[r] - m) * f + b);
      store(to, Bounded ? smaller(most, y) : y);
    }
  }
};

// R columns of all channels, of the windows whose rows begin at rows[].
template <class C, class T, int S, int R, class Results, class To>
FCB_INLINE void depthwise3_columns(const T* const (&rows)[3], int64_t step, int64_t cols, Beyond beyond,
                                   const C* filters, NarrowAhead<T>* ahead, const Results& results, To* to) {
  const T *row0 = rows[0], *row1 = rows[1], *row2 = rows[2];
  NarrowAhead<T> fetched = *ahead;
  constexpr bool kStreams = Results::kStreams;
  alignas(64) To buffer[kStreams ? R * kDepthwisePanel : 1];  // lines past the caches are to be whole
  for (int64_t c = 0; c < cols; c += kLanes<C>) {
    Vector<C> sums[R] = {};
    add_window_row<C, S, R>(row0 + c, step, beyond, filters + c, sums);
    add_window_row<C, S, R>(row1 + c, step, beyond, filters + 3 * kDepthwisePanel + c, sums);
    add_window_row<C, S, R>(row2 + c, step, beyond, filters + 6 * kDepthwisePanel + c, sums);
    fetched.template fetch<R * S * S* static_cast<int>(kLanes<C>)>();
    if constexpr (!kStreams) fetch_next_columns<R>(to + c, c, results.ld);
    results.template put<R>((kStreams ? buffer : to) + c, kStreams ? kDepthwisePanel : results.ld, c, sums);
  }
  *ahead = fetched;
  if constexpr (kStreams)
    for (int r = 0; r < R; ++r) stream_bytes(to + r * results.ld, buffer + r * kDepthwisePanel, cols * sizeof(To));
}

// Columns of line l from column j on: R of them at once, then what is left in smaller blocks.
template <class C, class T, int S, int R, class Results>
FCB_INLINE void depthwise3_from_column(const PanelLines& in, int64_t l, int64_t j, const C* filters,
                                       NarrowAhead<T>* ahead, const Results& results) {
  if constexpr (R > 0) {
    for (; j + R <= in.columns; j += R) {
      const int64_t at = j * in.step;
      depthwise3_columns<C, T, S, R>(
          {window_line<T>(in, l, 0, at), window_line<T>(in, l, 1, at), window_line<T>(in, l, 2, at)}, in.tap_step,
          in.cols, {in.left && j == 0, in.right && j + R == in.columns}, filters, ahead, results,
          results.data + l * results.ld_line + j * results.ld);
    }
    depthwise3_from_column<C, T, S, R / 2>(in, l, j, filters, ahead, results);
  }
}

// By value: what is stored could be the caller's.
template <class C, class T, int S, class Results>
static void depthwise3_narrow_lines(PanelLines in, const C* filters, Results results) {
  NarrowAhead<T> ahead{first_ahead<C, T, S>(in, 0), in.ahead != nullptr};
  for (int64_t l = 0; l < in.lines; ++l)
    depthwise3_from_column<C, T, S, kNarrowColumns>(in, l, 0, filters, &ahead, results);
}

template <class C, class T, class Results>
FCB_INLINE void depthwise3_narrow_lines(const PanelLines& in, const C* filters, const Results& results) {
  const auto lines =
      in.step == in.tap_step ? depthwise3_narrow_lines<C, T, 1, Results> : depthwise3_narrow_lines<C, T, 2, Results>;
  lines(in, filters, results);
}

template <class C, class T>
FCB_INLINE void depthwise3_narrow(const PanelLines& in, const C* filters, const PanelTarget<C>& out) {
  if (out.stream)
    depthwise3_narrow_lines<C, T>(in, filters, NarrowSums<C, true>{out.data, out.ld_line, out.ld_column});
  else
    depthwise3_narrow_lines<C, T>(in, filters, NarrowSums<C, false>{out.data, out.ld_line, out.ld_column});
}

template <bool Bounded, bool Streams, class C, class T>
FCB_INLINE void depthwise3_clamped(const PanelLines& in, const C* filters, const GemmOutput<C>& to) {
  const AffineBlock<C>& b = to.block;
  const NarrowClamps<C, T, Bounded, Streams> y{
      static_cast<T*>(b.y), in.columns * b.ld_y, b.ld_y, b.mean, b.scale, b.beta, to.low, to.high};
  depthwise3_narrow_lines<C, T>(in, filters, y);
}

template <class C, class T>
static void depthwise3_clamped(const PanelLines& in, const C* filters, const GemmOutput<C>& to) {
  const bool bounded = to.high < __builtin_huge_val();
  if (to.block.stream)
    bounded ? depthwise3_clamped<true, true, C, T>(in, filters, to)
            : depthwise3_clamped<false, true, C, T>(in, filters, to);
  else
    bounded ? depthwise3_clamped<true, false, C, T>(in, filters, to)
            : depthwise3_clamped<false, false, C, T>(in, filters, to);
}

// A line of windows and of dz, of a vector of channels.
template <class C, class T>
struct OuterLine {
  const T* x[3];
  const C* d;
  int64_t x_step, d_step;
};

// sums += column `i` of the line's inputs by dz of the columns that read it: through taps [First, 3), as far as those
// are every S-th one.
template <class C, int S, int First, int End, class T>
FCB_INLINE void add_outer_column(const OuterLine<C, T>& line, int64_t i, Vector<C> (&sums)[9]) {
  Vector<C> x[3];
#pragma GCC unroll 3
  for (int row = 0; row < 3; ++row) x[row] = load(line.x[row] + i * line.x_step);
#pragma GCC unroll 3
  for (int t = First; t < End; t += S) {
    const Vector<C> d = load(line.d + ((i - t) >> (S - 1)) * line.d_step);
#pragma GCC unroll 3
    for (int row = 0; row < 3; ++row) add_product(&sums[3 * row + t], x[row], d);
  }
}

// A line of `columns` windows.
template <class C, int S, class T, class F>
FCB_INLINE void add_outer_line(const OuterLine<C, T>& line, int64_t columns, Beyond beyond, F fetch,
                               Vector<C> (&sums)[9]) {
  if (columns == 0) return;
  if (!beyond.first) add_outer_column<C, S, 0, 1>(line, 0, sums);
  if constexpr (S == 1) {
    if (columns == 1) {
      add_outer_column<C, S, 1, 2>(line, 1, sums);
    } else {
      add_outer_column<C, S, 0, 2>(line, 1, sums);
      for (int64_t i = 2; i < columns; ++i) fetch(), add_outer_column<C, S, 0, 3>(line, i, sums);
      add_outer_column<C, S, 1, 3>(line, columns, sums);
    }
  } else {
    for (int64_t i = 1; i < 2 * columns - 1; i += 2) {
      fetch();
      add_outer_column<C, S, 1, 2>(line, i, sums);
      add_outer_column<C, S, 0, 3>(line, i + 1, sums);
    }
    add_outer_column<C, S, 1, 2>(line, 2 * columns - 1, sums);
  }
  if (!beyond.last) add_outer_column<C, S, 2, 3>(line, S * (columns - 1) + 2, sums);
}

// sums[9][kDepthwisePanel] += window * dz, of a vector of channels.
template <class C, class T, int S>
static void depthwise3_outer_vector(const PanelLines& in, int64_t channel, const C* const* dz, int64_t dz_offset,
                                    int64_t dz_step, C* sums) {
  Vector<C> acc[9] = {};
  const T* ahead = first_ahead<C, T, S>(in, channel / kLanes<C>);
  const int64_t ahead_step = in.ahead ? kLanes<C> : 0;
  for (int64_t l = 0; l < in.lines; ++l) {
    const OuterLine<C, T> line{
        {window_line<T>(in, l, 0, channel), window_line<T>(in, l, 1, channel), window_line<T>(in, l, 2, channel)},
        dz[l] + dz_offset + channel,
        in.tap_step,
        dz_step};
    add_outer_line<C, S>(line, in.columns, {in.left, in.right}, [&] { fetch_step<T, S>(&ahead, ahead_step); }, acc);
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    C* to = sums + t * kDepthwisePanel + channel;
    store(to, load(to) + acc[t]);
  }
}

template <class C, class T>
FCB_INLINE void depthwise3_outer_narrow(const PanelLines& in, const C* const* dz, int64_t dz_offset, int64_t dz_step,
                                        C* sums) {
  const auto add = in.step == in.tap_step ? depthwise3_outer_vector<C, T, 1> : depthwise3_outer_vector<C, T, 2>;
  for (int64_t c = 0; c < in.cols; c += kLanes<C>) add(in, c, dz, dz_offset, dz_step, sums);
}
