// Products of float32 on AMX: each number is cut into three of bfloat16, of 8 of its 24 bits each, exactly.
//
// Of the nine products of such thirds six are summed up, the smallest first. The others are some 2^-24 of the product
// of the numbers, less than a float32 product is rounded by, and the sums are rounded like those of float32. Six
// products at 13 times the speed of AVX-512 leave a factor of two. Subnormals count as 0, thirds among them: products
// below 2^-110 are less exact.
//
// The thirds of infinity are infinity, 0 and 0, and infinity times a low third of 0 would be NaN. So where an operand
// holds what is not finite, that takes part in products of high thirds only: a plane of its own, without it, takes part
// in the others.

struct Thirds {
  __m512i high, middle, low, cross;
};

// In the upper half of each 32 bits. `sum` becomes NaN where x is not finite.
template <bool Careful>
FCB_INLINE Thirds cut(__m512 x, __m512* sum) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  const __m512i high = _mm512_and_si512(_mm512_castps_si512(x), upper);
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(high));
  const __m512i middle = _mm512_and_si512(_mm512_castps_si512(rest), upper);
  const __m512 low = _mm512_sub_ps(rest, _mm512_castsi512_ps(middle));
  if constexpr (!Careful) {
    *sum = _mm512_add_ps(*sum, low);
    return {high, middle, _mm512_castps_si512(low), high};
  } else {
    constexpr int kNan = 0x81, kNotFinite = 0x99;
    const __mmask16 finite = static_cast<__mmask16>(~_mm512_fpclass_ps_mask(x, kNotFinite));
    const __m512i nan = _mm512_set1_epi32(0x7fc00000);  // one with the bit in the upper half
    return {_mm512_mask_mov_epi32(high, _mm512_fpclass_ps_mask(x, kNan), nan), _mm512_maskz_mov_epi32(finite, middle),
            _mm512_maskz_mov_epi32(finite, _mm512_castps_si512(low)), _mm512_maskz_mov_epi32(finite, high)};
  }
}

FCB_INLINE bool is_finite(__m512 sum) { return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0; }

constexpr int64_t kThirdsDepth = 32;                        // of a tile: a chunk
constexpr int64_t kThirdsPanel = kAmxPanel * kThirdsDepth;  // elements of a plane of a right operand's chunk

// Lanes of 16 where so many elements are left.
FCB_INLINE __mmask16 lanes_in(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : first_lanes(left); }

// Left operands: plane after plane of [rows][32].
template <bool Careful>
FCB_INLINE void store_left(const Thirds& one, const Thirds& two, __m512i odd, int64_t plane, uint16_t* to) {
  _mm512_store_si512(to, _mm512_permutex2var_epi16(one.high, odd, two.high));
  _mm512_store_si512(to + plane, _mm512_permutex2var_epi16(one.middle, odd, two.middle));
  _mm512_store_si512(to + 2 * plane, _mm512_permutex2var_epi16(one.low, odd, two.low));
  if constexpr (Careful) _mm512_store_si512(to + 3 * plane, _mm512_permutex2var_epi16(one.cross, odd, two.cross));
}

FCB_INLINE __m512i odd_elements() {
  alignas(64) uint16_t odd[32];
  for (uint16_t i = 0; i < 32; ++i) odd[i] = static_cast<uint16_t>(2 * i + 1);
  return _mm512_load_si512(odd);
}

// A piece of 32 elements, of which there are `left`.
template <bool Careful>
FCB_INLINE void cut_piece(const float* from, int64_t left, __m512i odd, int64_t plane, __m512* sum, uint16_t* to) {
  const Thirds one = cut<Careful>(_mm512_maskz_loadu_ps(lanes_in(left), from), sum);
  const Thirds two = cut<Careful>(_mm512_maskz_loadu_ps(lanes_in(left - 16), from + 16), sum);
  store_left<Careful>(one, two, odd, plane, to);
}

template <bool Careful>
static bool cut_rows(const GatheredRows<float>& in, int64_t rows, uint16_t* to) {
  const __m512i odd = odd_elements();
  const int64_t plane = rows * kThirdsDepth;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t r = 0; r < in.count; ++r) {
    uint16_t* at = to + r * kThirdsDepth;
    for (int64_t t = 0; t < in.taps; ++t)
      for (int64_t k = 0; k < in.depth; k += kThirdsDepth, at += kThirdPlanes * plane)
        cut_piece<Careful>(in.rows[t * in.row_stride + r] + in.offset + k, in.depth - k, odd, plane, &sum, at);
  }
  return Careful || is_finite(sum);
}
static bool thirds_of_rows(const GatheredRows<float>& in, int64_t rows, uint16_t* to) {
  return !cut_rows<false>(in, rows, to) && cut_rows<true>(in, rows, to);
}

