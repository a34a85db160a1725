// The naive implementation: plain loops, double accumulation, every problem that validate() accepts. The last row of
// the dispatch table, and the oracle of the fast rows.
#pragma once

#include "conv_bn.h"

namespace fusedconvbn {

// One thread; backward allocates four images of doubles.
Status reference_forward(const ConvBnParams& params, const ForwardBuffers& buffers);
Status reference_backward(const ConvBnParams& params, const BackwardBuffers& buffers);

}  // namespace fusedconvbn
