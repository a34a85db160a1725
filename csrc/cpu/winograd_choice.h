// Which algorithm is the fastest for a 3x3 convolution of stride 1: an estimate of each one's time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../conv_bn.h"
#include "convolve.h"
#include "winograd_prices.h"

namespace fusedconvbn {

// How much of L2 the transformed inputs of few windows may take, and their products by a panel, beside transformed
// filters. An L2 of less than 2 MiB has no room for all of these; but where filters are new at each call that is still
// better than to write them to memory, until L3 is needed a lot.
constexpr int64_t max_input_bytes(int64_t l2, bool kept_filters) {
  return l2 >= 2 << 20 || kept_filters ? l2 / 8 * 5 : l2 / 2 * 3;
}

// Whether the inputs of so many windows of F(MxM) take no more.
template <int M>
constexpr bool winograd_inputs_fit_cache(int64_t max_bytes, int64_t windows, int64_t depth, int64_t element_bytes) {
  constexpr int64_t kPanel = 32;
  return (M + 2) * (M + 2) * windows * (depth + kPanel) * element_bytes <= max_bytes;
}

struct WinogradProblem {
  int64_t batch, height, width;  // of outputs
  int64_t depth, cols;           // channels
};

// Of so many elements of filters.
inline double filter_price(const WinogradPrices& prices, int i, int64_t filters) {
  constexpr int64_t kL3 = 16 << 20;
  const int64_t near = prices.unit.l2 / 2 * 3, bytes = filters * 4;
  return prices.filter[bytes > kL3 ? 2 : bytes > near ? 1 : 0][i];
}

// Of an element that is transformed in cache, of so many of filters before. These are packed first: the larger they
// are, the more of them is read from beyond L2, and written there and read again.
inline double filter_in_cache_price(const WinogradPrices& prices, int i, int64_t filters) {
  constexpr double kMiB = 1 << 20, kFarFilters = 8;
  return prices.filter_in_cache[i] +
         prices.far_filter[i] * std::min(kFarFilters, static_cast<double>(filters * 4) / kMiB);
}

// Whether a block of windows, transformed and multiplied, is far more than L2 has room for.
inline bool is_deep(int64_t l2, int64_t elements, const WinogradProblem& p) {
  constexpr int64_t kWindows = 36, kPanel = 32, kPanels = 16;
  const int64_t products = kPanel * std::min(kPanels, ceil_div(p.cols, kPanel));
  return kWindows * elements * (p.depth + products) * 4 > l2 / 2 * 3;
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
  constexpr int64_t kTaps = 9, kElements = (M + 2) * (M + 2);
  const int64_t l2 = prices.unit.l2, panel = 2 * prices.unit.lanes;
  const int64_t cols = ceil_div(p.cols, panel) * panel, filters = kElements * p.depth * cols;
  const int64_t windows = p.batch * ceil_div(p.height, M) * ceil_div(p.width, M);
  const bool in_cache = prices.filter_in_cache[i] > 0 &&
                        winograd_inputs_fit_cache<M>(max_input_bytes(l2, prices.kept_filters), windows, p.depth, 4);
  const double filter =
      in_cache ? filter_in_cache_price(prices, i, kTaps * p.depth * cols) : filter_price(prices, i, filters);
  const double input = prices.input[i] + (in_cache || !is_deep(l2, kElements, p) ? 0 : prices.deep[i]);
  const double transforms = input * static_cast<double>(p.depth) + prices.output[i] * static_cast<double>(cols);
  const int64_t lines = line_elements<M>(p.height, prices.narrow_windows);
  const double elements = static_cast<double>(p.batch * lines * line_elements<M>(p.width, prices.narrow_windows));
  return static_cast<double>(filters) * filter +
         elements * (prices.product[i] * static_cast<double>(p.depth * cols) + transforms);
}

// Columns and what panels of them cost more.
inline int64_t direct_columns_worked(const WinogradPrices& prices, int64_t cols) {
  const int64_t panel = prices.unit.panel, last = cols % panel;
  return cols + cols / panel * prices.direct_overhead[2] +
         (last > prices.unit.lanes ? prices.direct_overhead[1]
          : last > 0               ? prices.direct_overhead[0]
                                   : 0);
}

// Whether the direct algorithm reads new filters where they lie.
inline bool direct_is_unpacked(const WinogradUnit& unit, const WinogradProblem& p, int64_t rows) {
  constexpr int64_t kElementBytes = 4;
  const int64_t pixels = p.batch * p.height * p.width;
  return p.cols % unit.lanes == 0 && source_fits_cache(pixels, pixels * p.depth * kElementBytes) &&
         outdoes_packing(pixels, rows, p.cols);
}

inline double direct_cost(const WinogradPrices& prices, const WinogradProblem& p) {
  constexpr int64_t kTaps = 9;
  const int64_t cols = ceil_div(p.cols, prices.direct_columns) * prices.direct_columns, rows = kTaps * p.depth;
  const int64_t worked = direct_columns_worked(prices, cols);
  const bool unpacked = prices.unpacked_filter > 0 && direct_is_unpacked(prices.unit, p, rows);
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