// Few pieces at once: the processor does not look further ahead, and tiles are to be multiplied meanwhile.
static void cut_left_step(ThirdsLeftCut* c) {
  const GatheredRows<float>& in = c->in;
  const __m512i odd = odd_elements();
  const int64_t plane = c->rows * kThirdsDepth, chunks = (in.depth + kThirdsDepth - 1) / kThirdsDepth;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < c->step && c->row < in.count; ++i) {
    uint16_t* to = c->to + c->row * kThirdsDepth;
    to += (c->tap * chunks + c->column / kThirdsDepth) * kThirdPlanes * plane;
    const float* from = in.rows[c->tap * in.row_stride + c->row] + in.offset + c->column;
    cut_piece<false>(from, in.depth - c->column, odd, plane, &sum, to);
    if ((c->column += kThirdsDepth) < in.depth) continue;
    c->column = 0;
    if (++c->tap < in.taps) continue;
    c->tap = 0;
    ++c->row;
  }
  c->careful |= !is_finite(sum);
}
static void cut_all_left(ThirdsLeftCut* c) {
  while (c->row < c->in.count) cut_left_step(c);
}

// 16 columns of 16 rows from `first` on, transposed; what is beyond them is 0.
FCB_INLINE void load_transposed(const GatheredRows<float>& in, int64_t first, int64_t column, __m512i (&v)[16]) {
  const __mmask16 columns = lanes_in(in.depth - column);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    v[i] = first + i < in.count ? _mm512_maskz_loadu_epi32(columns, in.rows[first + i] + in.offset + column)
                                : _mm512_setzero_si512();
  amx_transpose_16(v);
}

template <bool Careful>
static bool cut_columns(const GatheredRows<float>& in, int64_t rows, uint16_t* to) {
  const __m512i odd = odd_elements();
  const int64_t plane = rows * kThirdsDepth;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t first = 0; first < in.count; first += kThirdsDepth, to += kThirdPlanes * plane)
    for (int64_t c = 0; c < in.depth; c += 16) {
      __m512i one[16], two[16];
      load_transposed(in, first, c, one);
      load_transposed(in, first + 16, c, two);
      for (int i = 0; i < 16; ++i)
        store_left<Careful>(cut<Careful>(_mm512_castsi512_ps(one[i]), &sum),
                            cut<Careful>(_mm512_castsi512_ps(two[i]), &sum), odd, plane, to + (c + i) * kThirdsDepth);
    }
  return Careful || is_finite(sum);
}
static bool thirds_of_columns(const GatheredRows<float>& in, int64_t rows, uint16_t* to) {
  return !cut_columns<false>(in, rows, to) && cut_columns<true>(in, rows, to);
}

FCB_INLINE __m512i pair_up(__m512i even, __m512i odd) {
  return _mm512_or_si512(_mm512_srli_epi32(even, 16),
                         _mm512_and_si512(odd, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}

// Right operands: pairs of rows, 16 columns of them.
template <bool Careful>
FCB_INLINE void cut_pair(const float* even, const float* odd, __mmask16 columns, __m512* sum, uint16_t* to) {
  const Thirds one = cut<Careful>(_mm512_maskz_loadu_ps(even ? columns : 0, even), sum);
  const Thirds two = cut<Careful>(_mm512_maskz_loadu_ps(odd ? columns : 0, odd), sum);
  _mm512_store_si512(to, pair_up(one.high, two.high));
  _mm512_store_si512(to + kThirdsPanel, pair_up(one.middle, two.middle));
  _mm512_store_si512(to + 2 * kThirdsPanel, pair_up(one.low, two.low));
  if constexpr (Careful) _mm512_store_si512(to + 3 * kThirdsPanel, pair_up(one.cross, two.cross));
}

// Two rows of the depth, from k on.
template <bool Careful>
FCB_INLINE void cut_rows_of_panel(const float* from, int64_t ld, int64_t depth, int64_t cols, int64_t k, __m512* sum,
                                  uint16_t* to) {
  to += k / kThirdsDepth * kThirdPlanes * kThirdsPanel + k % kThirdsDepth * kAmxTile;
  const float *even = k < depth ? from + k * ld : nullptr, *odd = k + 1 < depth ? from + (k + 1) * ld : nullptr;
  for (int64_t c = 0; c < kAmxPanel; c += kAmxTile, to += kAmxTile * kThirdsDepth)
    cut_pair<Careful>(even ? even + c : nullptr, odd ? odd + c : nullptr, lanes_in(cols - c), sum, to);
}

FCB_INLINE int64_t whole_depth(int64_t depth) { return (depth + kThirdsDepth - 1) / kThirdsDepth * kThirdsDepth; }

template <bool Careful>
static bool cut_panel(const float* from, int64_t ld, int64_t depth, int64_t cols, uint16_t* to) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < whole_depth(depth); k += 2) cut_rows_of_panel<Careful>(from, ld, depth, cols, k, &sum, to);
  return Careful || is_finite(sum);
}
static bool thirds_of_panel(const float* from, int64_t ld, int64_t depth, int64_t cols, bool careful, uint16_t* to) {
  if (careful) return cut_panel<true>(from, ld, depth, cols, to);
  return !cut_panel<false>(from, ld, depth, cols, to);
}

