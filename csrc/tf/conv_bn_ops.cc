// Definitions and shape functions of FusedConvBN and FusedConvBNGrad.
#include <algorithm>
#include <string>
#include <vector>

#include "attributes.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace fusedconvbn::tf {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// The shape of an input; null where the op has no such input.
absl::Status find(InferenceContext* c, const char* name, bool* found, ShapeHandle* shape) {
  std::vector<ShapeHandle> shapes;
  TF_RETURN_IF_ERROR(c->input(name, &shapes));
  *found = !shapes.empty();
  if (*found) *shape = shapes[0];
  return absl::OkStatus();
}

absl::Status refuse(InferenceContext* c, const char* name, const std::string& accepted, ShapeHandle shape) {
  return invalid(absl::StrCat(name, " must be ", accepted, ". Received: shape ", c->DebugString(shape)));
}

absl::Status find_image(InferenceContext* c, const char* name, ShapeHandle* shape) {
  bool found = false;
  ShapeHandle any;
  TF_RETURN_IF_ERROR(find(c, name, &found, &any));
  return c->WithRank(any, 4, shape).ok() ? absl::OkStatus() : refuse(c, name, "a tensor of rank 4", any);
}

// A [K] for each name; what is known of K comes back in *channels.
absl::Status merge_vectors(InferenceContext* c, std::initializer_list<const char*> names, DimensionHandle* channels) {
  for (const char* name : names) {
    bool found = false;
    ShapeHandle shape, merged;
    TF_RETURN_IF_ERROR(find(c, name, &found, &shape));
    if (!c->Merge(shape, c->Vector(*channels), &merged).ok())
      return refuse(c, name, absl::StrCat("of shape [", c->DebugString(*channels), "]"), shape);
    *channels = c->Dim(merged, 0);
  }
  return absl::OkStatus();
}

// *shape becomes what is known of it and of the input, if the op has one of that name.
absl::Status merge_image(InferenceContext* c, const char* name, ShapeHandle* shape) {
  bool found = false;
  ShapeHandle other, merged;
  TF_RETURN_IF_ERROR(find(c, name, &found, &other));
  if (!found) return absl::OkStatus();
  if (!c->Merge(*shape, other, &merged).ok())
    return refuse(c, name, absl::StrCat("of the output's shape ", c->DebugString(*shape)), other);
  *shape = merged;
  return absl::OkStatus();
}

absl::Status check_scalar(InferenceContext* c, const char* name) {
  bool found = false;
  ShapeHandle shape, scalar;
  TF_RETURN_IF_ERROR(find(c, name, &found, &shape));
  return c->WithRank(shape, 0, &scalar).ok() ? absl::OkStatus() : refuse(c, name, "a scalar", shape);
}

// Sizes of which some are unknown. Each unknown one is replaced by one that fits the known ones, so that the core's
// rule finds the errors, and only those, that the known sizes have.
struct Sizes {
  Sizes(InferenceContext* c, ShapeHandle shape) {
    for (int i = 0; i < 4; ++i) known[i] = c->ValueKnown(c->Dim(shape, i)), value[i] = c->Value(c->Dim(shape, i));
  }
  void assume(int axis, int64_t size) {
    if (!known[axis]) value[axis] = std::max<int64_t>(size, 1);
  }
  std::array<bool, 4> known;
  std::array<int64_t, 4> value;
};

int64_t window(int64_t taps, int64_t dilation) {  // unsigned: a product that overflows is refused by the core
  return static_cast<int64_t>((static_cast<uint64_t>(taps) - 1) * static_cast<uint64_t>(dilation) + 1);
}

void assume_unknown(const Axes& axes, const Problem& problem, Sizes* inputs, Sizes* filters) {
  const ConvArguments& arguments = problem.arguments;
  for (int i : {0, 1}) filters->assume(i, problem.params.algorithm == Algorithm::kWinograd2 ? 3 : 1);
  inputs->assume(0, 1);
  inputs->assume(axes.height, window(filters->value[0], arguments.dilations[0]));
  inputs->assume(axes.width, window(filters->value[1], arguments.dilations[1]));
  filters->assume(2, inputs->known[axes.channels] ? inputs->value[axes.channels] : 1);
  inputs->assume(axes.channels, filters->value[2]);
  filters->assume(3, inputs->value[axes.channels] / std::max<int64_t>(filters->value[2], 1));
}

