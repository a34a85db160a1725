// Which algorithm is the fastest for a 3x3 convolution of stride 1: an estimate of each one's time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../conv_bn.h"
#include "convolve.h"

namespace fusedconvbn {

// Prices in ns with AVX-512, of the direct algorithm, F(2x2) and F(4x4): fitted, in part by hand, to random layers
// timed by each. docs/performance.md says what the choice loses on layers that were not among them.
struct WinogradPrices {
  int64_t direct_columns;      // what those of the direct algorithm are rounded up to
  int64_t direct_overhead[3];  // how many more a panel of them costs: one of 16, of 32 or 48, of 64
  double product[3];           // of each of the (M+2)^2 elements of a tile (9, of a pixel), for a pair of channels
  double input[3];             // of transforming the same, for an input channel
  double output[3];            // of an output channel
  double deep[3];              // more for an input, where a block of transformed inputs leaves L2
  // Of each of the (M+2)^2 or 9 elements of a filter: made, where that is not done before, and read from L2, from L3
  // and from beyond.
  double filter[3][3];
  double filter_in_cache[3];  // the same, of few windows: transformed part by part in L2; 0: not done
  double far_filter[3];       // more for it, for each MiB of the filters as they come
  double unpacked_filter;     // of an element that the direct algorithm reads where it lies; 0: not done
  bool narrow_windows;        // whether F(4x4) has windows of two outputs
};

constexpr WinogradPrices kConvolutionPrices = {16,
                                               {8, 13, 13},
                                               {0.0093, 0.0135, 0.0163},
                                               {0, 0.127, 0.11},
                                               {0, 0.051, 0.064},
                                               {0, 0.1, 0.5},
                                               {{0.35, 0.33, 0.41}, {0.40, 0.45, 0.31}, {0.56, 0.66, 0.35}},
                                               {0, 0.38, 0.19},
                                               {0, 0, 0},
                                               0.2,
                                               true};
// With filters packed before, as inference usually has them.
constexpr WinogradPrices kPackedPrices = {16,
                                          {8, 16, 16},
                                          {0.0087, 0.0125, 0.0142},
                                          {0, 0.188, 0.211},
                                          {0, 0.048, 0.077},
                                          {0, 0.1, 0.48},
                                          {{0.02, 0.17, 0.165}, {0.02, 0.21, 0.075}, {0.03, 0.12, 0.085}},
                                          {0, 0.124, 0.096},
                                          {0, 0, 0},
                                          0,
                                          true};
// With transposed filters, whose columns are the inputs' channels.
constexpr WinogradPrices kInputGradientPrices = {16,
                                                 {12, 12, 7},
                                                 {0.0103, 0.0134, 0.0162},
                                                 {0, 0.21, 0.28},
                                                 {0, 0.028, 0.022},
                                                 {0, 0.1, 0.52},
                                                 {{0.28, 0.55, 0.39}, {0.46, 0.63, 0.51}, {0.55, 0.75, 0.42}},
                                                 {0, 0.28, 0.15},
                                                 {0, 0.051, 0.027},
                                                 0,
                                                 true};
// Sums of elements of filters are transformed in cache.
constexpr WinogradPrices kFilterGradientPrices = {32,
                                                  {0, 0, 0},
                                                  {0.0127, 0.0167, 0.019},
                                                  {0, 0.041, 0.032},
                                                  {0, 0.14, 0.16},
                                                  {0, 0, 0},
                                                  {{0.13, 0.13, 0.094}, {0.15, 0.1, 0.1}, {0.094, 0.16, 0.099}},
                                                  {0, 0, 0},
                                                  {0, 0, 0},
                                                  0,
                                                  false};

// Whether the transformed inputs of so many windows of F(MxM), and their products by a panel, stay in L2 with some
// filters; max_bytes: for the former, of an L2 of 2 MiB.
template <int M>
constexpr bool winograd_inputs_fit_cache(int64_t windows, int64_t depth, int64_t element_bytes,
                                         int64_t max_bytes = 5 << 18) {
  constexpr int64_t kPanel = 32;
  return (M + 2) * (M + 2) * windows * (depth + kPanel) * element_bytes <= max_bytes;
}

struct WinogradProblem {
  int64_t batch, height, width;  // of outputs
  int64_t depth, cols;           // channels
};

// Of so many elements of filters.
inline double filter_price(const WinogradPrices& prices, int i, int64_t filters) {
  constexpr int64_t kL2 = 3 << 20, kL3 = 16 << 20;  // bytes
  return prices.filter[filters * 4 > kL3 ? 2 : filters * 4 > kL2 ? 1 : 0][i];
}

// Of an element that is transformed in cache, of so many of filters before. These are packed first: the larger they
// are, the more of them is read from beyond L2, and written there and read again.
inline double filter_in_cache_price(const WinogradPrices& prices, int i, int64_t filters) {
  constexpr double kMiB = 1 << 20, kFarFilters = 8;
  return prices.filter_in_cache[i] +
         prices.far_filter[i] * std::min(kFarFilters, static_cast<double>(filters * 4) / kMiB);
}

// Whether a block of windows, transformed and multiplied, is far more than L2 has room for.
inline bool is_deep(int64_t elements, const WinogradProblem& p) {
  constexpr int64_t kWindows = 36, kPanel = 32, kPanels = 16, kMaxBytes = 3 << 20;
  const int64_t products = kPanel * std::min(kPanels, ceil_div(p.cols, kPanel));
  return kWindows * elements * (p.depth + products) * 4 > kMaxBytes;
}

// How many elements cover so many outputs of a line: windows of F(4) have 6, or 4 at its end for one or two outputs
// where windows of two are to be had.
template <int M>
constexpr int64_t line_elements(int64_t outputs, bool narrow_windows) {
  const int64_t left = outputs % M;
  return outputs / M * (M + 2) + (left == 0 ? 0 : (left > 2 || !narrow_windows ? M : 2) + 2);
}

// By F(MxM).
template <int M>
double winograd_cost(const WinogradPrices& prices, const WinogradProblem& p) {
  constexpr int i = M / 2;
  constexpr int64_t kTaps = 9, kElements = (M + 2) * (M + 2), kPanel = 32;
  const int64_t cols = ceil_div(p.cols, kPanel) * kPanel, filters = kElements * p.depth * cols;
  const int64_t windows = p.batch * ceil_div(p.height, M) * ceil_div(p.width, M);
  const bool in_cache = prices.filter_in_cache[i] > 0 && winograd_inputs_fit_cache<M>(windows, p.depth, 4);
  const double filter =
      in_cache ? filter_in_cache_price(prices, i, kTaps * p.depth * cols) : filter_price(prices, i, filters);
  const double input = prices.input[i] + (in_cache || !is_deep(kElements, p) ? 0 : prices.deep[i]);
  const double transforms = input * static_cast<double>(p.depth) + prices.output[i] * static_cast<double>(cols);
  const int64_t lines = line_elements<M>(p.height, prices.narrow_windows);
  const double elements = static_cast<double>(p.batch * lines * line_elements<M>(p.width, prices.narrow_windows));
  return static_cast<double>(filters) * filter +
         elements * (prices.product[i] * static_cast<double>(p.depth * cols) + transforms);
}

// Columns and what panels of them cost more.
inline int64_t direct_columns_worked(const WinogradPrices& prices, int64_t cols) {
  constexpr int64_t kPanel = 64, kLanes = 16;
  const int64_t last = cols % kPanel;
  return cols + cols / kPanel * prices.direct_overhead[2] +
         (last > kLanes ? prices.direct_overhead[1]
          : last > 0    ? prices.direct_overhead[0]
                        : 0);
}

// Whether the direct algorithm reads new filters where they lie.
inline bool direct_is_unpacked(const WinogradProblem& p, int64_t rows) {
  constexpr int64_t kLanes = 16, kElementBytes = 4;
  const int64_t pixels = p.batch * p.height * p.width;
  return p.cols % kLanes == 0 && source_fits_cache(pixels, pixels * p.depth * kElementBytes) &&
         outdoes_packing(pixels, rows, p.cols);
}

inline double direct_cost(const WinogradPrices& prices, const WinogradProblem& p) {
  constexpr int64_t kTaps = 9;
  const int64_t cols = ceil_div(p.cols, prices.direct_columns) * prices.direct_columns, rows = kTaps * p.depth;
  const int64_t worked = direct_columns_worked(prices, cols);
  const bool unpacked = prices.unpacked_filter > 0 && direct_is_unpacked(p, rows);
  const double filter = unpacked ? prices.unpacked_filter : filter_price(prices, 0, rows * cols);
  return filter * static_cast<double>(rows * cols) +
         prices.product[0] * static_cast<double>(rows * worked * p.batch * p.height * p.width);
}

struct WinogradCosts {
  double direct, two, four;  // ns
};

inline WinogradCosts winograd_costs(const WinogradPrices& prices, const WinogradProblem& p) {
  return {direct_cost(prices, p), winograd_cost<2>(prices, p), winograd_cost<4>(prices, p)};
}

// The M of the fastest, 1, 2 or 4.
inline int fastest_winograd(const WinogradCosts& costs, bool strict) {
  if (!strict && costs.four < std::min(costs.direct, costs.two)) return 4;
  return costs.two < costs.direct ? 2 : 1;
}

}  // namespace fusedconvbn
