// Which algorithm is the fastest for a 3x3 convolution of stride 1: an estimate of each one's time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../conv_bn.h"
#include "image.h"

namespace fusedconvbn {

// Prices in ns with AVX-512, of the direct algorithm, F(2x2) and F(4x4): fitted, in part by hand, to random layers
// timed by each. docs/performance.md says what the choice loses on layers that were not among them.
struct WinogradPrices {
  double product[3];    // of each of the (M+2)^2 elements of a tile (9, of a pixel), for a pair of channels
  double transform[3];  // of the same, for an input or an output channel
  // Of each of the (M+2)^2 or 9 elements of a filter: made, where that is not done before, and read from L2, from L3
  // and from beyond.
  double filter[3][3];
  double filter_in_cache[3];  // the same, of few windows: transformed part by part in L2; 0: not done
};

constexpr WinogradPrices kConvolutionPrices = {{0.0112, 0.0130, 0.0135},
                                               {0, 0.067, 0.13},
                                               {{0.2, 0.25, 0.23}, {0.64, 0.48, 0.42}, {0.64, 0.48, 0.42}},
                                               {0, 0.2, 0.17}};
// With filters packed before, as inference usually has them.
constexpr WinogradPrices kPackedPrices = {{0.0109, 0.0120, 0.0112},
                                          {0, 0.076, 0.13},
                                          {{0, 0.02, 0.05}, {0.07, 0.05, 0.08}, {0.1, 0.09, 0.22}},
                                          {0, 0.13, 0.13}};
// Sums of elements of filters are transformed in cache.
constexpr WinogradPrices kFilterGradientPrices = {
    {0.0177, 0.0169, 0.0174}, {0, 0.13, 0.12}, {{0, 0.1, 0.1}, {0.2, 0.18, 0.14}, {0.2, 0.18, 0.14}}, {0, 0, 0}};

// Whether the transformed inputs of so many windows of F(MxM) stay in an L2 of 2 MiB, with some filters.
template <int M>
constexpr bool winograd_inputs_fit_cache(int64_t windows, int64_t depth, int64_t element_bytes) {
  constexpr int64_t kMaxBytes = 5 << 18;
  return (M + 2) * (M + 2) * windows * depth * element_bytes <= kMaxBytes;
}

struct WinogradProblem {
  int64_t batch, height, width;  // of outputs
  int64_t depth, cols;           // channels
};

// By F(MxM), or direct where M is 1.
template <int M>
double winograd_cost(const WinogradPrices& prices, const WinogradProblem& p) {
  constexpr int64_t kPanel = 32, kL2 = 8 << 20, kL3 = 24 << 20;  // bytes of filters; those of a chunk are less
  constexpr int i = M / 2;
  const int64_t elements = M == 1 ? 9 : (M + 2) * (M + 2), cols = ceil_div(p.cols, kPanel) * kPanel;
  const int64_t filters = elements * p.depth * cols, bytes = filters * 4;
  const int64_t windows = p.batch * ceil_div(p.height, M) * ceil_div(p.width, M);
  const double tiles = static_cast<double>(windows);
  const bool in_cache = prices.filter_in_cache[i] > 0 && winograd_inputs_fit_cache<M>(windows, p.depth, 4);
  const double filter = in_cache ? prices.filter_in_cache[i] : prices.filter[bytes > kL3 ? 2 : bytes > kL2 ? 1 : 0][i];
  return static_cast<double>(filters) * (filter + prices.product[i] * tiles) +
         prices.transform[i] * static_cast<double>(elements * (p.depth + cols)) * tiles;
}

// The M of the fastest, 1, 2 or 4.
inline int fastest_winograd(const WinogradPrices& prices, const WinogradProblem& p, bool strict) {
  constexpr int64_t kMinChannels = 16;
  if (std::min(p.depth, p.cols) < kMinChannels) return 1;
  const double direct = winograd_cost<1>(prices, p), two = winograd_cost<2>(prices, p);
  if (!strict && winograd_cost<4>(prices, p) < std::min(direct, two)) return 4;
  return two < direct ? 2 : 1;
}

}  // namespace fusedconvbn
