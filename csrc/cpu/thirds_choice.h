// Whether AMX convolves float32 faster in thirds (thirds.inl) than AVX-512 does directly: an estimate of each one's
// time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../conv_bn.h"
#include "convolve.h"
#include "thirds.h"

namespace fusedconvbn {

// Prices in ns of one thread, fitted to random layers timed by either algorithm, above all to the ratio of the two;
// docs/performance.md says what the choice loses on layers that were not among them.
struct ConvolutionPrices {
  double product;     // of an element of a window and a column of the filters
  double far;         // more for it, where the operands of thirds exceed L2
  double window;      // of an element of a window: cut, once; or loaded, for each 64 columns
  double output;      // of an element of the result
  double broken;      // more for it, where memory takes rows panel by panel and two panels share a line
  double residual;    // more for it
  double filter;      // of an element of the filters: packed, or read where that was done before
  double far_filter;  // more for it, where the filters are far
};
struct ThirdsPrices {
  ConvolutionPrices thirds, direct;
  int64_t kept_bytes;  // of the operands of thirds that stay in L2
  int64_t far_bytes;   // thirds of so many bytes of filters are far
};

constexpr ThirdsPrices kTrainingThirds = {
    {0.0056, 0.0024, 0.24, 0.64, 0, 0, 0.34, 0}, {0.0074, 0, 0.16, 0.63, 0.25, 0, 0.14, 0}, 11 << 18, INT64_MAX};
// With filters packed before; and by moments, whose second pass takes about as long. Layers that are timed over and
// over find filters that fill L2 in L3, networks of such layers do not: far ones cost the times of 8 and 4 bytes at its
// 30 GB/s.
constexpr ThirdsPrices kPackedThirds = {
    {0.0056, 0.0023, 0.23, 0.23, 0, 0.27, 0.02, 0.28}, {0.0075, 0, 0.16, 0.19, 0.25, 0.17, 0, 0.14}, 9 << 18, 2 << 20};
// With transposed filters, whose columns are the inputs' channels.
constexpr ThirdsPrices kInputGradientThirds = {
    {0.006, 0.0021, 0.35, 0.33, 0, 0, 0.5, 0.25}, {0.0052, 0, 0.35, 0.34, 0.25, 0, 0.21, 0.05}, 3 << 19, 4 << 20};

struct ThirdsProblem {
  int64_t positions;          // of windows
  int64_t phases;             // of a stride, which share the taps
  int64_t taps, depth, cols;  // of the filters
  int64_t outputs;            // elements
  bool residual;
};

constexpr int64_t kThirdsTile = 32;                                // rows, columns, depth
constexpr int64_t kThirdsBytes = kThirdPlanes * sizeof(uint16_t);  // of an element

// Rows of a block of ThirdsConvolution, of a depth in whole tiles: few where the operands of two blocks would take too
// much of L2; unless filters do, so that they had better be read for many rows.
inline int64_t thirds_block_rows(int64_t depth, int64_t filter_bytes) {
  constexpr int64_t kManyDepths = 640, kFewFilters = 5 << 18;  // bytes
  return depth > kManyDepths && filter_bytes <= kFewFilters ? kThirdsTile : kBlockRows;
}

inline int64_t whole(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }
inline int64_t whole_tiles(int64_t size) { return whole(size, kThirdsTile); }
inline double product_of(int64_t a, int64_t b) { return static_cast<double>(a) * static_cast<double>(b); }

// Bytes of filters in thirds, and of them with the windows of two blocks, as ThirdsConvolution has them in L2.
inline int64_t thirds_of_filters(const ThirdsProblem& p) {
  return kThirdsBytes * p.taps * whole_tiles(p.depth) * whole_tiles(p.cols);
}
inline int64_t thirds_in_cache(const ThirdsProblem& p) {
  const int64_t depth = p.taps * whole_tiles(p.depth), filters = thirds_of_filters(p);
  return (filters + 2 * kThirdsBytes * depth * thirds_block_rows(depth, filters)) / p.phases;
}

// Of an element of the result.
inline double output_price(const ConvolutionPrices& prices, const ThirdsProblem& p) {
  constexpr int64_t kPanel = 64, kLine = 16, kCaches = 4 << 20;  // elements
  const bool broken = p.cols > kPanel && p.cols % kLine != 0 && p.outputs > kCaches;
  return prices.output + (broken ? prices.broken : 0) + (p.residual ? prices.residual : 0);
}

// Of sizes that are rounded up; each element of a window is touched so many times.
inline double convolution_cost(const ConvolutionPrices& prices, const ThirdsProblem& p, int64_t positions,
                               int64_t depth, int64_t cols, int64_t touched, bool kept, bool far) {
  const double filters = product_of(p.taps * depth, cols);
  const double product = prices.product + (kept ? 0 : prices.far);
  const double filter = prices.filter + (far ? prices.far_filter : 0);
  return filters * (filter + product * static_cast<double>(positions)) +
         prices.window * product_of(p.positions, p.taps * depth) * static_cast<double>(touched) +
         output_price(prices, p) * static_cast<double>(p.outputs);
}

struct ThirdsCosts {
  double thirds, direct;  // ns
};

inline ThirdsCosts thirds_costs(const ThirdsPrices& prices, const ThirdsProblem& p) {
  constexpr int64_t kLanes = 16, kSpan = 64;
  const bool kept = thirds_in_cache(p) <= prices.kept_bytes, far = thirds_of_filters(p) >= prices.far_bytes;
  return {convolution_cost(prices.thirds, p, whole_tiles(p.positions), whole_tiles(p.depth), whole_tiles(p.cols), 1,
                           kept, far),
          convolution_cost(prices.direct, p, p.positions, p.depth, whole(p.cols, kLanes), ceil_div(p.cols, kSpan), kept,
                           far)};
}

// What thirds must be faster by: their filters take twice the memory. With a depth of one tile, or two and a residual,
// they also vary: nothing hides then that windows are cut and results emitted.
inline double margin_of_thirds(int64_t depth, bool residual) {
  constexpr double kMargin = 1.03, kMarginOfFew = 1.15;
  return depth <= (residual ? 2 * kThirdsTile : kThirdsTile) ? kMarginOfFew : kMargin;
}

// The gradient by the filters of a 1x1 convolution, in ns.
struct FilterGradientPrices {
  double product;          // of a pair of channels at a pixel
  double input, gradient;  // of a channel at a pixel, of the inputs and of z
  double sum;              // of a pair of channels
};
constexpr FilterGradientPrices kFilterGradientThirds = {0.0083, 0.13, 0.46, 0.19},
                               kFilterGradientDirect = {0.0112, 0.19, 0.51, 0.094};

inline double filter_gradient_cost(const FilterGradientPrices& prices, int64_t pixels, int64_t inputs,
                                   int64_t outputs) {
  const double pairs = product_of(inputs, outputs);
  const double channels = prices.input * static_cast<double>(inputs) + prices.gradient * static_cast<double>(outputs);
  return (prices.product * pairs + channels) * static_cast<double>(pixels) + prices.sum * pairs;
}

inline ThirdsCosts filter_gradient_costs(int64_t pixels, int64_t inputs, int64_t outputs) {
  return {filter_gradient_cost(kFilterGradientThirds, pixels, whole_tiles(inputs), whole_tiles(outputs)),
          filter_gradient_cost(kFilterGradientDirect, pixels, inputs, whole_tiles(outputs))};
}

// What else trains 1x1 convolutions spares memory z or its gradient, and multiplies in float32. Prices in ns: of what
// is spared, for an element in L3 and beyond; of a product.
inline bool spares_more_than_thirds(const ConvBnParams& p, double near, double far) {
  constexpr double kProduct = 0.0125;
  constexpr int64_t kNear = 11'000'000;  // bytes of inputs and z
  const double spared = 4 * p.pixels() * (p.in_channels + p.out_channels) > kNear ? far : near;
  return kProduct * static_cast<double>(p.in_channels) < spared;
}
// The whole of backward in one row; all by moments.
inline bool one_row_outdoes_thirds(const ConvBnParams& p) { return spares_more_than_thirds(p, 1.1, 1.81); }
inline bool moments_outdo_thirds(const ConvBnParams& p) { return spares_more_than_thirds(p, 1.4, 1.8); }

}  // namespace fusedconvbn
