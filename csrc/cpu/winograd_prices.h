// The prices that competing algorithms of 3x3 convolutions are compared by (winograd_choice.h).
#pragma once

#include <cstdint>
#include <initializer_list>

namespace fusedconvbn {

// What the vectors, the panels of the direct algorithm's filters and the caches of an instruction set hold.
struct WinogradUnit {
  int64_t lanes, panel;  // elements
  int64_t l2;            // bytes
};

// Prices in ns of the direct algorithm, F(2x2) and F(4x4): fitted, in part by hand, to random layers timed by each.
// docs/performance.md and docs/performance-avx2.md say what the choice loses on layers that were not among them.
struct WinogradPrices {
  WinogradUnit unit;
  int64_t direct_columns;      // what those of the direct algorithm are rounded up to
  int64_t direct_overhead[3];  // how many more a panel of them costs: one of a vector, of more, a whole one
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
  bool kept_filters = false;  // whether they are packed before
};

struct WinogradPriceList {
  WinogradPrices training;         // with filters that are new at each call
  WinogradPrices inference;        // with filters packed before, as inference usually has them
  WinogradPrices input_gradient;   // with transposed filters, whose columns are the inputs' channels
  WinogradPrices filter_gradient;  // sums of elements of filters, which are transformed in cache
};

constexpr WinogradUnit kAvx512Unit = {16, 64, 2 << 20};
constexpr WinogradPrices kAvx512Training = {kAvx512Unit,
                                            16,
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
constexpr WinogradPrices kAvx512Inference = {kAvx512Unit,
                                             16,
                                             {8, 16, 16},
                                             {0.0087, 0.0125, 0.0142},
                                             {0, 0.188, 0.211},
                                             {0, 0.048, 0.077},
                                             {0, 0.1, 0.48},
                                             {{0.02, 0.17, 0.165}, {0.02, 0.21, 0.075}, {0.03, 0.12, 0.085}},
                                             {0, 0.124, 0.096},
                                             {0, 0, 0},
                                             0,
                                             true,
                                             true};
constexpr WinogradPrices kAvx512InputGradient = {kAvx512Unit,
                                                 16,
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
constexpr WinogradPrices kAvx512FilterGradient = {kAvx512Unit,
                                                  32,
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
constexpr WinogradPriceList kAvx512Prices = {kAvx512Training, kAvx512Inference, kAvx512InputGradient,
                                             kAvx512FilterGradient};

// Of each algorithm, by what its prices differ on another processor.
struct PriceFactors {
  double product[3], transform[3], filter[3];
};

constexpr WinogradPrices scaled(WinogradPrices prices, const PriceFactors& by) {
  for (int i = 0; i < 3; ++i) {
    prices.product[i] *= by.product[i];
    for (double* price : {&prices.input[i], &prices.output[i], &prices.deep[i]}) *price *= by.transform[i];
    for (double(&place)[3] : prices.filter) place[i] *= by.filter[i];
    prices.filter_in_cache[i] *= by.filter[i], prices.far_filter[i] *= by.filter[i];
  }
  prices.unpacked_filter *= by.filter[0];
  return prices;
}

// Where a vector of 512 bits takes two turns (AMD's Zen 4), products cost more, filters from memory less.
constexpr WinogradPriceList kHalfWidthAvx512Prices = {
    scaled(kAvx512Training, {{1.59, 1.43, 1.34}, {1.3, 1.24, 1.35}, {0.73, 0.34, 0.41}}),
    scaled(kAvx512Inference, {{1.6, 1.42, 1.34}, {1.3, 1.11, 1.12}, {1.0, 0.61, 0.63}}),
    scaled(kAvx512InputGradient, {{1.56, 1.47, 1.38}, {1.3, 1.24, 1.24}, {0.86, 0.47, 0.51}}),
    scaled(kAvx512FilterGradient, {{1.5, 1.5, 1.5}, {1.5, 1.5, 1.5}, {1.5, 1.5, 1.5}})};

constexpr WinogradUnit kAvx2Unit = {8, 16, 512 << 10};
constexpr WinogradPrices kAvx2Training = {kAvx2Unit,
                                          8,
                                          {1, 1, 0},
                                          {0.0251, 0.0231, 0.0268},
                                          {0, 0.118, 0.227},
                                          {0, 0.458, 0.629},
                                          {0, 0.077, 0},
                                          {{0.2, 0.133, 0.2}, {0.2, 0.353, 0.41}, {0.48, 0.785, 0.723}},
                                          {0, 0.2, 0.153},
                                          {0, 0.063, 0.02},
                                          0.24,
                                          true};
constexpr WinogradPrices kAvx2Inference = {kAvx2Unit,
                                           8,
                                           {3, 3, 0},
                                           {0.0235, 0.0235, 0.0217},
                                           {0, 0.122, 0.323},
                                           {0, 0.348, 0.564},
                                           {0, 0.053, 0.03},
                                           {{0, 0, 0}, {0, 0.011, 0.035}, {0, 0.059, 0.154}},
                                           {0, 0.087, 0.097},
                                           {0, 0.012, 0.019},
                                           0,
                                           true,
                                           true};
constexpr WinogradPrices kAvx2InputGradient = {kAvx2Unit,
                                               8,
                                               {5, 5, 0},
                                               {0.0246, 0.0234, 0.0261},
                                               {0, 0.279, 0.437},
                                               {0, 0.28, 0.383},
                                               {0, 0.111, 0.179},
                                               {{0.066, 0.2, 0.2}, {0.125, 0.62, 0.389}, {0.358, 0.874, 0.717}},
                                               {0, 0.205, 0.149},
                                               {0, 0.059, 0.04},
                                               0,
                                               true};
constexpr WinogradPrices kAvx2FilterGradient = {kAvx2Unit,
                                                16,
                                                {0, 0, 0},
                                                {0.0261, 0.0319, 0.0349},
                                                {0, 0.051, 0.126},
                                                {0, 0.197, 0.391},
                                                {0, 0.056, 0.057},
                                                {{0.197, 0.105, 0.056}, {0.241, 0.259, 0.218}, {0.54, 0.511, 0.352}},
                                                {0, 0, 0},
                                                {0, 0, 0},
                                                0,
                                                false};
constexpr WinogradPriceList kAvx2Prices = {kAvx2Training, kAvx2Inference, kAvx2InputGradient, kAvx2FilterGradient};

}  // namespace fusedconvbn
