// The gradients of elementwise.inl for 16-bit numbers: a cache line of 32 channels at a time, as two vectors.
//
// Budget: of bfloat16 the two are the even and the odd channels, which take a shift and a mask to widen; the first and
// the last 16 would take four operations. Two rows' sums a line do not wait for each other.
#if defined(__AVX512F__)
struct Line {
  Vector<float> half[2];
};

template <class F>
FCB_INLINE Line make_line(F f) {
  return {{f(0), f(1)}};
}

struct alignas(64) LineOrder {
  uint32_t apart[2][16], together[2][16];  // places in two vectors: of the even and odd channels; of the first and last
  uint16_t interleaved[32];
};
static constexpr LineOrder line_order() {
  LineOrder order{};
  for (uint32_t i = 0; i < 16; ++i)
    for (uint32_t h = 0; h < 2; ++h) {
      order.apart[h][i] = 2 * i + h;
      order.together[h][i] = 8 * h + i / 2 + i % 2 * 16;
      order.interleaved[2 * i + h] = static_cast<uint16_t>(i + 16 * h);
    }
  return order;
}
static constexpr LineOrder kLineOrder = line_order();

// The vectors that places of two name.
FCB_INLINE Line reorder(const Line& line, const uint32_t (&places)[2][16]) {
  return make_line([&](int h) {
    return (Vector<float>)_mm512_permutex2var_ps((__m512)line.half[0], _mm512_load_si512(places[h]),
                                                 (__m512)line.half[1]);
  });
}

FCB_INLINE Line load_line(const Half* from, const Lanes& lanes) {
  return make_line([&](int h) { return (Vector<float>)load_lanes(from + 16 * h, lanes.half[h]); });
}
FCB_INLINE Line load_line(const BFloat16* from, const Lanes& lanes) {
  const __m512i both = _mm512_maskz_loadu_epi16(lanes.all(), from);
  return {{(Vector<float>)_mm512_slli_epi32(both, 16),
           (Vector<float>)_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000)))}};
}

// Numbers of the compute type that belong to a line of T.
template <class T>
FCB_INLINE Line load_constants(const float* from, const Lanes& lanes) {
  const Line line = make_line([&](int h) { return (Vector<float>)load_lanes(from + 16 * h, lanes.half[h]); });
  if constexpr (__is_same(T, BFloat16)) return reorder(line, kLineOrder.apart);
  return line;
}
template <class T>
FCB_INLINE void store_line(Line line, const Lanes& lanes, float* to) {
  if constexpr (__is_same(T, BFloat16)) line = reorder(line, kLineOrder.together);
  for (int h = 0; h < 2; ++h) store_lanes(to + 16 * h, (__m512)line.half[h], lanes.half[h]);
}
template <class T>
FCB_INLINE void store_line(const Line& line, const Lanes& lanes, T* to, bool stream = false) {
  __m512i both = narrow((__m512)line.half[0], (__m512)line.half[1], to);
  if constexpr (__is_same(T, BFloat16))
    both = _mm512_permutexvar_epi16(_mm512_load_si512(kLineOrder.interleaved), both);
  store_32(to, both, lanes, stream);
}

// u's constants of a line of channels, and du of one of its rows.
template <class T, Activation A, Preactivation P>
struct LineGradient {
  const GradientBlock<float>& b;
  int64_t column;
  Lanes lanes;
  Line mean, scale, beta;

  LineGradient(const GradientBlock<float>& block, int64_t c)
      : b(block),
        column(c),
        lanes(lanes_of(block.cols - c)),
        mean(load_constants<T>(block.mean + c, lanes)),
        scale(load_constants<T>(block.scale + c, lanes)),
        beta(load_constants<T>(block.beta + c, lanes)) {}

