// Blocks of 32 rows by 32 or 64 columns, or of 64 by 32, whose epilogue is normalization and a cheap activation: each
// is emitted line by line between the products of the next.
//
// A product takes 16 cycles of a unit of its own but 52 until it retires, and meanwhile some 190 results of vector
// instructions can be in flight, of which a line of 64 channels makes 16 to 24. So lines are spread over the products,
// a few after each; what came in greater pieces would wait in place of filling the time.

template <Activation A, bool Residual, int Panels>
class AmxLines {
 public:
  FCB_INLINE_MEMBER explicit AmxLines(const AmxEmission& e)
      : e_(e),
        z_(static_cast<const float*>(e.block.z)),
        y_(static_cast<BFloat16*>(e.block.y)),
        residual_(static_cast<const BFloat16*>(e.block.residual)),
        ahead_(reinterpret_cast<const BFloat16*>(e.ahead)),
        below_(kAmxRows * e.block.ld_y),
        line_(e.line),
        rest_(e.rows - e.line),
        wait_(e.wait) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      scale_[v] = _mm512_loadu_ps(e.block.scale + 16 * v);
      shift_[v] =
          _mm512_fnmadd_ps(_mm512_loadu_ps(e.block.mean + 16 * v), scale_[v], _mm512_loadu_ps(e.block.beta + 16 * v));
    }
  }

  // After each product.
  FCB_INLINE_MEMBER void slot(int) {
    if (--wait_ > 0) return;
    wait_ = e_.steps;
    for (int64_t i = e_.slice; i > 0 && line_ > 0; --i) emit();
  }
  FCB_INLINE_MEMBER void finish() {
    while (line_ > 0) emit();
  }

 private:
  static constexpr int kVectors = 2 * Panels;

  FCB_INLINE_MEMBER void emit() {
    __m512 u[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      u[v] = _mm512_fmadd_ps(_mm512_loadu_ps(z_ + 16 * v), scale_[v], shift_[v]);
      if constexpr (Residual) {
        const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(residual_ + 16 * v));
        u[v] = _mm512_add_ps(u[v], widen(from, residual_));
      }
      u[v] = activate_lanes<A>(u[v]);
    }
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p)
      store_32(y_ + 32 * p, narrow(u[2 * p], u[2 * p + 1], y_), {{0xffff, 0xffff}}, e_.block.stream);
    next();
  }

  FCB_INLINE_MEMBER void next() {
    if (!e_.block.stream) fetch(y_ + below_);
    z_ += Panels * kAmxPanel, y_ += e_.block.ld_y;
    if constexpr (Residual) {
      residual_ += e_.block.ld_residual;
      fetch(ahead_);
      ahead_ += e_.block.ld_residual;
    }
    if (--line_ > 0) return;
    z_ += e_.gap * Panels * kAmxPanel;
    line_ = e_.width < rest_ ? e_.width : rest_;
    rest_ -= line_;
  }

  static FCB_INLINE_MEMBER void fetch(const BFloat16* line) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) _mm_prefetch(reinterpret_cast<const char*>(line + 32 * p), _MM_HINT_T1);
  }

  const AmxEmission& e_;
  const float* z_;
  BFloat16* y_;
  const BFloat16 *residual_, *ahead_;
  int64_t below_;               // what is asked for: the line that takes its place in the next 32 rows
  int64_t line_, rest_, wait_;  // rows left of the line; behind it
  __m512 scale_[kVectors], shift_[kVectors];
};

struct AmxNothing {
  FCB_INLINE_MEMBER explicit AmxNothing(const AmxEmission&) {}
  FCB_INLINE_MEMBER void slot(int) { amx_keep_awake(); }
  FCB_INLINE_MEMBER void finish() {}
};

template <AmxOnce Once, class Emitter>
FCB_INLINE void amx_multiply_panels(const AmxLineBlocks& b, int64_t panel, int64_t end, AmxFetch* fetch,
                                    Emitter emitter) {
  const int64_t ld = (end - panel) * kAmxPanel;
  float* tile = b.tile[0];
  for (; panel < end; ++panel, tile += kAmxPanel) {
    amx_zero();
    amx_multiply_chunks<Once>(b.rows, 0, 0, b.rows.taps * b.rows.chunks, b.filters + panel * b.distance, fetch,
                              &emitter);
    amx_store(tile, ld);
  }
  emitter.finish();
}

