// What an instruction set offers: tables of functions on small blocks that lie in cache. They see pointers, counts and
// leading dimensions, never images, strides or padding. Only plain structs here: each instruction set's unit includes
// this file, and nothing that it compiles may be linked into code for another one.
//
// A block is a row-major matrix: a row is a pixel, a column a channel, ld the distance of rows in elements. C is the
// compute type, float or double.
#pragma once

#include <stdint.h>

#include "../activation.h"
#include "amx_kernels.h"
#include "elementwise_blocks.h"
#include "plane_kernels.h"

namespace fusedconvbn {

template <class C>
struct Stretch {
  const C *begin = nullptr, *end = nullptr;
};

// The numbers in rows of memory.
enum class RowType { kCompute, kFloat16, kBFloat16 };

template <class C>
static inline int64_t bytes_of(RowType type) {
  return type == RowType::kCompute ? sizeof(C) : sizeof(uint16_t);
}

// Rows of another type that gemm converts just before it reads them, a tile's at a time: row r from from[r] to
// to + r * ld, both to be offset as in GatheredRows.
template <class C>
struct RowConversion {
  const void* const* from = nullptr;
  C* to = nullptr;
  int64_t ld = 0;
  // null: there is nothing to be converted. As StorageKernels::load_rows.
  void (*load)(const void* const* from, int64_t offset, int64_t rows, int64_t cols, C* to, int64_t ld) = nullptr;
};

// Row r of tap t starts at rows[t * row_stride + r] + offset and has `depth` elements.
template <class C>
struct GatheredRows {
  const C* const* rows;
  int64_t row_stride, count, taps, depth, offset;
  Stretch<C> ahead[3] = {};       // gemm: memory to be fetched meanwhile, evenly
  RowConversion<C> conversion{};  // gemm: of the rows of the only tap
};

// Columns of filters: rows [taps][depth], one every `ld` elements.
template <class C>
struct Filters {
  const C* rows;
  int64_t columns;  // a multiple of `lanes`
  int64_t ld = columns;
};

// Memory that the next block will read. A kernel asks for a line of it every `steps` steps of its own, so that few are
// in flight at once and the multiplications do not wait; it moves on `row` and `line`. Line after line, since a stream
// is what the hardware walks to the next page for: with every other line missing, the multiplications wait for that.
template <class C>
struct Ahead {
  static constexpr int64_t kLine = 64 / sizeof(C);  // elements
  const C* const* rows;                             // [count], each of `lines` lines from `offset` on
  int64_t offset, count, lines, steps;
  int64_t row, line;
};

template <class C>
static inline Ahead<C> ahead_of(const C* const* rows, int64_t offset, int64_t count, int64_t elements) {
  return {rows, offset, count, (elements + Ahead<C>::kLine - 1) / Ahead<C>::kLine, 1, 0, 0};
}

// Windows of consecutive positions: element k of that of position r lies at from + offsets[k] + r.
template <class C>
struct ShiftedRows {
  const C* from;
  const int64_t* offsets;  // [depth]
  int64_t depth, count;
};

// Columns [column, column + count) of a tile: column c of row r is to be added to to[r][position + c - column], if that
// is not null.
template <class C>
struct ColumnSegment {
  int64_t column, count, position;
  C* const* to;
};
// The segments of a tile whose row 0 is `row` to them, and which has `rows`.
template <class C>
struct ColumnSegments {
  const ColumnSegment<C>* segments;
  int64_t count, row, rows;
};

constexpr int64_t kDepthwisePanel = 32;  // channels of a row in depthwise kernels, whatever the vectors

// Lines of a depthwise convolution. Tap t of column c of line l reads `cols` channels at sources[l * taps + t] + offset
// + c * step, in whole vectors. Taps come in lines of `row_taps`, of which each lies tap_step behind the last. The
// kernel says what type they point to; offsets and steps are elements of it.
struct PanelLines {
  const void* const* sources;
  int64_t lines, columns, taps, row_taps, tap_step, step, offset, cols;
  // Of 3x3 windows of neighbours, at strides 1 and 2 (depthwise3.inl). Whether the first column of the first window,
  // and the last one of the last, are beyond the image: zeros, not to be read.
  bool left = false, right = false;
  const void* ahead = nullptr;  // memory to be fetched meanwhile: as many elements as the windows step over
};

// Where the result of line l and column c goes: at data + l * ld_line + c * ld_column, in whole vectors.
template <class C>
struct PanelTarget {
  C* data;
  int64_t ld_line, ld_column;
  bool stream;  // past the caches; whole aligned vectors
};

// Where gemm leaves its sums, and what it makes of them a few rows at a time.
template <class C>
struct GemmOutput {
  C* tile;                                        // [count][columns]
  bool keep = true;                               // the sums are to be left there; else it is scratch
  void (*emit)(const AffineBlock<C>&) = nullptr;  // may be null
  AffineBlock<C> block{};                         // for `emit`; its z and rows are gemm's
  bool add = false;                               // to the sums that the tile has
  // Whether `emit` is y = min(max((z - mean) * scale + beta, low), high), NaN where that is NaN: then whole tiles need
  // no `emit`. With a residual, which is added to the sum, only where ComputeKernels::clamps_residual says so.
  bool clamps = false;
  C low = 0, high = 0;
  int activation = -1;               // whose affine_of_tile `emit` is, if it is one
  RowType rows = RowType::kCompute;  // of y and the residual
};

// sums[rows][columns] += a' b, of `depth` rows of a and b; `ahead` may be null.
template <class C>
struct ProductKernel {
  int64_t rows, columns;
  void (*add)(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t depth, C* sums, int64_t ld, Ahead<C>* ahead);
};

struct PairKernels;    // pairs.h
struct ThirdsKernels;  // thirds.h

template <class C>
struct ComputeKernels {
  int64_t panel;         // columns of a packed filter panel and of a tile
  int64_t outer_rows;    // rows of an outer-product tile
  int64_t lanes;         // of a vector
  int64_t gemm_columns;  // at most
  int64_t l2;            // bytes a core: a constant, for a plan is not to be that of its machine
  bool clamps_residual;  // see GemmOutput::clamps
  bool fetches_results;  // whether a convolution asks for the memory of the next block's results

