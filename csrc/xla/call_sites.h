// The custom calls in a program.
#pragma once

#include <optional>
#include <vector>

#include "../conv_bn.h"
#include "absl/status/statusor.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape.h"

namespace fusedconvbn::xla {

// Where in a program the op stands. Operands and results are row-major.
struct CallSite {
  bool backward = false;
  std::vector<::xla::XlaOp> operands;
  std::vector<::xla::Shape> operand_shapes, result_shapes;
};

// The op's results, by kernels of ours.
std::vector<::xla::XlaOp> call_on_cpu(const ConvBnParams& params, const CallSite& site);

// `training`: set if only run time tells it; then the program has two calls, and XLA runs one.
absl::StatusOr<std::vector<::xla::XlaOp>> call_on_gpu(const ConvBnParams& params, const CallSite& site,
                                                      std::optional<::xla::XlaOp> training);

}  // namespace fusedconvbn::xla
