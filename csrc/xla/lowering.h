// Both ops in XLA's own ops, for where none of our kernels runs.
#pragma once

#include <optional>
#include <vector>

#include "../conv_bn.h"
#include "xla/hlo/builder/xla_builder.h"

namespace fusedconvbn::xla {

// As ForwardBuffers. `training`: decides when the program runs; without it params.training does.
struct ForwardOps {
  ::xla::XlaOp inputs, filters, gamma, beta, moving_mean, moving_variance;
  std::optional<::xla::XlaOp> residual, training;
};

// output, new_moving_mean, new_moving_variance, batch_mean, inv_std, and z.
std::vector<::xla::XlaOp> lower_forward(const ConvBnParams& params, const ForwardOps& ops);

// As BackwardBuffers; of output and residual only what is required. `z`: where forward has left it.
struct BackwardOps {
  ::xla::XlaOp output_gradient, moving_mean_gradient, moving_variance_gradient;
  ::xla::XlaOp inputs, filters, gamma, beta, batch_mean, inv_std;
  std::optional<::xla::XlaOp> residual, output, z, training;
};

// d_inputs, d_filters, d_gamma, d_beta, d_moving_mean, d_moving_variance, d_residual. XLA drops what nobody reads.
std::vector<::xla::XlaOp> lower_backward(const ConvBnParams& params, const BackwardOps& ops);

}  // namespace fusedconvbn::xla
