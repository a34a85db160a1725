// Training of a 1x1 convolution by the second moments of its inputs (second_moments.h).
#pragma once

#include <algorithm>

#include "second_moments.h"

namespace fusedconvbn {

// Training of a 1x1 convolution that saves no z: the second moments of the inputs give its statistics beforehand.
// Forward: of forward.cc, which works with statistics that are known, too.
template <class C, class Forward>
class ForwardByMoments {
 public:
  ForwardByMoments(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const ForwardBuffers& b,
                   char* scratch)
      : p_(p),
        saved_{static_cast<C*>(b.conv_out), p.in_channels},
        forward_(set, p, device, without_saved(b), Image<C>(b.output, storage_of<C>(set, p.dtype), output_grid(p)),
                 scratch ? scratch + StatisticsByMoments<C>::vectors_bytes(p.out_channels) : nullptr),
        moments_(compute_kernels<C>(set), Image<C>(b.inputs, storage_of<C>(set, p.dtype), input_grid(p)),
                 forward_windows(p), p.in_channels),
        statistics_(set, static_cast<const C*>(b.filters), p.in_channels, p.out_channels, scratch) {
    Arena arena(scratch ? scratch + StatisticsByMoments<C>::vectors_bytes(p.out_channels)
                        : nullptr);  // the convolution's, when these are done
    moments_scratch_ = moments_.carve(&arena, device.threads);
    statistics_.carve(&arena, device.threads);
    scratch_bytes_ =
        StatisticsByMoments<C>::vectors_bytes(p.out_channels) + std::max(arena.used(), forward_.scratch_bytes());
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  // z that varies far less than the inputs make its terms vary is computed, and measured, where the output will lie.
  void train(ParallelFor* parallel) const {
    if (p_.pixels() == 0) {
      std::fill_n(saved_.data, (p_.in_channels + 2) * p_.in_channels, C(0));
      return forward_.train(parallel);
    }
    moments_.run(moments_scratch_, parallel, saved_);
    if (!statistics_.run(saved_, parallel)) return forward_.train(parallel);
    forward_.train_with(statistics_.mean(), statistics_.squares(), parallel);
  }

 private:
  static ForwardBuffers without_saved(ForwardBuffers b) { return b.conv_out = nullptr, b; }

  const ConvBnParams& p_;
  SavedMoments<C> saved_;
  Forward forward_;
  SecondMoments<C> moments_;
  StatisticsByMoments<C> statistics_;
  typename SecondMoments<C>::Scratch moments_scratch_;
  size_t scratch_bytes_;
};

}  // namespace fusedconvbn
