// Per-channel arrays, and the merge of per-block moments into the statistics of a batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../conv_bn.h"
#include "arena.h"
#include "elementwise_blocks.h"

namespace fusedconvbn {

constexpr int64_t kChannelChunk = 64;  // channels of a task that works on per-channel arrays

inline double inverse_deviation(double variance, double epsilon) { return 1 / std::sqrt(variance + epsilon); }

// n / (n - 1) where the moving variance is to be unbiased; 1 for a single element.
inline double moving_variance_factor(const ConvBnParams& p) {
  const double n = static_cast<double>(p.pixels());
  return p.unbiased_moving_variance && n > 1 ? n / (n - 1) : 1;
}

// ColumnMoments of each block of pixels: [blocks][channels].
template <class C>
struct BlockMoments {
  C *shift, *offset, *squares;

  static BlockMoments carve(Arena* arena, int64_t blocks, int64_t channels) {
    const int64_t count = blocks * channels;
    return {arena->take<C>(count), arena->take<C>(count), arena->take<C>(count)};
  }
  ColumnMoments<C> from(int64_t element) const { return {shift + element, offset + element, squares + element}; }
  double mean(int64_t element) const { return static_cast<double>(shift[element]) + offset[element]; }
};

// The moments of the whole batch for channels [begin, end), from the blocks in their order, in double. With m pixels of
// mean m' and squares M' in a block: mean = sum m m' / n, squares = sum M' + m (m' - mean)^2. Summing m m' rather than
// correcting a running mean keeps an infinite mean infinite.
template <class C, class BlockPixels>
void merge_moments(const BlockMoments<C>& moments, int64_t blocks, const BlockPixels& block_pixels, int64_t channels,
                   int64_t begin, int64_t end, double* mean, double* squares) {
  double pixels = 0;
  const auto for_blocks = [&](auto f) {
    for (int64_t block = 0; block < blocks; ++block) {
      const double m = static_cast<double>(block_pixels(block));
      for (int64_t c = begin; c < end; ++c) f(c - begin, block * channels + c, m);
    }
  };
  std::fill(mean, mean + (end - begin), 0.0);
  std::fill(squares, squares + (end - begin), 0.0);
  for (int64_t block = 0; block < blocks; ++block) pixels += static_cast<double>(block_pixels(block));
  for_blocks([&](int64_t c, int64_t at, double m) { mean[c] += m * moments.mean(at); });
  for (int64_t c = 0; c < end - begin; ++c) mean[c] /= pixels;
  for_blocks([&](int64_t c, int64_t at, double m) {
    const double deviation = moments.mean(at) - mean[c];
    squares[c] += moments.squares[at] + m * deviation * deviation;
  });
}

}  // namespace fusedconvbn