  Line read(const void* data, int64_t r, int64_t ld) const {
    fetch_ahead<float, T>(data, r, ld, column);
    return load_line(row<T>(data, r, ld) + column, lanes);
  }
  Line centered(int64_t r) const {
    const Line z = read(b.z, r, b.ld_z);
    return make_line([&](int h) { return z.half[h] - mean.half[h]; });
  }
  __attribute__((always_inline)) Line du(int64_t r, const Line& centered) const {
    const Line dy = read(b.dy, r, b.ld_dy);
    if constexpr (A == Activation::kNone) {
      return dy;
    } else if constexpr (P == Preactivation::kConv) {
      return make_line(
          [&](int h) { return dy.half[h] * derivative<A, float>(centered.half[h] * scale.half[h] + beta.half[h]); });
    } else {
      const Line extra = read(b.extra, r, b.ld_extra);
      return make_line([&](int h) {
        if constexpr (P == Preactivation::kOutput) return dy.half[h] * derivative_of_output<A, float>(extra.half[h]);
        return dy.half[h] * derivative<A, float>(centered.half[h] * scale.half[h] + beta.half[h] + extra.half[h]);
      });
    }
  }
};

// Calls f for so many channels of some rows at a time, in the order of memory.
template <int64_t kColumns, class F>
FCB_INLINE void for_lines(const GradientBlock<float>& b, F f) {
  constexpr int64_t kRows = 16;
  for (int64_t first = 0; first < b.rows; first += kRows)
    for (int64_t c = 0; c < b.cols; c += kColumns) f(c, first, first + kRows < b.rows ? first + kRows : b.rows);
}

template <class T>
FCB_INLINE void add_line(const Line& line, const Lanes& lanes, float* sums) {
  const Line old = load_constants<T>(sums, lanes);
  store_line<T>(make_line([&](int h) { return old.half[h] + line.half[h]; }), lanes, sums);
}

template <class T, Activation A, Preactivation P>
static void reduce_lines(const GradientBlock<float>& block) {
  const GradientBlock<float> b = block;
  for_lines<32>(b, [&](int64_t c, int64_t first, int64_t end) {
    const LineGradient<T, A, P> line(b, c);
    Line sum_du{}, sum_du_z{}, sum_z{};
    for (int64_t r = first; r < end; ++r) {
      const Line centered = line.centered(r), du = line.du(r, centered);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        sum_du.half[h] += du.half[h];
        sum_du_z.half[h] += du.half[h] * centered.half[h];
        sum_z.half[h] += centered.half[h];
      }
    }
    add_line<T>(sum_du, line.lanes, b.sum_du + line.column);
    add_line<T>(sum_du_z, line.lanes, b.sum_du_z + line.column);
    add_line<T>(sum_z, line.lanes, b.sum_z + line.column);
  });
}

// What apply makes of a line of channels; D: of the gradient of z.
template <class T, class D, Activation A, Preactivation P>
struct LineOfConvGradient {
  LineGradient<T, A, P> line;
  Line slope, curve, offset;

  LineOfConvGradient(const GradientBlock<float>& b, int64_t c)
      : line(b, c),
        slope(load_constants<T>(b.slope + c, line.lanes)),
        curve(b.curve ? load_constants<T>(b.curve + c, line.lanes) : slope),
        offset(b.curve ? load_constants<T>(b.offset + c, line.lanes) : slope) {}
};

template <class T, class D, Activation A, Preactivation P>
FCB_INLINE void write_gradients(const LineOfConvGradient<T, D, A, P>& of, int64_t r) {
  const LineGradient<T, A, P>& line = of.line;
  const GradientBlock<float>& b = line.b;
  const Line centered = line.centered(r), du = line.du(r, centered);
  if (b.d_residual) store_line(du, line.lanes, row<T>(b.d_residual, r, b.ld_d_residual) + line.column, b.stream);
  const Line d_conv = make_line([&](int h) {
    const Vector<float> own = of.slope.half[h] * du.half[h];
    return b.curve ? own + (of.curve.half[h] * centered.half[h] + of.offset.half[h]) : own;
  });
  store_line<T>(d_conv, line.lanes, row<D>(b.d_conv, r, b.ld_d_conv) + line.column);
}

