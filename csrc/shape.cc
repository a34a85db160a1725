#include "shape.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace fusedconvbn {
namespace {

// Keeps every product of sizes, in bytes and with padding to panels, within int64_t.
constexpr int64_t kMaxElements = int64_t{1} << 48;
constexpr int64_t kMaxTaps = int64_t{1} << 16;  // of a filter: geometry is a list of them

template <class... Sizes>
bool product_fits(int64_t first, Sizes... rest) {
  int64_t product = first;
  bool fits = true;
  ((fits = fits && !__builtin_mul_overflow(product, static_cast<int64_t>(rest), &product)), ...);
  return fits && product <= kMaxElements;
}

std::string text(int64_t value) { return std::to_string(value); }

template <size_t N>
std::string text(const std::array<int64_t, N>& values) {
  std::string result = "[";
  for (size_t i = 0; i < N; ++i) result += (i ? ", " : "") + text(values[i]);
  return result + "]";
}

Status require(bool condition, const std::string& message) { return condition ? Status{} : Status::error(message); }

// Before sums of them are taken.
Status check_sizes(const std::array<int64_t, 4>& inputs_shape) {
  for (int64_t size : inputs_shape)
    if (size < 0 || size > kMaxElements)
      return Status::error("inputs must have no negative size and none over 2^48. Received: shape " +
                           text(inputs_shape));
  return Status{};
}

Status check_steps(const char* name, int64_t height, int64_t width) {
  return require(std::min(height, width) >= 1 && std::max(height, width) <= kMaxElements,
                 std::string(name) + " must be positive integers (height, width), at most 2^48. Received: (" +
                     text(height) + ", " + text(width) + ")");
}

Status check_padding(int64_t top, int64_t bottom, int64_t left, int64_t right) {
  for (int64_t pad : {top, bottom, left, right})
    if (pad < 0 || pad > kMaxElements)
      return Status::error(
          "padding must be [(top, bottom), (left, right)] with no negative value and none over 2^48. Received: [(" +
          text(top) + ", " + text(bottom) + "), (" + text(left) + ", " + text(right) + ")]");
  return Status{};
}

Status check_channels(const ConvArguments& a, int64_t channels) {
  const int64_t per_group = a.filters_shape[2], out = a.filters_shape[3];
  const std::string got = " Received: filters of shape " + text(a.filters_shape) + ", inputs of shape " +
                          text(a.inputs_shape) + " with " + text(channels) + " channels";
  for (int64_t size : a.filters_shape)
    if (size < 1)
      return Status::error("filters must be [height, width, in_channels / groups, out_channels], each at least 1." +
                           got);
  if (channels < 1) return Status::error("inputs must have at least 1 channel." + got);
  if (channels % per_group != 0)
    return Status::error(
        "filters.shape[2] must divide the number of channels of inputs (their quotient is the number of groups)." +
        got);
  return require(out % (channels / per_group) == 0, "filters.shape[3] must be a multiple of the number of groups, " +
                                                        text(channels / per_group) + "." + got);
}

void pad(Padding padding, int64_t in, int64_t filter, int64_t stride, int64_t dilation, const int64_t* explicit_pads,
         int64_t* before, int64_t* after) {
  std::pair<int64_t, int64_t> both{0, 0};
  if (padding == Padding::kSame) both = same_padding(in, filter, stride, dilation);
  if (padding == Padding::kExplicit) both = {explicit_pads[0], explicit_pads[1]};
  *before = both.first;
  *after = both.second;
}

}  // namespace

std::pair<int64_t, int64_t> same_padding(int64_t in, int64_t filter, int64_t stride, int64_t dilation) {
  const int64_t out = in / stride + (in % stride != 0);
  const int64_t total = std::max<int64_t>(0, (out - 1) * stride + (filter - 1) * dilation + 1 - in);
  return {total / 2, total - total / 2};
}

int64_t output_size(int64_t in, int64_t filter, int64_t stride, int64_t dilation, int64_t pad_before,
                    int64_t pad_after) {
  return (in + pad_before + pad_after - ((filter - 1) * dilation + 1) + stride) / stride;  // TensorFlow's rounding
}

