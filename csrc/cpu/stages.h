// The stages' implementations: a run and a scratch function each, for a set of kernels. dispatch.cc makes table rows of
// them. Each is written once, for both compute types.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace fusedconvbn {

// Depthwise kernels serve groups of one input and one output channel.
inline bool is_depthwise(const ConvBnParams& p) { return p.group_in() == 1 && p.group_out() == 1 && p.groups > 1; }

#define FCB_STAGE(name)                                                                         \
  size_t name##_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device); \
  Status run_##name(const KernelSet& set, const StageCall& call)

// Forward: convolution, and in the epilogue of each tile either the whole of batch norm, residual and activation
// (inference) or the tile's moments (training; then merge, normalize). In a backward plan: z alone.
FCB_STAGE(forward_direct);
FCB_STAGE(forward_winograd2);
FCB_STAGE(forward_direct_amx);

// Gradients of gamma, beta, the moving statistics and the residual, and conv_grad for the next two stages.
FCB_STAGE(reduce_direct);

// The gradient by the inputs: for each phase of the stride a convolution of conv_grad with the filters transposed.
FCB_STAGE(dgrad_direct);
FCB_STAGE(dgrad_winograd2);

// The gradient by the filters: products of input and conv_grad panels, over fixed ranges of pixels.
FCB_STAGE(wgrad_direct);

// The whole of backward for bfloat16 on AMX.
FCB_STAGE(backward_direct_amx);

#undef FCB_STAGE

}  // namespace fusedconvbn
