// The gradient of batch norm, channel by channel: from sums over the pixels to the gradients of gamma, beta and the
// moving statistics, and to the few constants that make the gradient of z.
//
// With du = dy activation'(u), n pixels, inv = inv_std and sums over a channel:
//   d_beta = sum du, d_gamma = inv sum du (z - mean)
//   training:  dz = gamma inv (du - d_beta / n - (z - mean) inv d_gamma / n) + what the returned statistics add
//   inference: dz = gamma inv du
// which is dz = slope du + curve (z - mean) + offset.
//
// The saved mean is rounded: sum (z - mean) is not quite 0, sum dz would not be either, and under a large mean of the
// inputs that is an error of d_filters, many times larger: more so where z - mean itself was rounded. So that sum is
// taken too, and the mean corrected by it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../conv_bn.h"
#include "arena.h"
#include "image.h"
#include "kernels.h"
#include "statistics.h"

namespace fusedconvbn {

template <class C>
class ChannelGradients {
 public:
  // `blocks` of pixels have sums of their own, in C; they are added in their order, in double.
  ChannelGradients(const ConvBnParams& p, const BackwardBuffers& buffers, int64_t blocks, Arena* arena)
      : p_(p), b_(buffers), blocks_(blocks) {
    for (C** array : {&inv_std_, &scale_, &slope_, &curve_, &offset_}) *array = arena->take<C>(p.out_channels);
    zeros_ = arena->take<C>(has_rounded_conv_out(p) ? p.out_channels : 0);
    for (C** sums : {&sum_du_, &sum_du_z_, &sum_z_}) *sums = arena->take<C>(blocks * p.out_channels);
  }

  // Whether the statistics are the batch's.
  bool learns() const { return p_.training && p_.pixels() > 0; }

  // Before any block: what u needs.
  void prepare() const {
    if (has_rounded_conv_out(p_)) std::fill_n(zeros_, p_.out_channels, C(0));
    for (int64_t c = 0; c < p_.out_channels; ++c) {
      const double inv_std = p_.training ? static_cast<double>(values(b_.inv_std)[c])
                                         : inverse_deviation(values(b_.moving_variance)[c], p_.epsilon);
      inv_std_[c] = static_cast<C>(inv_std);
      scale_[c] = values(b_.gamma)[c] * inv_std_[c];
    }
  }

  // Sets what u needs in `g`, for its columns from `channel` on.
  void set_affine(int64_t channel, GradientBlock<C>* g) const {
    g->mean = (has_rounded_conv_out(p_) ? zeros_ : values(p_.training ? b_.batch_mean : b_.moving_mean)) + channel;
    g->scale = scale_ + channel, g->beta = values(b_.beta) + channel;
  }

  // Zeros the sums of a block, for the columns of `g` from `channel` on, and sets them in `g`.
  void start_sums(int64_t block, int64_t channel, GradientBlock<C>* g) const {
    const int64_t at = block * p_.out_channels + channel;
    g->sum_du = sum_du_ + at, g->sum_du_z = sum_du_z_ + at, g->sum_z = sum_z_ + at;
    for (C* sums : {g->sum_du, g->sum_du_z, g->sum_z}) std::fill(sums, sums + g->cols, C(0));
  }

  // After all blocks: writes the gradients of the per-channel arguments, and has the constants of dz.
  void finish(ParallelFor* parallel) const {
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [this](int64_t chunk, int) {
      const int64_t begin = chunk * kChannelChunk, end = std::min(begin + kChannelChunk, p_.out_channels);
      for (int64_t c = begin; c < end; ++c) finish(c);
    });
  }

  // The same for one channel whose sums the caller has: d_beta, d_gamma and the error of the mean that was subtracted.
  void finish(int64_t c, double d_beta, double d_gamma, double mean_error) const {
    set(b_.d_beta, c, d_beta);
    set(b_.d_gamma, c, d_gamma);
    const double g_mean = values(b_.moving_mean_gradient)[c], g_variance = values(b_.moving_variance_gradient)[c];
    const double inv_std = inv_std_[c], slope = values(b_.gamma)[c] * inv_std;
    double curve = 0, offset = 0;
    if (learns()) {
      const double n = static_cast<double>(p_.pixels()), learned = (1 - p_.momentum) / n;
      curve = 2 * learned * moving_variance_factor(p_) * g_variance - slope * inv_std * d_gamma / n;
      offset = learned * g_mean - slope * d_beta / n - curve * mean_error;
      set(b_.d_moving_mean, c, p_.momentum * g_mean);
      set(b_.d_moving_variance, c, p_.momentum * g_variance);
    } else {
      set(b_.d_moving_mean, c, g_mean - slope * d_beta);
      set(b_.d_moving_variance, c, g_variance - 0.5 * slope * inv_std * d_gamma);
    }
    slope_[c] = static_cast<C>(slope);
    curve_[c] = static_cast<C>(curve);
    offset_[c] = static_cast<C>(offset);
  }

  // gamma * inv_std, which is the slope of dz too, and known from prepare() on.
  const C* scale() const { return scale_; }

  // The constants of dz.
  const C* slope() const { return slope_; }
  const C* curve() const { return curve_; }
  const C* offset() const { return offset_; }

  // Sets the constants of dz in `g`.
  void set_constants(int64_t channel, GradientBlock<C>* g) const {
    g->slope = slope_ + channel;
    if (learns()) g->curve = curve_ + channel, g->offset = offset_ + channel;
  }

 private:
  static const C* values(const void* array) { return static_cast<const C*>(array); }
  static void set(void* array, int64_t c, double value) { static_cast<C*>(array)[c] = static_cast<C>(value); }

  double sum(const C* blocks_sums, int64_t c) const {
    double total = 0;
    for (int64_t block = 0; block < blocks_; ++block) total += blocks_sums[block * p_.out_channels + c];
    return total;
  }

  void finish(int64_t c) const {
    const double d_beta = sum(sum_du_, c),
                 mean_error = learns() ? sum(sum_z_, c) / static_cast<double>(p_.pixels()) : 0;
    finish(c, d_beta, (sum(sum_du_z_, c) - mean_error * d_beta) * inv_std_[c], mean_error);
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  int64_t blocks_;
  C *inv_std_, *scale_, *slope_, *curve_, *offset_;  // [K]
  C* zeros_;                                         // [K], the mean of what was saved without it
  C *sum_du_, *sum_du_z_, *sum_z_;                   // [blocks][K]
};

}  // namespace fusedconvbn
