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
  double window;      // of an element of a window: cut, once; or loaded, for each 64 columns
  double output;      // of an element of the result
  double broken;      // more for it, where memory takes rows panel by panel and two panels share a line
  double residual;    // more for it
  double filter;      // of an element of the filters: packed, or read where that was done before
  double far_filter;  // more for it, where the filters are far
  double reread;      // of an element of the filters or of a window that has left L2 between its uses
};
struct ThirdsPrices {
  ConvolutionPrices thirds, direct;
  int64_t kept_bytes;  // of the operands of thirds that stay in L2; of kLeavingBytes more the filters do not
  int64_t far_bytes;   // thirds of so many bytes of filters are far
  double margin;       // what thirds must be faster by where the depth is one tile
};

constexpr int64_t kLeavingBytes = 1 << 20;
constexpr int64_t kMaxWindows = 960 << 10;  // bytes of a block of windows that stay in L2 beside two panels of filters

constexpr ThirdsPrices kTrainingThirds = {
    {0.0052, 0.24, 0.72, 0, 0, 0.31, 0, 0.17}, {0.0076, 0.16, 0.75, 0.25, 0, 0.06, 0, 0}, 7 << 18, INT64_MAX, 1.15};
// With filters packed before; and by moments, whose second pass takes about as long. Layers that are timed over and
// over find filters that fill L2 in L3, networks of such layers do not: far ones cost the times of 8 and 4 bytes at its
// 30 GB/s.
constexpr ThirdsPrices kPackedThirds = {{0.0053, 0.25, 0.27, 0, 0.34, 0.05, 0.26, 0.2},
                                        {0.0077, 0.14, 0.25, 0.25, 0.33, 0.065, 0.2, 0},
                                        10 << 18,
                                        2 << 20,
                                        1.15};
// With transposed filters, whose columns are the inputs' channels.
constexpr ThirdsPrices kInputGradientThirds = {
    {0.0059, 0.36, 0.34, 0, 0, 0.54, 0.22, 0.13}, {0.0056, 0.35, 0.36, 0.25, 0, 0.17, 0.16, 0}, 5 << 18, 4 << 20, 1.4};

struct ThirdsProblem {
  int64_t positions;          // of windows
  int64_t phases;             // of a stride, which share the taps
  int64_t taps, depth, cols;  // of the filters
  int64_t outputs;            // elements
  bool residual;
};

constexpr int64_t kThirdsTile = 32;                                // rows, columns, depth
constexpr int64_t kThirdsBytes = kThirdPlanes * sizeof(uint16_t);  // of an element

inline int64_t whole(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }
inline int64_t whole_tiles(int64_t size) { return whole(size, kThirdsTile); }

// Rows of a block of ThirdsConvolution, of a depth in whole tiles. Few where the operands of two blocks would take too
// much of L2, unless filters do, so that they had better be read for many rows; all where the windows are so small
// that filters need not be read twice.
inline int64_t thirds_block_rows(int64_t positions, int64_t depth, int64_t filter_bytes) {
  constexpr int64_t kManyDepths = 640, kFewFilters = 5 << 18, kManyFilters = 1 << 20, kFewWindows = 512 << 10;  // bytes
  constexpr int64_t kMaxRows = 256;
  const int64_t rows = std::max(kThirdsTile, whole_tiles(positions));
  const bool few = rows <= kMaxRows && kThirdsBytes * depth * rows <= kFewWindows;
  if (few && filter_bytes >= kManyFilters) return rows;
  return depth > kManyDepths && filter_bytes <= kFewFilters ? kThirdsTile : kBlockRows;
}

inline double product_of(int64_t a, int64_t b) { return static_cast<double>(a) * static_cast<double>(b); }

// Bytes of filters in thirds, of the windows of a block, and of what ThirdsConvolution has in L2: filters and two
// blocks.
inline int64_t thirds_of_filters(const ThirdsProblem& p) {
  return kThirdsBytes * p.taps * whole_tiles(p.depth) * whole_tiles(p.cols);
}
inline int64_t thirds_block_rows(const ThirdsProblem& p) {
  return thirds_block_rows(p.positions, p.taps * whole_tiles(p.depth), thirds_of_filters(p));
}
inline int64_t windows_of_thirds(const ThirdsProblem& p) {
  return kThirdsBytes * p.taps * whole_tiles(p.depth) * thirds_block_rows(p) / p.phases;
}
inline int64_t thirds_in_cache(const ThirdsProblem& p) {
  return thirds_of_filters(p) / p.phases + 2 * windows_of_thirds(p);
}