// The output's shape as far as it is known.
absl::Status infer_output(InferenceContext* c, ShapeHandle inputs, ShapeHandle filters, DimensionHandle channels,
                          Problem problem, ShapeHandle* output) {
  const Axes axes(problem.params.data_format);
  Sizes in(c, inputs), taps(c, filters);
  assume_unknown(axes, problem, &in, &taps);
  problem.arguments.inputs_shape = in.value;
  problem.arguments.filters_shape = taps.value;
  TF_RETURN_IF_ERROR(to_absl(resolve(problem.arguments, &problem.params)));
  const bool same = problem.arguments.padding == Padding::kSame;
  auto size = [&](int axis, int tap, int64_t value) {
    return c->MakeDim(in.known[axis] && (same || taps.known[tap]) ? value : InferenceContext::kUnknownDim);
  };
  const DimensionHandle batch = c->Dim(inputs, 0), height = size(axes.height, 0, problem.params.out_height),
                        width = size(axes.width, 1, problem.params.out_width);
  *output = problem.params.data_format == DataFormat::kNHWC ? c->MakeShape({batch, height, width, channels})
                                                            : c->MakeShape({batch, channels, height, width});
  return absl::OkStatus();
}

ShapeHandle nothing(InferenceContext* c) { return c->MakeShape({0, 0, 0, 0}); }

// conv_out is empty unless `training` is true; what it holds then is for the plan to choose.
ShapeHandle conv_out_shape(InferenceContext* c) {
  const tensorflow::Tensor* training = c->input_tensor(c->num_inputs() - 1);
  const bool inference = training != nullptr && training->NumElements() == 1 && !training->scalar<bool>()();
  return inference ? nothing(c) : c->UnknownShape();
}

absl::Status forward_shapes(InferenceContext* c) {
  Problem problem;
  ShapeHandle inputs, filters, output;
  TF_RETURN_IF_ERROR(read_attributes(c, &problem));
  TF_RETURN_IF_ERROR(find_image(c, "inputs", &inputs));
  TF_RETURN_IF_ERROR(find_image(c, "filters", &filters));
  TF_RETURN_IF_ERROR(check_scalar(c, "training"));
  DimensionHandle channels = c->Dim(filters, 3);
  TF_RETURN_IF_ERROR(merge_vectors(c, {"gamma", "beta", "moving_mean", "moving_variance"}, &channels));
  TF_RETURN_IF_ERROR(infer_output(c, inputs, filters, channels, problem, &output));
  TF_RETURN_IF_ERROR(merge_image(c, "residual", &output));
  TF_RETURN_IF_ERROR(c->set_output("output", {output}));
  for (const char* name : {"new_moving_mean", "new_moving_variance", "batch_mean", "inv_std"})
    TF_RETURN_IF_ERROR(c->set_output(name, {c->Vector(channels)}));
  return c->set_output("conv_out", {conv_out_shape(c)});
}

absl::Status set_gradient(InferenceContext* c, const char* name, const char* needs, ShapeHandle shape) {
  bool needed = false;
  TF_RETURN_IF_ERROR(c->GetAttr(needs, &needed));
  return c->set_output(name, {needed ? shape : nothing(c)});
}