static void cut_right_step(ThirdsRightCut* c) {
  const int64_t whole = whole_depth(c->depth), end = c->done + c->step < whole ? c->done + c->step : whole;
  __m512 sum = _mm512_setzero_ps();
  for (; c->done < end; c->done += 2) cut_rows_of_panel<false>(c->from, c->ld, c->depth, c->cols, c->done, &sum, c->to);
  c->careful |= !is_finite(sum);
}
static void cut_all_right(ThirdsRightCut* c) {
  while (c->done < whole_depth(c->depth)) cut_right_step(c);
}

// A plane of the left operand, of which 32 rows, and one of the right one; and the products of two.
FCB_INLINE void load_left(const uint16_t* rows) {
  _tile_loadd(4, rows, 64);
  _tile_loadd(5, rows + kAmxTile * kThirdsDepth, 64);
}
FCB_INLINE void load_right(const uint16_t* panel) {
  _tile_loadd(6, panel, 64);
  _tile_loadd(7, panel + kAmxTile * kThirdsDepth, 64);
}
FCB_INLINE void add_tiles(AmxFetch* ahead) {
  amx_fetch(ahead);  // a few lines at once: the loads of tiles need what holds them until they come
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Each product shares a third with the one before: 14 loads for 24 products, 16 where operands are not finite.
FCB_INLINE void add_thirds(const uint16_t* a, int64_t plane, int64_t cross_a, const uint16_t* b, int64_t cross_b,
                           AmxFetch* ahead) {
  load_left(a + cross_a);
  load_right(b + 2 * kThirdsPanel);
  add_tiles(ahead);
  load_right(b + kThirdsPanel);
  add_tiles(ahead);
  load_left(a + plane);
  add_tiles(ahead);
  load_right(b + cross_b);
  add_tiles(ahead);
  load_left(a + 2 * plane);
  add_tiles(ahead);
  if (cross_b != 0) load_right(b);
  load_left(a);
  add_tiles(ahead);
}

FCB_INLINE void move_on(AffineBlock<float>* b, int64_t rows) {
  b->z = static_cast<const float*>(b->z) + rows * b->ld_z;
  b->y = static_cast<float*>(b->y) + rows * b->ld_y;
  if (b->residual) b->residual = static_cast<const float*>(b->residual) + rows * b->ld_residual;
}

static void emit_slice(ThirdsAside* aside) {
  AffineBlock<float>& b = aside->block;
  b.rows = aside->slice < aside->rows ? aside->slice : aside->rows;
  aside->emit(b);
  aside->rows -= b.rows;
  move_on(&b, b.rows);
}
static void ask_for_slice(ThirdsAside* aside) {
  const AffineBlock<float>& b = aside->next;
  for (int64_t i = 0; i < aside->slice && aside->next_rows > 0; ++i, --aside->next_rows) {
    for (int64_t c = 0; c < b.cols; c += kLanes<float>) {
      if (!b.stream) __builtin_prefetch(static_cast<float*>(b.y) + c, 1);
      if (b.residual) __builtin_prefetch(static_cast<const float*>(b.residual) + c);
    }
    move_on(&aside->next, 1);
  }
}
static void emit_all(ThirdsAside* aside) {
  while (aside->rows > 0) emit_slice(aside);
}

FCB_INLINE void do_aside(ThirdsAside* aside) {
  if (aside->left.row < aside->left.in.count) cut_left_step(&aside->left);
  if (aside->right.done < whole_depth(aside->right.depth)) cut_right_step(&aside->right);
  if (aside->rows > 0) emit_slice(aside);
  if (aside->next_rows > 0) ask_for_slice(aside);
}

static void multiply_thirds(const ThirdsProduct& p, bool add, float* tile, int64_t ld, ThirdsAside* aside) {
  const int64_t plane = p.rows * kThirdsDepth;
  const int64_t cross_a = p.careful_left ? 3 * plane : 0, cross_b = p.careful_right ? 3 * kThirdsPanel : 0;
  const uint16_t *a = p.left, *b = p.right;
  add ? amx_load(tile, ld) : amx_zero();
  for (int64_t j = 0; j < p.chunks; ++j, a += kThirdPlanes * plane, b += kThirdPlanes * kThirdsPanel) {
    do_aside(aside);
    add_thirds(a, plane, cross_a, b, cross_b, &aside->fetch);
  }
  amx_store(tile, ld);
}
