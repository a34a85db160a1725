// The stages' implementations: a run and a scratch function each, for a set of kernels. dispatch.cc makes table rows of
// them. Each is written once, for both compute types.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace fusedconvbn {

// Depthwise kernels serve groups of one input channel. They stage whole windows, and a panel holds the output channels
// of at least one group.
inline bool depthwise_applies(const ConvBnParams& p) {
  constexpr int64_t kMaxWindow = 256, kMaxStride = 8;  // pixels
  const auto small = [](int64_t filter, int64_t dilation, int64_t stride) {
    return (filter - 1) * dilation < kMaxWindow && stride <= kMaxStride;
  };
  return p.groups > 1 && p.group_in() == 1 && p.group_out() <= kDepthwisePanel &&
         small(p.filter_height, p.dilation_height, p.stride_height) &&
         small(p.filter_width, p.dilation_width, p.stride_width);
}

#define FCB_STAGE(name)                                                                         \
  size_t name##_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device); \
  Status run_##name(const KernelSet& set, const StageCall& call)
// One whose packed filters may be kept.
#define FCB_PACKING_STAGE(name) \
  FCB_STAGE(name);              \
  size_t name##_packed(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device)

// Their definitions for one of a stage's algorithms, by the templates scratch_of, run_with, packed_of and run_packing
// of the file that the stage is written in.
#define FCB_STAGE_SCRATCH(name, Algorithm)                                                       \
  size_t name##_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) { \
    return scratch_of<Algorithm>(set, p, device);                                                \
  }
#define FCB_DEFINE_STAGE(name, Algorithm) \
  FCB_STAGE_SCRATCH(name, Algorithm)      \
  Status run_##name(const KernelSet& set, const StageCall& call) { return run_with<Algorithm>(set, call); }
#define FCB_DEFINE_PACKING_STAGE(name, Algorithm)                                               \
  FCB_STAGE_SCRATCH(name, Algorithm)                                                            \
  size_t name##_packed(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) { \
    return packed_of<Algorithm>(set, p, device);                                                \
  }                                                                                             \
  Status run_##name(const KernelSet& set, const StageCall& call) { return run_packing<Algorithm>(set, call); }

// Forward: convolution, and in the epilogue of each tile either the whole of batch norm, residual and activation
// (inference) or the tile's moments (training; then merge, normalize). In a backward plan: z alone.
FCB_PACKING_STAGE(forward_direct);
FCB_PACKING_STAGE(forward_winograd2);
FCB_PACKING_STAGE(forward_winograd4);
FCB_PACKING_STAGE(forward_direct_amx);
FCB_PACKING_STAGE(forward_thirds);
FCB_PACKING_STAGE(forward_pairs);
FCB_PACKING_STAGE(forward_few_channels);
FCB_STAGE(forward_depthwise);

// The same for 1x1 filters in training, with the statistics from the second moments of the inputs; saves those, no z.
FCB_STAGE(forward_moments);
FCB_STAGE(forward_moments_amx);
FCB_STAGE(forward_moments_thirds);

// Gradients of gamma, beta, the moving statistics and the residual, and conv_grad for the next two stages.
FCB_STAGE(reduce_direct);

// The gradient by the inputs: for each phase of the stride a convolution of conv_grad with the filters transposed.
FCB_STAGE(dgrad_direct);
FCB_STAGE(dgrad_thirds);
FCB_STAGE(dgrad_pairs);
FCB_STAGE(dgrad_winograd2);
FCB_STAGE(dgrad_winograd4);

// The same where the inputs have few channels: products that give all taps' shares, added up.
FCB_STAGE(dgrad_columns);

// The gradient by the filters: products of input and conv_grad panels, over fixed ranges of pixels.
FCB_STAGE(wgrad_direct);
FCB_STAGE(wgrad_thirds);
FCB_STAGE(wgrad_winograd2);
FCB_STAGE(wgrad_winograd4);

// All of backward from these moments: two passes over (dy, y, inputs), neither z nor its gradient in memory.
FCB_STAGE(backward_moments);
FCB_STAGE(backward_moments_amx);

// The whole of backward, in two passes; the gradient of z never reaches memory.
FCB_STAGE(backward_depthwise);
FCB_STAGE(backward_pointwise);

// The whole of backward for images of few channels, in two passes.
FCB_STAGE(backward_few_channels);

// The whole of backward for bfloat16 on AMX.
FCB_STAGE(backward_direct_amx);

#undef FCB_PACKING_STAGE
#undef FCB_STAGE

}  // namespace fusedconvbn