template <class T, class D, Activation A, Preactivation P>
static void apply_lines(const GradientBlock<float>& block) {
  const GradientBlock<float> b = block;
  using Gradient = LineOfConvGradient<T, D, A, P>;
  if (!b.stream || b.cols % 64 != 0) {
    for_lines<32>(b, [&](int64_t c, int64_t first, int64_t end) {
      const Gradient line(b, c);
      for (int64_t r = first; r < end; ++r) write_gradients(line, r);
    });
  } else {  // two lines at a time, which streaming stores want
    for_lines<64>(b, [&](int64_t c, int64_t first, int64_t end) {
      const Gradient one(b, c), two(b, c + 32);
      for (int64_t r = first; r < end; ++r) write_gradients(one, r), write_gradients(two, r);
    });
  }
  if (b.stream) end_streaming();
}

// du from the output.
template <class T, Activation A>
FCB_INLINE Line masked_line(const GradientBlock<float>& b, int64_t r, int64_t c, const Lanes& lanes) {
  fetch_ahead<float, T>(b.dy, r, b.ld_dy, c);
  const Line dy = load_line(row<T>(b.dy, r, b.ld_dy) + c, lanes);
  if constexpr (A == Activation::kNone) {
    return dy;
  } else {
    fetch_ahead<float, T>(b.extra, r, b.ld_extra, c);
    const Line y = load_line(row<T>(b.extra, r, b.ld_extra) + c, lanes);
    return make_line([&](int h) { return dy.half[h] * derivative_of_output<A, float>(y.half[h]); });
  }
}

// Of so many lines of channels.
template <class T, Activation A, int kLines>
FCB_INLINE void mask_columns(const GradientBlock<float>& b, int64_t c, int64_t first, int64_t end) {
  Lanes lanes[kLines];
  Line sums[kLines];
  for (int l = 0; l < kLines; ++l) lanes[l] = lanes_of(b.cols - c - 32 * l), sums[l] = Line{};
  for (int64_t r = first; r < end; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) {
      const int64_t at = c + 32 * l;
      const Line du = masked_line<T, A>(b, r, at, lanes[l]);
      for (int h = 0; h < 2; ++h) sums[l].half[h] += du.half[h];
      if (b.d_conv) store_line(du, lanes[l], row<T>(b.d_conv, r, b.ld_d_conv) + at);
      if (b.d_residual) store_line(du, lanes[l], row<T>(b.d_residual, r, b.ld_d_residual) + at, b.stream);
    }
  }
  for (int l = 0; l < kLines; ++l) add_line<T>(sums[l], lanes[l], b.sum_du + c + 32 * l);
}

template <class T, Activation A>
static void mask_lines(const GradientBlock<float>& block) {
  const GradientBlock<float> b = block;
  for_lines<64>(b, [&](int64_t c, int64_t first, int64_t end) {
    b.cols - c > 32 ? mask_columns<T, A, 2>(b, c, first, end) : mask_columns<T, A, 1>(b, c, first, end);
  });
  if (b.stream) end_streaming();
}
#endif

// The kernels of elementwise.inl or, for 16-bit numbers, these.
template <class C, class T, class Z, Activation A, Preactivation P>
static constexpr auto reduce_kernel() {
#if defined(__AVX512F__)
  if constexpr (kIsSmall<T>)
    return reduce_lines<T, A, P>;
  else
#endif
    return reduce<C, T, A, P, Z>;
}
template <class C, class T, class D, class Z, Activation A, Preactivation P>
static constexpr auto apply_kernel() {
#if defined(__AVX512F__)
  if constexpr (kIsSmall<T>)
    return apply_lines<T, D, A, P>;
  else
#endif
    return apply<C, T, D, A, P, Z>;
}
