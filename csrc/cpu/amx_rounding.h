// What the gradient by the filters owes to dz being rounded to bfloat16, where the inputs lie far from 0.
//
// z of such inputs takes few different values in bfloat16, and equal z round alike: the errors of dz add up, times the
// mean of the inputs. But for any m, sum x dz = sum (x - m) dz + m sum dz, and sum dz is known: dz adds up to what the
// returned moving mean's gradient gives. So with m a channel's mean, m times what the sum of dz lost is added to
// products of x as it is.
//
// A few pixels say what m is; where they vary as much as that, it is 0, and all of them cost nothing more.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "arena.h"
#include "image.h"
#include "windows.h"

namespace fusedconvbn {

// scratch[cols] = sums over rows of bfloat16, added to `sums`.
inline void add_row_sums(const AmxKernels& kernels, const uint16_t* rows, int64_t stride, int64_t count, int64_t cols,
                         float* scratch, double* sums) {
  std::fill_n(scratch, cols, 0.0f);
  GradientBlock<float> block{};
  block.dy = rows, block.ld_dy = stride, block.rows = count, block.cols = cols, block.sum_du = scratch;
  kernels.mask[static_cast<int>(Activation::kNone)](block);
  for (int64_t c = 0; c < cols; ++c) sums[c] += scratch[c];
}

class AmxRounding {
 public:
  // `ranges` of positions have sums of their own.
  AmxRounding(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& b, int64_t ranges, int workers,
              Arena* arena)
      : p_(p),
        k_(set.f32.amx),
        inputs_(b.inputs, storage_of<float>(set, p.dtype), input_grid(p)),
        moving_mean_gradient_(static_cast<const float*>(b.moving_mean_gradient)),
        ranges_(ranges),
        matters_(arena->take<bool>(1)),
        mean_(arena->take<float>(p.in_channels)),
        sums_(arena->take<double>(ranges * p.out_channels)) {
    for (double** moment : {&first_moment_, &second_moment_}) *moment = arena->take<double>(p.in_channels);
    for (int w = 0; w < workers; ++w) scratch_.push_back(arena->take<float>(std::max(p.in_channels, p.out_channels)));
    for (const Tap& tap : forward_windows(p).taps) restores_.push_back(sees_image(tap));
  }

  // Before any range.
  void prepare() const {
    measure();
    *matters_ = std::any_of(mean_, mean_ + p_.in_channels, [](float mean) { return mean != 0; });
    if (*matters_) std::fill_n(sums_, ranges_ * p_.out_channels, 0.0);
  }
  bool matters() const { return *matters_; }

  // Adds some channels, from `column` on, of rows of the rounded dz.
  void add(int64_t range, const uint16_t* dz, int64_t stride, int64_t rows, int64_t column, int64_t cols,
           int worker) const {
    add_row_sums(k_, dz, stride, rows, cols, scratch_[worker], sums_ + range * p_.out_channels + column);
  }

  // Adds to rows of a tap's gradient, of channels from `channel` on, what they lost. All ranges have been added. Where
  // a tap reads padding, what the sum over the other positions is to be is not known.
  void restore(int64_t tap, int64_t channel, int64_t rows, int64_t column, int64_t cols, float* gradient,
               int64_t ld) const {
    if (!restores_[tap]) return;
    for (int64_t k = 0; k < cols; ++k) {
      const float lost = static_cast<float>(this->lost(column + k));
      for (int64_t r = 0; r < rows; ++r) gradient[r * ld + k] += mean_[channel + r] * lost;
    }
  }

 private:
  static constexpr int64_t kPixels = 32;
  static constexpr double kFar = 4;  // standard deviations

  double lost(int64_t k) const {
    double sum = (1 - p_.momentum) * moving_mean_gradient_[k];
    for (int64_t range = 0; range < ranges_; ++range) sum -= sums_[range * p_.out_channels + k];
    return sum;
  }

  void measure() const {
    const int64_t channels = p_.in_channels, pixels = input_grid(p_).pixels(), count = std::min(kPixels, pixels);
    for (double* moment : {first_moment_, second_moment_}) std::fill_n(moment, channels, 0.0);
    for (int64_t i = 0; i < count; ++i) {
      const float* pixel = inputs_.read(i * pixels / count, 1, 0, channels, scratch_[0]).data;
      for (int64_t c = 0; c < channels; ++c) {
        const double x = pixel[c];
        first_moment_[c] += x, second_moment_[c] += x * x;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = first_moment_[c] / static_cast<double>(count);
      const double variance = std::max(0.0, second_moment_[c] / static_cast<double>(count) - mean * mean);
      mean_[c] = mean * mean > kFar * kFar * variance ? static_cast<float>(mean) : 0;
    }
  }

  // Whether all positions read the image through a tap, none of them its padding.
  bool sees_image(const Tap& tap) const {
    return tap.height >= 0 && (p_.out_height - 1) * p_.stride_height + tap.height < p_.in_height && tap.width >= 0 &&
           (p_.out_width - 1) * p_.stride_width + tap.width < p_.in_width;
  }

  const ConvBnParams& p_;
  const AmxKernels& k_;
  Image<float> inputs_;
  const float* moving_mean_gradient_;
  int64_t ranges_;
  bool* matters_;
  float* mean_;                            // [C]
  double* sums_;                           // [ranges][K], of dz
  double *first_moment_, *second_moment_;  // [C], of a few pixels
  std::vector<float*> scratch_;            // a worker's
  std::vector<bool> restores_;             // of each tap
};

}  // namespace fusedconvbn
