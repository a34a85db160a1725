// Per-channel arrays, and the merge of per-block moments into the statistics of a batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "convolve.h"

namespace fusedconvbn {

constexpr int64_t kChannelChunk = 64;  // channels of a task that works on per-channel arrays

// y = activation((z - mean) * scale + beta): what normalization needs of each channel.
template <class C>
struct Normalization {
  const C* mean;
  C* scale;  // gamma * inv_std
  const C* beta;
};

inline double inverse_deviation(double variance, double epsilon) { return 1 / std::sqrt(variance + epsilon); }

// n / (n - 1) where the moving variance is to be unbiased; 1 for a single element.
inline double moving_variance_factor(const ConvBnParams& p) {
  const double n = static_cast<double>(p.pixels());
  return p.unbiased_moving_variance && n > 1 ? n / (n - 1) : 1;
}

// Mean and sum of squared deviations of each channel and block of kBlockRows pixels.
template <class C>
struct BlockMoments {
  C* mean;     // [blocks][channels]
  C* squares;  // [blocks][channels]

  static BlockMoments carve(Arena* arena, int64_t blocks, int64_t channels) {
    return {arena->take<C>(blocks * channels), arena->take<C>(blocks * channels)};
  }
};

// The moments of the whole batch for channels [begin, end), from the blocks in their order, in double. With m pixels of
// mean m' and squares M' in a block: mean = sum m m' / n, squares = sum M' + m (m' - mean)^2. Summing m m' rather than
// correcting a running mean keeps an infinite mean infinite.
template <class C>
void merge_moments(const BlockMoments<C>& blocks, int64_t pixels, int64_t channels, int64_t begin, int64_t end,
                   double* mean, double* squares) {
  const auto for_blocks = [&](auto f) {
    for (int64_t first = 0, block = 0; first < pixels; first += kBlockRows, ++block)
      for (int64_t c = begin; c < end; ++c)
        f(c - begin, block * channels + c, static_cast<double>(std::min(kBlockRows, pixels - first)));
  };
  std::fill(mean, mean + (end - begin), 0.0);
  std::fill(squares, squares + (end - begin), 0.0);
  for_blocks([&](int64_t c, int64_t at, double m) { mean[c] += m * blocks.mean[at]; });
  for (int64_t c = 0; c < end - begin; ++c) mean[c] /= static_cast<double>(pixels);
  for_blocks([&](int64_t c, int64_t at, double m) {
    const double deviation = blocks.mean[at] - mean[c];
    squares[c] += blocks.squares[at] + m * deviation * deviation;
  });
}

}  // namespace fusedconvbn
