// What backward of 1x1 convolutions multiplies: blocks of pixels by filters, and by each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "image.h"
#include "kernels.h"
#include "lines_ahead.h"

namespace fusedconvbn {

// The leading dimension of blocks that products read by rows and by columns: whole tiles, which read less than 64
// elements beyond the last channel; in lines of the cache an odd number, so that few rows share a set.
template <class C>
int64_t padded_columns(int64_t channels) {
  constexpr int64_t kLine = 64 / sizeof(C), kBeyond = 48;
  return (ceil_div(channels + kBeyond, kLine) | 1) * kLine;
}

// Zeros what products read of such a block beyond its channels.
template <class C>
void clear_padding(C* block, int64_t rows, int64_t channels) {
  const int64_t ld = padded_columns<C>(channels);
  for (int64_t r = 0; r < rows; ++r) std::fill(block + r * ld + channels, block + (r + 1) * ld, C(0));
}

// A row of all ranges' sums, which lie `distance` apart: added, in their order, to the first one's.
template <class C>
void add_ranges(int64_t ranges, int64_t distance, int64_t columns, C* sums) {
  for (int64_t range = 1; range < ranges; ++range)
    for (int64_t k = 0; k < columns; ++k) sums[k] += sums[range * distance + k];
}

// Columns of a convolution with 1x1 filters that gemm computes at once: nearly equal panels.
struct ColumnPanel {
  int64_t column, cols, width;  // width: whole vectors
};
template <class C>
ColumnPanel column_panel(const ComputeKernels<C>& k, int64_t columns, int64_t index) {
  const int64_t panels = ceil_div(columns, k.gemm_columns),
                width = ceil_div(ceil_div(columns, panels), k.lanes) * k.lanes;
  const int64_t column = index * width, cols = std::min(width, columns - column);
  return {column, cols, ceil_div(cols, k.lanes) * k.lanes};
}

// The kernel whose tiles compute the fewest elements in vain; the wider one where two are equal: it loads less.
template <class C>
const ProductKernel<C>& fittest_product(const ComputeKernels<C>& k, int64_t rows, int64_t columns) {
  const auto elements = [&](const ProductKernel<C>& p) {
    return ceil_div(rows, p.rows) * p.rows * ceil_div(columns, p.columns) * p.columns;
  };
  return *std::min_element(std::rbegin(k.product), std::rend(k.product),
                           [&](const auto& a, const auto& b) { return elements(a) < elements(b); });
}

// Two blocks of `depth` pixels, and where their product is added: as many rows and columns as they have channels, and
// whatever whole tiles add.
template <class C>
struct ProductOf {
  const C* x;
  int64_t ld_x, rows;
  const C* y;
  int64_t ld_y, columns;
  int64_t depth;
  C* sums;
  int64_t ld;
};

// Asks for `lines` meanwhile.
template <class C>
void add_product(const ProductKernel<C>& kernel, const ProductOf<C>& p, LinesAhead<C>* lines) {
  const int64_t tiles = ceil_div(p.rows, kernel.rows) * ceil_div(p.columns, kernel.columns);
  lines->spread(tiles * p.depth);
  for (int64_t column = 0; column < p.columns; column += kernel.columns)
    for (int64_t row = 0; row < p.rows; row += kernel.rows)
      kernel.add(p.x + row, p.ld_x, p.y + column, p.ld_y, p.depth, p.sums + row * p.ld + column, p.ld,
                 lines->pending());
}

}  // namespace fusedconvbn
