// The gradient by the inputs on AMX, from a bfloat16 gradient of z; dgrad.cc.
#pragma once

#include "image.h"

namespace fusedconvbn {

size_t dgrad_amx_scratch(const KernelSet& set, const ConvBnParams& p, const Image<float>& conv_grad, int workers);
void run_dgrad_amx(const KernelSet& set, const ConvBnParams& p, const Image<float>& conv_grad, const BackwardBuffers& b,
                   int workers, char* scratch, ParallelFor* parallel);

}  // namespace fusedconvbn