  // tile[count][columns] = sum over taps and depth of rows * filters. What it streams is ordered by end_streaming().
  void (*gemm)(const GatheredRows<C>& rows, const Filters<C>& filters, const GemmOutput<C>& to);
  void (*end_streaming)();
  // tile[rows][panel] = the sum over depth of a[depth][outer_rows]' * b[depth][panel], or that added to it; rows <=
  // outer_rows, and the tile's other rows may change. `ahead` may be null.
  void (*outer)(const C* a, const C* b, int64_t depth, int64_t rows, bool add, C* tile, Ahead<C>* ahead);
  // Operands of outer: the `valid` elements at rows[i] + offset, i < count, and zeros up to a whole panel, in panels of
  // outer_rows or of `panel` elements: element c of row i at packed[c / width * panel + i * width + c % width].
  void (*pack_rows)(const C* const* rows, int64_t offset, int64_t count, int64_t valid, C* packed, int64_t panel);
  void (*pack_columns)(const C* const* rows, int64_t offset, int64_t count, int64_t valid, C* packed, int64_t panel);
  // packed[depth][panel] = from[rows][depth]' and columns of zeros, rows <= panel, a multiple of `lanes`.
  void (*transpose)(const C* from, int64_t ld, int64_t rows, int64_t depth, C* packed, int64_t panel);

  // few_channels.inl. to[planes][ld] = from[columns][planes]', the last column in part: `elements` in all.
  void (*split)(const C* from, int64_t elements, int64_t planes, C* to, int64_t ld);
  // As gemm, of rows * filters[depth][panel].
  void (*multiply_shifted)(const ShiftedRows<C>& rows, const C* filters, const GemmOutput<C>& to);
  // to[count][ld] = the windows of in.rows, tap after tap, and zeros.
  void (*copy_windows)(const GatheredRows<C>& in, C* to, int64_t ld);
  // Adds the tile a[depth][outer_rows]' * b[depth][panel] to where `to` says.
  void (*add_columns)(const C* a, int64_t lda, const C* b, int64_t depth, const ColumnSegments<C>& to);

  // Depthwise, on up to kDepthwisePanel channels, element by element. out = sum over taps of rows *
  // filters[taps][kDepthwisePanel]; what it streams is ordered by end_streaming().
  void (*depthwise)(const PanelLines& in, const C* filters, const PanelTarget<C>& out);
  // The same of 3x3 windows of neighbours (depthwise3_narrow.inl), straight to y: line after line, as to.clamps says.
  // May be null.
  void (*depthwise_clamped)(const PanelLines& in, const C* filters, const GemmOutput<C>& to);
  // sums[taps][kDepthwisePanel] += sum over lines and columns of rows * the row at dz[l] + dz_offset + c * dz_step.
  void (*depthwise_outer)(const PanelLines& in, const C* const* dz, int64_t dz_offset, int64_t dz_step, C* sums);
  // to[rows][ld_to] = the `cols` channels at from + r * ld, then zeros up to `width`.
  void (*depthwise_copy)(const C* from, int64_t ld, int64_t rows, int64_t cols, C* to, int64_t ld_to, int64_t width);
  // to[rows][ld_to] = each of the `cols` channels of from[rows][kDepthwisePanel] `multiplier` times, then zeros up to
  // kDepthwisePanel.
  void (*depthwise_spread)(const C* from, int64_t rows, int64_t cols, int64_t multiplier, C* to, int64_t ld_to);
  // In place, rows of kDepthwisePanel: channel c < cols of a row = the sum of its channels
  // [c * multiplier, (c + 1) * multiplier).
  void (*depthwise_fold)(C* block, int64_t rows, int64_t cols, int64_t multiplier);