// Whether results pass to memory.
inline bool results_leave_caches(const ThirdsProblem& p) {
  constexpr int64_t kCaches = 4 << 20;  // elements
  return p.outputs > kCaches;
}

// Of an element of the result.
inline double output_price(const ConvolutionPrices& prices, const ThirdsProblem& p) {
  constexpr int64_t kPanel = 64, kLine = 16;  // elements
  const bool broken = p.cols > kPanel && p.cols % kLine != 0 && results_leave_caches(p);
  return prices.output + (broken ? prices.broken : 0) + (p.residual ? prices.residual : 0);
}

// How an algorithm takes a problem: in sizes that are rounded up; each element of a window is touched so many times.
struct ConvolutionWork {
  int64_t positions, depth, cols, touched;
};
struct ThirdsTraffic {
  bool far;
  double filters, windows;  // how often an element of either is read again from beyond L2
};

inline double convolution_cost(const ConvolutionPrices& prices, const ThirdsProblem& p, const ConvolutionWork& work,
                               const ThirdsTraffic& traffic) {
  const double filters = product_of(p.taps * work.depth, work.cols);
  const double filter = prices.filter + (traffic.far ? prices.far_filter : 0) + prices.reread * traffic.filters;
  const double window = prices.window * static_cast<double>(work.touched) + prices.reread * traffic.windows;
  return filters * (filter + prices.product * static_cast<double>(work.positions)) +
         window * product_of(p.positions, p.taps * work.depth) +
         output_price(prices, p) * static_cast<double>(p.outputs);
}

struct ThirdsCosts {
  double thirds, direct;  // ns
};

// Filters are read once a block of rows: the larger the operands, the fewer of them are still in L2. Its windows are
// read once a panel of filters, and leave L2 where they take about half of it and have no room beside two panels.
inline ThirdsTraffic traffic_of_thirds(const ThirdsPrices& prices, const ThirdsProblem& p) {
  const double beyond = static_cast<double>(thirds_in_cache(p) - prices.kept_bytes) / kLeavingBytes;
  const int64_t blocks = ceil_div(p.positions, thirds_block_rows(p)) / p.phases;
  const int64_t panels = windows_of_thirds(p) > kMaxWindows ? ceil_div(p.cols, kThirdsTile) : 0;
  return {thirds_of_filters(p) >= prices.far_bytes, std::clamp(beyond, 0.0, 1.0) * static_cast<double>(blocks),
          static_cast<double>(panels)};
}

inline ThirdsCosts thirds_costs(const ThirdsPrices& prices, const ThirdsProblem& p) {
  constexpr int64_t kLanes = 16, kSpan = 64;
  const ConvolutionWork thirds = {whole_tiles(p.positions), whole_tiles(p.depth), whole_tiles(p.cols), 1},
                        direct = {p.positions, p.depth, whole(p.cols, kLanes), ceil_div(p.cols, kSpan)};
  const ThirdsTraffic traffic = traffic_of_thirds(prices, p);
  return {convolution_cost(prices.thirds, p, thirds, traffic), convolution_cost(prices.direct, p, direct, traffic)};
}

// What thirds must be faster by: their filters take twice the memory. They vary with a depth of one tile; and lose 20 %
// where nothing hides that windows are cut, residuals read from memory and results written there.
inline double margin_of_thirds(const ThirdsPrices& prices, const ThirdsProblem& p) {
  constexpr double kMargin = 1.03, kMarginOfResiduals = 1.4;
  const int64_t depth = p.taps * p.depth;
  if (p.residual && depth <= 2 * kThirdsTile && results_leave_caches(p)) return kMarginOfResiduals;
  return depth <= kThirdsTile ? prices.margin : kMargin;
}

// The gradient by the filters of a 1x1 convolution, in ns.
struct FilterGradientPrices {
  double product;          // of a pair of channels at a pixel
  double input, gradient;  // of a channel at a pixel, of the inputs and of z
  double sum;              // of a pair of channels
};
constexpr FilterGradientPrices kFilterGradientThirds = {0.0072, 0.17, 0.48, 0.21},
                               kFilterGradientDirect = {0.0116, 0.15, 0.43, 0.081};

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
