// The attributes that both ops have, named and laid out as Conv2D's, in the core's terms.
#pragma once

#include <charconv>
#include <string>
#include <vector>

#include "../shape.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.pb.h"
#include "xla/tsl/platform/errors.h"

namespace fusedconvbn::tf {

struct Problem {
  ConvArguments arguments;  // all but the shapes
  ConvBnParams params;
};

inline absl::Status invalid(const std::string& message) { return absl::InvalidArgumentError(message); }
inline absl::Status to_absl(const Status& status) { return status.ok() ? absl::OkStatus() : invalid(status.message); }

// Where the sizes of an image are in its shape.
struct Axes {
  explicit Axes(DataFormat format)
      : height(format == DataFormat::kNHWC ? 1 : 2), width(height + 1), channels(format == DataFormat::kNHWC ? 3 : 1) {}
  int height, width, channels;
};

// Attributes are declared with their choices (conv_bn_ops.cc), so one that is not in the list never gets here. The
// order is that of the core's enums.
inline constexpr const char* kActivations[] = {"none", "relu", "relu6",      "leaky_relu",
                                               "elu",  "silu", "hard_swish", "gelu"};
inline constexpr const char* kAlgorithms[] = {"auto", "direct", "winograd2", "winograd4"};
inline constexpr const char* kSaves[] = {"conv", "bfloat16", "recompute"};
inline constexpr const char* kDataFormats[] = {"NHWC", "NCHW"};
inline constexpr const char* kPaddings[] = {"VALID", "SAME", "EXPLICIT"};

template <class Enum, class Context, size_t N>
absl::Status read_choice(Context* context, const char* name, const char* const (&choices)[N], Enum* result) {
  std::string value;
  TF_RETURN_IF_ERROR(context->GetAttr(name, &value));
  for (size_t i = 0; i < N; ++i) {
    if (value != choices[i]) continue;
    *result = static_cast<Enum>(i);
    return absl::OkStatus();
  }
  return invalid(absl::StrCat(name, " must be one of ", absl::StrJoin(choices, ", "), ". Received: ", value));
}

// TensorFlow's attributes hold a float. The shortest decimal number that it stands for (0.99, not 0.9900000095) is what
// the user wrote, and what the float64 kernels compute with.
template <class Context>
absl::Status read_number(Context* context, const char* name, double* result) {
  float value;
  TF_RETURN_IF_ERROR(context->GetAttr(name, &value));
  char digits[32];
  const char* end = std::to_chars(digits, digits + sizeof(digits), value).ptr;
  std::from_chars(digits, end, *result);
  return absl::OkStatus();
}

// strides, dilations: a number for each dimension of the inputs, 1 for those that no window moves along.
template <class Context>
absl::Status read_steps(Context* context, const char* name, const Axes& axes, std::array<int64_t, 2>* result) {
  std::vector<int64_t> steps;
  TF_RETURN_IF_ERROR(context->GetAttr(name, &steps));
  if (steps.size() != 4 || steps[0] != 1 || steps[axes.channels] != 1)
    return invalid(absl::StrCat(name, " must be 4 integers, 1 for batch and channels. Received: [",
                                absl::StrJoin(steps, ", "), "]"));
  *result = {steps[axes.height], steps[axes.width]};
  return absl::OkStatus();
}

// padding, explicit_paddings: (before, after) of each dimension of the inputs; empty unless padding is EXPLICIT.
template <class Context>
absl::Status read_padding(Context* context, const Axes& axes, ConvArguments* arguments) {
  std::vector<int64_t> pads;
  TF_RETURN_IF_ERROR(read_choice(context, "padding", kPaddings, &arguments->padding));
  TF_RETURN_IF_ERROR(context->GetAttr("explicit_paddings", &pads));
  const size_t wanted = arguments->padding == Padding::kExplicit ? 8 : 0;
  const bool right =
      pads.size() == wanted && (wanted == 0 || (pads[0] == 0 && pads[1] == 0 && pads[2 * axes.channels] == 0 &&
                                                pads[2 * axes.channels + 1] == 0));
  if (!right)
    return invalid(
        absl::StrCat("explicit_paddings must be 8 integers, 0 for batch and channels, if padding is "
                     "EXPLICIT, else empty. Received: [",
                     absl::StrJoin(pads, ", "), "]"));
  if (wanted != 0)
    arguments->explicit_padding = {pads[2 * axes.height], pads[2 * axes.height + 1], pads[2 * axes.width],
                                   pads[2 * axes.width + 1]};
  return absl::OkStatus();
}

template <class Context>
absl::Status read_types(Context* context, DType* dtype) {
  tensorflow::DataType data, stat;
  TF_RETURN_IF_ERROR(context->GetAttr("T", &data));
  TF_RETURN_IF_ERROR(context->GetAttr("U", &stat));
  if ((data == tensorflow::DT_DOUBLE) != (stat == tensorflow::DT_DOUBLE))
    return invalid("gamma, beta, moving_mean and moving_variance must be float64 if inputs are float64, else float32");
  *dtype = data == tensorflow::DT_DOUBLE     ? DType::kFloat64
           : data == tensorflow::DT_HALF     ? DType::kFloat16
           : data == tensorflow::DT_BFLOAT16 ? DType::kBFloat16
                                             : DType::kFloat32;
  return absl::OkStatus();
}

// Context: an OpKernelConstruction or an InferenceContext.
template <class Context>
absl::Status read_attributes(Context* context, Problem* problem) {
  ConvBnParams& p = problem->params;
  TF_RETURN_IF_ERROR(read_types(context, &p.dtype));
  TF_RETURN_IF_ERROR(read_choice(context, "data_format", kDataFormats, &p.data_format));
  const Axes axes(p.data_format);
  TF_RETURN_IF_ERROR(read_steps(context, "strides", axes, &problem->arguments.strides));
  TF_RETURN_IF_ERROR(read_steps(context, "dilations", axes, &problem->arguments.dilations));
  TF_RETURN_IF_ERROR(read_padding(context, axes, &problem->arguments));
  TF_RETURN_IF_ERROR(read_number(context, "epsilon", &p.epsilon));
  TF_RETURN_IF_ERROR(read_number(context, "momentum", &p.momentum));
  TF_RETURN_IF_ERROR(context->GetAttr("unbiased_moving_variance", &p.unbiased_moving_variance));
  TF_RETURN_IF_ERROR(read_choice(context, "activation", kActivations, &p.activation));
  TF_RETURN_IF_ERROR(read_choice(context, "algorithm", kAlgorithms, &p.algorithm));
  return read_choice(context, "save", kSaves, &p.save);
}

// How many tensors a list holds. One at the most, though there could be more.
template <class Context>
absl::Status read_count(Context* context, const char* name, bool needed, bool allowed, int* count) {
  TF_RETURN_IF_ERROR(context->GetAttr(name, count));
  if (*count >= (needed ? 1 : 0) && *count <= (allowed ? 1 : 0)) return absl::OkStatus();
  return invalid(
      absl::StrCat(name, " must be ", needed || !allowed ? (needed ? "1" : "0") : "0 or 1", ". Received: ", *count));
}

inline tensorflow::TensorShape saved_shape(const ConvBnParams& params, Saved saved) {
  tensorflow::TensorShape shape;
  for (int64_t size : conv_out_shape(params, saved)) shape.AddDim(size);
  return shape;
}

// What forward put into a conv_out of that shape: each kind has a rank of its own, or no elements.
inline Saved saved_in(const tensorflow::TensorShape& conv_out) {
  if (conv_out.dims() == 2) return Saved::kMoments;
  if (conv_out.dims() == 1) return Saved::kBFloat16;
  return conv_out.num_elements() == 0 ? Saved::kNothing : Saved::kConv;
}

// What FusedConvBN alone has.
template <class Context>
absl::Status read_forward_attributes(Context* context, ConvBnParams* params) {
  int residuals = 0;
  TF_RETURN_IF_ERROR(read_count(context, "num_residual", false, true, &residuals));
  params->has_residual = residuals > 0;
  return absl::OkStatus();
}

// What FusedConvBNGrad alone has.
struct Wanted {
  bool inputs = true, filters = true, residual = false;  // gradients
};

template <class Context>
absl::Status read_backward_attributes(Context* context, ConvBnParams* params, Wanted* wanted) {
  int unused = 0, outputs = 0, residual_gradients = 0;
  TF_RETURN_IF_ERROR(context->GetAttr("has_residual", &params->has_residual));
  TF_RETURN_IF_ERROR(context->GetAttr("needs_inputs", &wanted->inputs));
  TF_RETURN_IF_ERROR(context->GetAttr("needs_filters", &wanted->filters));
  TF_RETURN_IF_ERROR(read_count(context, "num_residual_gradient", false, true, &residual_gradients));
  TF_RETURN_IF_ERROR(read_count(context, "num_residual", needs_residual(*params), needs_residual(*params), &unused));
  const bool may_read_output = derivative_from_output(params->activation);
  TF_RETURN_IF_ERROR(read_count(context, "num_output", needs_output(*params), may_read_output, &outputs));
  params->has_output = outputs > 0;
  wanted->residual = residual_gradients > 0;
  return absl::OkStatus();
}

}  // namespace fusedconvbn::tf