absl::Status gradient_shapes(InferenceContext* c) {
  Problem problem;
  ShapeHandle inputs, filters, output;
  TF_RETURN_IF_ERROR(read_attributes(c, &problem));
  TF_RETURN_IF_ERROR(find_image(c, "inputs", &inputs));
  TF_RETURN_IF_ERROR(find_image(c, "filters", &filters));
  TF_RETURN_IF_ERROR(check_scalar(c, "training"));
  DimensionHandle channels = c->Dim(filters, 3);
  TF_RETURN_IF_ERROR(merge_vectors(c,
                                   {"gamma", "beta", "moving_mean", "moving_variance", "moving_mean_gradient",
                                    "moving_variance_gradient", "batch_mean", "inv_std"},
                                   &channels));
  TF_RETURN_IF_ERROR(infer_output(c, inputs, filters, channels, problem, &output));
  for (const char* name : {"output_gradient", "residual", "output"}) TF_RETURN_IF_ERROR(merge_image(c, name, &output));
  TF_RETURN_IF_ERROR(set_gradient(c, "d_inputs", "needs_inputs", inputs));
  TF_RETURN_IF_ERROR(set_gradient(c, "d_filters", "needs_filters", filters));
  for (const char* name : {"d_gamma", "d_beta", "d_moving_mean", "d_moving_variance"})
    TF_RETURN_IF_ERROR(c->set_output(name, {c->Vector(channels)}));
  if (int residuals = 0; c->GetAttr("num_residual_gradient", &residuals).ok() && residuals > 0)
    return c->set_output("d_residual", {output});
  return absl::OkStatus();
}

}  // namespace

// What both ops have. A macro, as each has to stand in one chain of calls.
#define FUSEDCONVBN_ATTRIBUTES                                                                                   \
  Attr("T: {half, bfloat16, float, double}")                                                                     \
      .Attr("U: {float, double}")                                                                                \
      .Attr("num_residual: int >= 0 = 0")                                                                        \
      .Attr("strides: list(int)")                                                                                \
      .Attr(tensorflow::GetPaddingAttrStringWithExplicit())                                                      \
      .Attr(tensorflow::GetExplicitPaddingsAttrString())                                                         \
      .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")                                                            \
      .Attr("dilations: list(int) = [1, 1, 1, 1]")                                                               \
      .Attr("epsilon: float = 0.001")                                                                            \
      .Attr("momentum: float = 0.99")                                                                            \
      .Attr("unbiased_moving_variance: bool = false")                                                            \
      .Attr("activation: {'none', 'relu', 'relu6', 'leaky_relu', 'elu', 'silu', 'hard_swish', 'gelu'} = 'none'") \
      .Attr("algorithm: {'auto', 'direct', 'winograd2', 'winograd4'} = 'auto'")                                  \
      .Attr("save: {'conv', 'bfloat16', 'recompute'} = 'conv'")

REGISTER_OP("FusedConvBN")
    .Input("inputs: T")
    .Input("filters: T")
    .Input("gamma: U")
    .Input("beta: U")
    .Input("moving_mean: U")
    .Input("moving_variance: U")
    .Input("residual: num_residual * T")
    .Input("training: bool")
    .Output("output: T")
    .Output("new_moving_mean: U")
    .Output("new_moving_variance: U")
    .Output("batch_mean: U")
    .Output("inv_std: U")
    .Output("conv_out: T")
    .FUSEDCONVBN_ATTRIBUTES.SetShapeFn(forward_shapes);

REGISTER_OP("FusedConvBNGrad")
    .Input("output_gradient: T")
    .Input("moving_mean_gradient: U")
    .Input("moving_variance_gradient: U")
    .Input("inputs: T")
    .Input("filters: T")
    .Input("gamma: U")
    .Input("beta: U")
    .Input("moving_mean: U")
    .Input("moving_variance: U")
    .Input("residual: num_residual * T")
    .Input("output: num_output * T")
    .Input("batch_mean: U")
    .Input("inv_std: U")
    .Input("conv_out: T")
    .Input("training: bool")
    .Output("d_inputs: T")
    .Output("d_filters: T")
    .Output("d_gamma: U")
    .Output("d_beta: U")
    .Output("d_moving_mean: U")
    .Output("d_moving_variance: U")
    .Output("d_residual: num_residual_gradient * T")
    .FUSEDCONVBN_ATTRIBUTES.Attr("num_output: int >= 0 = 0")
    .Attr("num_residual_gradient: int >= 0 = 0")
    .Attr("has_residual: bool = false")
    .Attr("needs_inputs: bool = true")
    .Attr("needs_filters: bool = true")
    .SetShapeFn(gradient_shapes);

}  // namespace fusedconvbn::tf
