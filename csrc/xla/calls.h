// What is behind the custom calls.
#pragma once

#include "../conv_bn.h"

namespace fusedconvbn::xla {

// Tell XLA of the handlers.
Status register_cpu_calls();
Status register_cuda_calls();

// The plan of a call on a GPU. It fails where there are no CUDA kernels.
Status plan_cuda_call(const ConvBnParams& params, bool backward, Plan* plan);

}  // namespace fusedconvbn::xla
