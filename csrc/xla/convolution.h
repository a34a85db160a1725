// The convolution of a problem and its gradients in XLA's own ops.
#pragma once

#include "../conv_bn.h"
#include "xla/hlo/builder/xla_builder.h"

namespace fusedconvbn::xla {

using ::xla::XlaOp;

// In float32 (float64 for float64), to which 16-bit data is widened. `inputs` in the order of params.data_format.
XlaOp convolve(const ConvBnParams& params, XlaOp inputs, XlaOp filters);

// Of the inputs and of the filters, in their type, for the gradient of the convolution's result.
XlaOp gradient_of_inputs(const ConvBnParams& params, XlaOp inputs, XlaOp filters, XlaOp gradient);
XlaOp gradient_of_filters(const ConvBnParams& params, XlaOp inputs, XlaOp filters, XlaOp gradient);

}  // namespace fusedconvbn::xla