  // One plane: a[depth / kPlaneDepth][rows][kPlaneDepth] * b[depth][panel]; lda is the distance of blocks, ldb the
  // panel.
  void (*multiply_plane)(const Planes<C>&);
  // Many planes, of outer_rows or fewer and of no more than kPlaneDepth, where b lies in L1. Null where the vectors are
  // so wide, and L2 so near to them, that nothing is won.
  void (*multiply_low_planes)(const Planes<C>&);
  // a[plane][depth][rows]' * b[plane][depth][panel].
  void (*multiply_transposed_planes)(const Planes<C>&);
  WinogradKernels<C> winograd2, winograd4;

  void (*moments)(const C* block, int64_t ld, int64_t rows, int64_t cols, const ColumnMoments<C>& to);
  // to[count] = 1 / sqrt(variance + epsilon), computed in double.
  void (*inverse_deviations)(const C* variance, double epsilon, int64_t count, C* to);

  // pointwise.inl. mean[depth] of in.count rows; centered[count][ld] = rows - mean; du, null for activations whose
  // derivative does not follow from y.
  void (*row_means)(const GatheredRows<C>& in, C* mean);
  void (*center_rows)(const GatheredRows<C>& in, const C* mean, C* centered, int64_t ld);
  ProductKernel<C> product[3];  // of 1, 2 and 3 vectors of columns, or 2, 2 and 3; the second has outer_rows x panel
  void (*mask[kActivationCount])(const MaskBlock<C>&);

  void (*affine[kActivationCount])(const AffineBlock<C>&);
  // The same, ordered by end_streaming(); and y = z.
  void (*emit[kActivationCount])(const AffineBlock<C>&);
  void (*emit_sums)(const AffineBlock<C>&);
  void (*reduce[kActivationCount][3])(const GradientBlock<C>&);  // [activation][Preactivation]
  void (*apply[kActivationCount][3])(const GradientBlock<C>&);
  // The same of z in bfloat16; null for double.
  void (*reduce_rounded[kActivationCount][3])(const GradientBlock<C>&);
  void (*apply_rounded[kActivationCount][3])(const GradientBlock<C>&);

  AmxKernels amx;               // null but for float on AMX
  const ThirdsKernels* thirds;  // null but for float on AMX
  const PairKernels* pairs;     // null but for float with AVX-512, and where the compiler knows AVX512_BF16
};

// What is computed element by element on blocks of 16-bit numbers that lie in memory with their channels consecutive.
// All pointers of AffineBlock and GradientBlock are to that type, but those that a kernel's comment names.
template <class C>
struct InPlaceKernels {
  void (*affine[kActivationCount])(const AffineBlock<C>&);
  void (*affine_of_tile[kActivationCount])(const AffineBlock<C>&);  // z is of C; ordered by end_streaming()
  void (*emit_sums)(const AffineBlock<C>&);                         // y = z of C; ordered by end_streaming()
  void (*reduce[kActivationCount][3])(const GradientBlock<C>&);
  void (*apply[kActivationCount][3])(const GradientBlock<C>&);  // d_conv is of C
  // Stores a block and leaves in it what was stored.
  void (*round)(C* block, int64_t ld, int64_t rows, int64_t cols, void* memory, int64_t ld_memory, bool stream);
  // As those of ComputeKernels, of 3x3 windows of neighbours; only what the windows read, and y, is of the 16-bit type.
  void (*depthwise)(const PanelLines& in, const C* filters, const PanelTarget<C>& out);
  void (*depthwise_clamped)(const PanelLines& in, const C* filters, const GemmOutput<C>& to);
  void (*depthwise_outer)(const PanelLines& in, const C* const* dz, int64_t dz_offset, int64_t dz_step, C* sums);
};

// Between memory of a data type and blocks of its compute type. Element (pixel, channel) of the memory is at
// pixel * pixel_stride + channel * channel_stride. `stream` as in AffineBlock.
template <class C>
struct StorageKernels {
  void (*load)(const void* memory, int64_t pixel_stride, int64_t channel_stride, int64_t rows, int64_t cols, C* block,
               int64_t ld);
  void (*store)(const C* block, int64_t ld, int64_t rows, int64_t cols, void* memory, int64_t pixel_stride,
                int64_t channel_stride, bool stream);
  // to[rows][ld] = `cols` elements of each row, those at from[row] + offset.
  void (*load_rows)(const void* const* from, int64_t offset, int64_t rows, int64_t cols, C* to, int64_t ld);
  InPlaceKernels<C> in_place;  // null where there are none
};

struct KernelSet {
  ComputeKernels<float> f32;
  ComputeKernels<double> f64;
  StorageKernels<float> float32, float16, bfloat16;
  StorageKernels<double> float64;
};

extern const KernelSet kKernelsGeneric;
#if defined(__x86_64__)
extern const KernelSet kKernelsAvx2, kKernelsAvx512, kKernelsAmx;
#endif

}  // namespace fusedconvbn
