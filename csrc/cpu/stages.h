// The stages of the direct algorithm: a run and a scratch function each, for a set of kernels. dispatch.cc makes table
// rows of them. Each is written once, for both compute types.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace fusedconvbn {

// Depthwise kernels serve groups of one input and one output channel.
inline bool is_depthwise(const ConvBnParams& p) { return p.group_in() == 1 && p.group_out() == 1 && p.groups > 1; }

// Forward: convolution, and in the epilogue of each tile either the whole of batch norm, residual and activation
// (inference) or the tile's moments (training; then merge, normalize). In a backward plan: z alone.
size_t forward_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device);
Status run_forward(const KernelSet& set, const StageCall& call);

// Gradients of gamma, beta, the moving statistics and the residual, and conv_grad for the next two stages.
size_t reduce_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device);
Status run_reduce(const KernelSet& set, const StageCall& call);

// The gradient by the inputs: for each phase of the stride a convolution of conv_grad with the filters transposed.
size_t dgrad_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device);
Status run_dgrad(const KernelSet& set, const StageCall& call);

// The gradient by the filters: products of input and conv_grad panels, over fixed ranges of pixels.
size_t wgrad_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device);
Status run_wgrad(const KernelSet& set, const StageCall& call);

}  // namespace fusedconvbn