// The same of 64 rows, by 16 columns at a time.
template <class Emitter>
FCB_INLINE void amx_multiply_tall_panels(const AmxLineBlocks& b, int64_t panel, int64_t end, AmxFetch* fetch,
                                         Emitter emitter) {
  const int64_t ld = (end - panel) * kAmxPanel;
  float* tile = b.tile[0];
  for (; panel < end; ++panel)
    for (int half = 0; half < 2; ++half, tile += kAmxTile) {
      amx_zero();
      amx_multiply_tall(b.rows, b.filters + panel * b.distance + half * b.rows.filter_half, fetch, &emitter);
      amx_store_tall(tile, ld);
    }
  emitter.finish();
}

template <class Emitter>
static void amx_multiply_block(const AmxLineBlocks& b, int64_t panel, int64_t end, AmxAside* aside) {
  if (b.rows.count > kAmxRows) return amx_multiply_tall_panels(b, panel, end, &aside->fetch, Emitter(aside->emission));
  const bool overflow = b.rows.taps > 1 && (end - panel) * b.distance > kAmxHeld;
  if (b.panels > b.width || overflow)  // rows stay in L1, for all blocks or taps, and filters pass
    amx_multiply_panels<AmxOnce::kFilters>(b, panel, end, &aside->fetch, Emitter(aside->emission));
  else if (b.rows.taps == 1)
    amx_multiply_panels<AmxOnce::kRows>(b, panel, end, &aside->fetch, Emitter(aside->emission));
  else
    amx_multiply_panels<AmxOnce::kNeither>(b, panel, end, &aside->fetch, Emitter(aside->emission));
}

template <class T>
struct AmxType {
  using Type = T;
};

// Calls f with the type of what emits the lines that are left.
template <Activation A, class F>
FCB_INLINE void amx_with_emitter(const AmxEmission& e, F f) {
  const bool one = e.block.cols == kAmxPanel;
  if (e.rows == 0)
    f(AmxType<AmxNothing>());
  else if (e.block.residual)
    one ? f(AmxType<AmxLines<A, true, 1>>()) : f(AmxType<AmxLines<A, true, 2>>());
  else
    one ? f(AmxType<AmxLines<A, false, 1>>()) : f(AmxType<AmxLines<A, false, 2>>());
}

// So that lines last as long as the products of the next block.
FCB_INLINE void amx_spread(int64_t products, AmxEmission* e) {
  e->slice = (e->rows + products - 1) / products;
  e->steps = e->wait = products > e->rows && e->rows > 0 ? products / e->rows : 1;
}

// The block's columns of the emission of all.
FCB_INLINE void amx_left_over(const AmxLineBlocks& blocks, int64_t panel, int64_t end, AmxEmission* e) {
  const AffineBlock<float>& all = blocks.emission.block;
  AffineBlock<float>& b = e->block;
  const int64_t channel = panel * kAmxPanel;
  b.cols = b.ld_z = (end - panel) * kAmxPanel;
  b.z = blocks.tile[0] + blocks.emission.row * b.ld_z;
  b.y = static_cast<BFloat16*>(all.y) + channel;
  if (all.residual) b.residual = static_cast<const BFloat16*>(all.residual) + channel;
  b.mean = all.mean + channel, b.scale = all.scale + channel, b.beta = all.beta + channel;
}

// By the same instructions as the others: which block is a thread's last must not be seen.
template <Activation A>
static void amx_finish_lines(AmxAside* aside) {
  AmxEmission& e = aside->emission;
  e.ahead = static_cast<const char*>(e.block.residual);  // nothing comes next
  amx_with_emitter<A>(e, [&](auto emitter) { typename decltype(emitter)::Type(e).finish(); });
  e.rows = 0;
}

template <Activation A>
static void amx_multiply_lines(AmxLineBlocks* blocks, AmxAside* aside) {
  if (blocks->panels == 0) return amx_finish_lines<A>(aside);
  const int64_t tiles = blocks->rows.count / kAmxTile * 2 * blocks->width;
  const int64_t products = tiles * blocks->rows.taps * blocks->rows.chunks;
  const AffineBlock<float>& all = blocks->emission.block;
  amx_spread(products, &blocks->emission);
  for (int64_t panel = 0, end; panel < blocks->panels; panel = end) {
    end = panel + blocks->width < blocks->panels ? panel + blocks->width : blocks->panels;
    const auto* const residual = static_cast<const BFloat16*>(all.residual);
    aside->emission.ahead = residual ? reinterpret_cast<const char*>(residual + panel * kAmxPanel) : nullptr;
    amx_with_emitter<A>(aside->emission, [&](auto emitter) {
      amx_multiply_block<typename decltype(emitter)::Type>(*blocks, panel, end, aside);
    });
    if (panel == 0) aside->emission = blocks->emission;
    amx_left_over(*blocks, panel, end, &aside->emission);
    float* const last = blocks->tile[0];
    blocks->tile[0] = blocks->tile[1], blocks->tile[1] = last;
  }
}
