#include "lowering.h"

#include <algorithm>

#include "activations.h"
#include "convolution.h"
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/constants.h"

namespace fusedconvbn::xla {
namespace {

using ::xla::PrimitiveType;

// Images and vectors of channels, in the type of the statistics.
class Channels {
 public:
  Channels(const ConvBnParams& params, ::xla::XlaBuilder* builder)
      : builder_(builder),
        type_(params.dtype == DType::kFloat64 ? ::xla::F64 : ::xla::F32),
        axis_(params.data_format == DataFormat::kNHWC ? 3 : 1) {}

  XlaOp cast(XlaOp image) const { return ::xla::ConvertElementType(image, type_); }

  XlaOp add(XlaOp image, XlaOp vector) const { return ::xla::Add(image, vector, {axis_}); }
  XlaOp subtract(XlaOp image, XlaOp vector) const { return ::xla::Sub(image, vector, {axis_}); }
  XlaOp scale(XlaOp image, XlaOp vector) const { return ::xla::Mul(image, vector, {axis_}); }

  // Over all axes but the channels'.
  XlaOp sum(XlaOp image) const {
    const int64_t spatial = axis_ == 3 ? 1 : 2;
    return ::xla::Reduce(image, ::xla::Zero(builder_, type_), ::xla::CreateScalarAddComputation(type_, builder_),
                         {0, spatial, spatial + 1});
  }

 private:
  ::xla::XlaBuilder* const builder_;
  const PrimitiveType type_;
  const int64_t axis_;
};

PrimitiveType type_of(XlaOp op) { return op.builder()->GetShape(op).value().element_type(); }

XlaOp times(XlaOp x, double factor) { return x * ScalarLike(x, factor); }

// `then` in training, else `otherwise`: as the program is compiled, or as it runs. A batch without pixels has no
// statistics.
XlaOp in_training(const ConvBnParams& params, const std::optional<XlaOp>& training, XlaOp then, XlaOp otherwise) {
  if (params.pixels() == 0 || !(training || params.training)) return otherwise;
  if (!training) return then;
  const auto sizes = then.builder()->GetShape(then).value().dimensions();
  return ::xla::Select(::xla::Broadcast(*training, sizes), then, otherwise);
}

// z as it is saved, rounded to the data type. Not by two conversions, which XLA may take for none.
XlaOp rounded(const ConvBnParams& params, XlaOp z) {
  if (params.dtype == DType::kBFloat16) return ::xla::ReducePrecision(z, 8, 7);
  return params.dtype == DType::kFloat16 ? ::xla::ReducePrecision(z, 5, 10) : z;
}

XlaOp z_again(const ConvBnParams& params, const BackwardOps& ops) {
  const XlaOp z = convolve(params, ops.inputs, ops.filters);
  return in_training(params, ops.training, rounded(params, z), z);
}

// n / (n - 1), by which the moving variance may count.
double sample_factor(const ConvBnParams& params) {
  const double count = static_cast<double>(params.pixels());
  return params.unbiased_moving_variance ? count / std::max(count - 1, 1.0) : 1.0;
}

double reciprocal_count(const ConvBnParams& params) {
  return 1.0 / static_cast<double>(std::max<int64_t>(params.pixels(), 1));
}

}  // namespace

std::vector<XlaOp> lower_forward(const ConvBnParams& p, const ForwardOps& ops) {
  const Channels channels(p, ops.inputs.builder());
  const XlaOp z = convolve(p, ops.inputs, ops.filters), saved = rounded(p, z);
  const XlaOp x = in_training(p, ops.training, saved, z);
  // Two passes: with a large mean, one that subtracts its square has nothing left.
  const XlaOp batch_mean = times(channels.sum(x), reciprocal_count(p));
  const XlaOp centered = channels.subtract(x, batch_mean);
  const XlaOp batch_variance = times(channels.sum(centered * centered), reciprocal_count(p));
  const auto choose = [&](XlaOp then, XlaOp otherwise) { return in_training(p, ops.training, then, otherwise); };
  const auto moved = [&](XlaOp moving, XlaOp batch) {
    return choose(times(moving, p.momentum) + times(batch, 1 - p.momentum), moving);
  };
  const XlaOp mean = choose(batch_mean, ops.moving_mean), variance = choose(batch_variance, ops.moving_variance);
  const XlaOp inv_std = ::xla::Rsqrt(variance + ScalarLike(variance, p.epsilon));
  XlaOp u = channels.add(channels.scale(channels.subtract(x, mean), inv_std * ops.gamma), ops.beta);
  if (ops.residual) u = u + channels.cast(*ops.residual);
  const PrimitiveType data = type_of(ops.inputs);
  return {::xla::ConvertElementType(activate(p.activation, u), data),
          moved(ops.moving_mean, batch_mean),
          moved(ops.moving_variance, times(batch_variance, sample_factor(p))),
          mean,
          inv_std,
          ::xla::ConvertElementType(saved, data)};
}

std::vector<XlaOp> lower_backward(const ConvBnParams& p, const BackwardOps& ops) {
  const Channels channels(p, ops.inputs.builder());
  const auto choose = [&](XlaOp then, XlaOp otherwise) { return in_training(p, ops.training, then, otherwise); };
  const XlaOp z = ops.z ? channels.cast(*ops.z) : z_again(p, ops);
  const XlaOp normalized = channels.scale(channels.subtract(z, ops.batch_mean), ops.inv_std);
  XlaOp slope;
  if (needs_output(p)) {
    slope = derivative_of_output(p.activation, channels.cast(*ops.output));
  } else {
    XlaOp u = channels.add(channels.scale(normalized, ops.gamma), ops.beta);
    if (ops.residual) u = u + channels.cast(*ops.residual);
    slope = derivative(p.activation, u);
  }
  const XlaOp du = channels.cast(ops.output_gradient) * slope;
  const XlaOp d_beta = channels.sum(du), d_gamma = channels.sum(du * normalized);
  const XlaOp scale = ops.gamma * ops.inv_std;

  // Through the statistics of the batch: those that normalize it, and those that move the moving ones.
  const double per_pixel = reciprocal_count(p), moves = 1 - p.momentum;
  const XlaOp through_mean = times(times(ops.moving_mean_gradient, moves) - scale * d_beta, per_pixel);
  const XlaOp of_variance = times(ops.moving_variance_gradient, 2 * moves * sample_factor(p)) / ops.inv_std;
  const XlaOp through_variance = times(of_variance - scale * d_gamma, per_pixel);
  const XlaOp zeros = ::xla::ZerosLike(through_mean);
  XlaOp dz = channels.scale(du, scale);
  dz = dz + channels.scale(normalized, choose(through_variance, zeros));
  dz = channels.add(dz, choose(through_mean, zeros));

  const XlaOp of_moving_variance = times(scale * ops.inv_std * d_gamma, -0.5);
  return {gradient_of_inputs(p, ops.inputs, ops.filters, dz),
          gradient_of_filters(p, ops.inputs, ops.filters, dz),
          d_gamma,
          d_beta,
          choose(times(ops.moving_mean_gradient, p.momentum), ops.moving_mean_gradient - scale * d_beta),
          choose(times(ops.moving_variance_gradient, p.momentum), ops.moving_variance_gradient + of_moving_variance),
          ::xla::ConvertElementType(du, type_of(ops.inputs))};
}

}  // namespace fusedconvbn::xla