Status resolve(const ConvArguments& a, ConvBnParams* p) {
  const auto& in = a.inputs_shape;
  if (Status s = check_sizes(in); !s.ok()) return s;
  const bool nhwc = p->data_format == DataFormat::kNHWC;
  p->batch = in[0];
  p->in_height = in[nhwc ? 1 : 2];
  p->in_width = in[nhwc ? 2 : 3];
  p->in_channels = in[nhwc ? 3 : 1];
  if (Status s = check_channels(a, p->in_channels); !s.ok()) return s;
  p->filter_height = a.filters_shape[0];
  p->filter_width = a.filters_shape[1];
  p->out_channels = a.filters_shape[3];
  p->groups = p->in_channels / a.filters_shape[2];
  p->stride_height = a.strides[0];
  p->stride_width = a.strides[1];
  p->dilation_height = a.dilations[0];
  p->dilation_width = a.dilations[1];
  if (Status s = check_steps("strides", p->stride_height, p->stride_width); !s.ok()) return s;
  if (Status s = check_steps("dilations", p->dilation_height, p->dilation_width); !s.ok()) return s;
  if (!product_fits(p->filter_height, p->dilation_height) || !product_fits(p->filter_width, p->dilation_width))
    return Status::error("filters and dilations make a window that is too large. Received: filters of shape " +
                         text(a.filters_shape) + ", dilations " + text(a.dilations));
  const auto& pads = a.explicit_padding;
  if (Status s = check_padding(pads[0], pads[1], pads[2], pads[3]); !s.ok()) return s;
  pad(a.padding, p->in_height, p->filter_height, p->stride_height, p->dilation_height, &pads[0], &p->pad_top,
      &p->pad_bottom);
  pad(a.padding, p->in_width, p->filter_width, p->stride_width, p->dilation_width, &pads[2], &p->pad_left,
      &p->pad_right);
  p->out_height =
      output_size(p->in_height, p->filter_height, p->stride_height, p->dilation_height, p->pad_top, p->pad_bottom);
  p->out_width =
      output_size(p->in_width, p->filter_width, p->stride_width, p->dilation_width, p->pad_left, p->pad_right);
  return validate(*p);
}

Status validate(const ConvBnParams& p) {
  if (Status s = check_padding(p.pad_top, p.pad_bottom, p.pad_left, p.pad_right); !s.ok()) return s;
  const std::string sizes = "inputs of height " + text(p.in_height) + " and width " + text(p.in_width) +
                            ", filters of height " + text(p.filter_height) + " and width " + text(p.filter_width);
  if (p.out_height < 0 || p.out_width < 0)
    return Status::error("filters must not be larger than the padded inputs. Received: " + sizes + ", padding [(" +
                         text(p.pad_top) + ", " + text(p.pad_bottom) + "), (" + text(p.pad_left) + ", " +
                         text(p.pad_right) + ")], dilations (" + text(p.dilation_height) + ", " +
                         text(p.dilation_width) + ")");
  if (!product_fits(p.batch, p.in_height, p.in_width, p.in_channels) ||
      !product_fits(p.batch, p.out_height, p.out_width, p.out_channels) ||
      !product_fits(p.filter_height, p.filter_width, p.group_in(), p.out_channels) ||
      !product_fits(p.in_height + p.pad_top + p.pad_bottom, p.in_width + p.pad_left + p.pad_right))
    return Status::error("inputs, filters and output must have at most 2^48 elements. Received: batch " +
                         text(p.batch) + ", " + sizes + ", " + text(p.in_channels) + " input channels, " +
                         text(p.out_channels) + " output channels");
  if (p.taps() > kMaxTaps)
    return Status::error("filters must have at most 2^16 positions. Received: height " + text(p.filter_height) +
                         ", width " + text(p.filter_width));
  if (!(std::isfinite(p.epsilon) && p.epsilon >= 0))
    return Status::error("epsilon must be a finite number, at least 0. Received: " + std::to_string(p.epsilon));
  if (!(p.momentum >= 0 && p.momentum <= 1))
    return Status::error("momentum must be a number from 0 to 1. Received: " + std::to_string(p.momentum));
  const bool winograd = p.algorithm == Algorithm::kWinograd2 || p.algorithm == Algorithm::kWinograd4;
  if (winograd && !winograd_applies(p))
    return Status::error(
        "algorithm must be \"auto\" or \"direct\" unless the filters are 3x3 with strides, dilations and groups of 1. "
        "Received: " +
        std::string(p.algorithm == Algorithm::kWinograd2 ? "\"winograd2\", " : "\"winograd4\", ") + sizes + ", " +
        text(p.groups) + " groups");
  if (p.saved == Saved::kBFloat16 && p.dtype != DType::kFloat32)
    return Status::error(
        "conv_out must be of the output's shape or [C + 2, C] unless inputs are float32. Received: rank 1");
  return Status{};
}

bool winograd_applies(const ConvBnParams& p) {
  return p.filter_height == 3 && p.filter_width == 3 && p.stride_height == 1 && p.stride_width == 1 &&
         p.dilation_height == 1 && p.dilation_width == 1 && p.groups == 1;
}

std::array<int64_t, 4> output_shape(const ConvBnParams& p) {
  if (p.data_format == DataFormat::kNHWC) return {p.batch, p.out_height, p.out_width, p.out_channels};
  return {p.batch, p.out_channels, p.out_height, p.out_width};
}

}  // namespace fusedconvbn
