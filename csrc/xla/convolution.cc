#include "convolution.h"

#include <array>
#include <utility>
#include <vector>

#include "../shape.h"
#include "xla/hlo/builder/lib/constants.h"

namespace fusedconvbn::xla {
namespace {

using ::xla::ConvolutionDimensionNumbers;
using ::xla::PrimitiveType;

// Where the axes of an image are in its shape, and of filters [kh,kw,C/groups,K].
struct ImageAxes {
  explicit ImageAxes(DataFormat format)
      : height(format == DataFormat::kNHWC ? 1 : 2), channels(format == DataFormat::kNHWC ? 3 : 1) {}
  int64_t batch = 0, height, channels;
};

void set_spatial(ConvolutionDimensionNumbers* axes, int64_t input, int64_t kernel, int64_t output) {
  for (int i : {0, 1}) {
    axes->add_input_spatial_dimensions(input + i);
    axes->add_kernel_spatial_dimensions(kernel + i);
    axes->add_output_spatial_dimensions(output + i);
  }
}

// Of images, filters [kh,kw,in,out] and images.
ConvolutionDimensionNumbers image_axes(DataFormat format) {
  const ImageAxes image(format);
  ConvolutionDimensionNumbers axes;
  axes.set_input_batch_dimension(image.batch);
  axes.set_input_feature_dimension(image.channels);
  axes.set_kernel_input_feature_dimension(2);
  axes.set_kernel_output_feature_dimension(3);
  axes.set_output_batch_dimension(image.batch);
  axes.set_output_feature_dimension(image.channels);
  set_spatial(&axes, image.height, 0, image.height);
  return axes;
}

struct Window {
  std::vector<int64_t> strides{1, 1}, lhs_dilation{1, 1}, rhs_dilation{1, 1};
  std::vector<std::pair<int64_t, int64_t>> padding;
  int64_t feature_groups = 1, batch_groups = 1;
};

PrimitiveType sums(const ConvBnParams& params) { return params.dtype == DType::kFloat64 ? ::xla::F64 : ::xla::F32; }

PrimitiveType type_of(XlaOp op) { return op.builder()->GetShape(op).value().element_type(); }

XlaOp convolution(const ConvBnParams& params, XlaOp lhs, XlaOp rhs, const Window& window,
                  const ConvolutionDimensionNumbers& axes) {
  return ::xla::ConvGeneralDilated(
      ::xla::ConvertElementType(lhs, sums(params)), ::xla::ConvertElementType(rhs, sums(params)), window.strides,
      window.padding, window.lhs_dilation, window.rhs_dilation, axes, window.feature_groups, window.batch_groups);
}

// What the formulas below need of height and of width.
struct Line {
  int64_t in, out, taps, stride, dilation, pad;
  int64_t window() const { return (taps - 1) * dilation + 1; }
  int64_t spread() const { return (out - 1) * stride + 1; }  // outputs with the stride's zeros between
};

std::vector<Line> lines(const ConvBnParams& p) {
  return {{p.in_height, p.out_height, p.filter_height, p.stride_height, p.dilation_height, p.pad_top},
          {p.in_width, p.out_width, p.filter_width, p.stride_width, p.dilation_width, p.pad_left}};
}

// [kh,kw,C/groups,K] -> [kh,kw,K/groups,C]: what the transposed convolution multiplies, its taps in reverse.
XlaOp transposed(const ConvBnParams& p, XlaOp filters) {
  const int64_t h = p.filter_height, w = p.filter_width, in = p.group_in(), out = p.group_out();
  const XlaOp grouped = ::xla::Reshape(filters, {h, w, in, p.groups, out});
  const XlaOp turned = ::xla::Transpose(grouped, {0, 1, 4, 3, 2});
  return ::xla::Rev(::xla::Reshape(turned, {h, w, out, p.in_channels}), {0, 1});
}

XlaOp zeros(const ConvBnParams& params, XlaOp like, const std::vector<int64_t>& shape) {
  return ::xla::Broadcast(::xla::Zero(like.builder(), sums(params)), shape);
}

}  // namespace

XlaOp convolve(const ConvBnParams& p, XlaOp inputs, XlaOp filters) {
  if (p.pixels() == 0) {
    const std::array<int64_t, 4> shape = output_shape(p);
    return zeros(p, inputs, {shape.begin(), shape.end()});
  }
  Window window;
  window.strides = {p.stride_height, p.stride_width};
  window.rhs_dilation = {p.dilation_height, p.dilation_width};
  // Behind, as much as the windows reach: what is left over, or lacks where none fits, is not read.
  for (const Line& line : lines(p))
    window.padding.push_back({line.pad, line.spread() + line.window() - 1 - line.in - line.pad});
  window.feature_groups = p.groups;
  return convolution(p, inputs, filters, window, image_axes(p.data_format));
}

XlaOp gradient_of_inputs(const ConvBnParams& p, XlaOp inputs, XlaOp filters, XlaOp gradient) {
  if (p.pixels() == 0) return ::xla::ZerosLike(inputs);
  Window window;
  window.lhs_dilation = {p.stride_height, p.stride_width};
  window.rhs_dilation = {p.dilation_height, p.dilation_width};
  for (const Line& line : lines(p)) {
    const int64_t before = line.window() - 1 - line.pad;
    window.padding.push_back({before, line.in + line.window() - 1 - line.spread() - before});
  }
  window.feature_groups = p.groups;
  const XlaOp result = convolution(p, gradient, transposed(p, filters), window, image_axes(p.data_format));
  return ::xla::ConvertElementType(result, type_of(inputs));
}

// A convolution of the inputs with the gradient, both with batch and channels in each other's place.
XlaOp gradient_of_filters(const ConvBnParams& p, XlaOp inputs, XlaOp filters, XlaOp gradient) {
  if (p.pixels() == 0) return ::xla::ZerosLike(filters);
  const ImageAxes image(p.data_format);
  ConvolutionDimensionNumbers axes;
  axes.set_input_batch_dimension(image.channels);
  axes.set_input_feature_dimension(image.batch);
  axes.set_kernel_input_feature_dimension(image.batch);
  axes.set_kernel_output_feature_dimension(image.channels);
  axes.set_output_batch_dimension(2);
  axes.set_output_feature_dimension(3);
  set_spatial(&axes, image.height, image.height, 0);
  Window window;
  window.strides = {p.dilation_height, p.dilation_width};
  window.rhs_dilation = {p.stride_height, p.stride_width};
  for (const Line& line : lines(p))
    window.padding.push_back({line.pad, line.window() - 1 + line.spread() - line.in - line.pad});
  window.batch_groups = p.groups;
  return ::xla::ConvertElementType(convolution(p, inputs, gradient, window, axes), type_of(filters));
}

}  // namespace fusedconvbn::xla
