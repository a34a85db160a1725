// The convolution and its gradients (convolve.cuh) as products on tensor cores (tensor.cuh): NHWC, groups of a multiple
// of 8 channels, so that 8 neighbouring channels of a pixel are a chunk. The gradient of z is of the data's type.
#pragma once

#include "convolve.cuh"
#include "divisor.h"
#include "normalize.cuh"
#include "tensor.cuh"

namespace fusedconvbn::cuda {

constexpr int kFar = -(1 << 29);  // a line or column of an image that is none, and stays so with another one added

// A corner of a window: where its image begins, and a line and a column of it.
template <class T>
struct Corner {
  const T* image;
  int height, width;
};
struct Offset {
  int height, width, channel;
};

// An image as these kernels see it: sizes that fit into an int.
struct Image {
  int height, width, channels;
  int64_t elements;

  static Image input_of(const Windows& w) {
    return {w.in_height, w.in_width, static_cast<int>(w.input.channels), w.input.image};
  }
  static Image output_of(const Windows& w) {
    return {w.out_height, w.out_width, static_cast<int>(w.output.channels), w.output.image};
  }
  FCB_INLINE_MEMBER int64_t at(int line, int column) const { return int64_t{line * width + column} * channels; }
  // The chunk at an offset from a corner; null: outside.
  template <class T>
  FCB_INLINE_MEMBER const T* chunk(const Corner<T>& corner, const Offset& offset) const {
    const int line = corner.height + offset.height, column = corner.width + offset.width;
    if (static_cast<unsigned>(line) >= static_cast<unsigned>(height)) return nullptr;
    if (static_cast<unsigned>(column) >= static_cast<unsigned>(width)) return nullptr;
    return corner.image + (at(line, column) + offset.channel);
  }
};

// From numbers of output pixels, and of (tap, input channel), to corners and offsets of the input.
struct Places {
  Divisor of_image, of_line, of_tap, of_filter_line;
  int stride_height, stride_width, pad_top, pad_left, dilation_height, dilation_width;
  int64_t image;

  explicit Places(const Windows& w)
      : of_image(w.output.pixels),
        of_line(w.out_width),
        of_tap(w.group_in),
        of_filter_line(w.filter_width),
        stride_height(w.stride_height),
        stride_width(w.stride_width),
        pad_top(w.pad_top),
        pad_left(w.pad_left),
        dilation_height(w.dilation_height),
        dilation_width(w.dilation_width),
        image(w.input.image) {}

  template <class T>
  FCB_INLINE_MEMBER Corner<T> corner(const T* images, int pixel) const {
    const int number = of_image.quotient(pixel), rest = of_image.rest(pixel, number), line = of_line.quotient(rest);
    return {images + number * image, line * stride_height - pad_top,
            of_line.rest(rest, line) * stride_width - pad_left};
  }
  FCB_INLINE_MEMBER Offset offset(int number) const {
    const int tap = of_tap.quotient(number), line = of_filter_line.quotient(tap);
    return {line * dilation_height, of_filter_line.rest(tap, line) * dilation_width, of_tap.rest(number, tap)};
  }
};

// Epilogue: of_channels<8>(channel), what it needs of 8 channels; emit(element of the output, that, their sums).
template <class T, class Epilogue>
struct TensorForward {
  using Element = T;
  using LineA = Corner<T>;
  using PointA = Offset;
  using LineB = int;        // -1: none
  using PointB = const T*;  // null: none
  static constexpr bool kDepthFirstA = true, kDepthFirstB = false, kMeasures = Epilogue::kMeasures;

  struct Slice {
    const T *inputs, *filters;  // of the group
    int channel;                // the first of its outputs
    int depth;
  };

  const T *inputs, *filters;
  Epilogue epilogue;
  Image input;
  Places places;
  int64_t slices;
  int rows, cols, group_in, depth, out_channels;

  TensorForward(const Windows& w, const T* inputs, const T* filters, const Epilogue& epilogue)
      : inputs(inputs),
        filters(filters),
        epilogue(epilogue),
        input(Image::input_of(w)),
        places(w),
        slices(w.groups),
        rows(static_cast<int>(w.pixels)),
        cols(static_cast<int>(w.group_out)),
        group_in(static_cast<int>(w.group_in)),
        depth(w.taps * group_in),
        out_channels(static_cast<int>(w.out_channels)) {}

  FCB_INLINE_MEMBER const T* anywhere() const { return inputs; }
  FCB_INLINE_MEMBER Slice slice(int group) const {
    return {inputs + group * group_in, filters + group * cols, group * cols, depth};
  }
  FCB_INLINE_MEMBER LineA line_a(const Slice& s, int r) const {
    return r < rows ? places.corner(s.inputs, r) : Corner<T>{inputs, kFar, kFar};
  }
  FCB_INLINE_MEMBER PointA point_a(const Slice&, int d) const {
    return d < depth ? places.offset(d) : Offset{kFar, kFar, 0};
  }
  FCB_INLINE_MEMBER const T* a(const LineA& line, const PointA& point) const { return input.chunk(line, point); }
  FCB_INLINE_MEMBER LineB line_b(const Slice&, int c) const { return c < cols ? c : -1; }
  FCB_INLINE_MEMBER PointB point_b(const Slice& s, int d) const {
    return d < depth ? s.filters + int64_t{d} * out_channels : nullptr;
  }
  FCB_INLINE_MEMBER const T* b(LineB line, PointB point) const {
    return line < 0 || point == nullptr ? nullptr : point + line;
  }
  FCB_INLINE_MEMBER auto shared_by_rows(const Slice& s, int c) const {
    return epilogue.template of_channels<kEight>(s.channel + c);
  }
  template <class Columns>
  FCB_INLINE_MEMBER void emit(const Slice& s, int r, int c, const Columns& columns, const float (&z)[kEight]) const {
    epilogue.emit(int64_t{r} * out_channels + (s.channel + c), columns, z);
  }
  FCB_DEVICE_MEMBER void measured(const Slice& s, int tile, int c, float first, float sum, float squares) const {
    keep(epilogue.moments, int64_t{tile} * out_channels + s.channel + c, first, sum, squares);
  }
};

// Of one dimension: the input's pixels phase, phase + stride, .., the i-th of which is read by output pixel
// first + i - n back at the n-th of the taps tap, tap + step, ..
struct Phase {
  int first = 0, back = 0, tap = 0, step = 1, taps = 0;
  Divisor by_taps{1};

  static Phase of(int phase, int stride, int dilation, int pad, int taps) {
    Phase p;
    for (int tap = 0; tap < taps; ++tap) {
      const int distance = phase + pad - tap * dilation;
      if (distance % stride != 0) continue;
      if (p.taps == 0) p.first = distance / stride, p.tap = tap;
      if (p.taps == 1) p.step = tap - p.tap, p.back = p.first - distance / stride;
      ++p.taps;
    }
    p.by_taps = Divisor(p.taps);
    return p;
  }
};

// A slice is a group and a phase of the strides: only taps that meet an output are multiplied.
template <class T>
struct TensorDgrad {
  using Element = T;
  using LineA = Corner<T>;
  using PointA = Offset;
  using LineB = int64_t;  // -1: none
  using PointB = const T*;
  static constexpr bool kDepthFirstA = true, kDepthFirstB = true, kMeasures = false;
  static constexpr int kMostStride = 4;

  struct Slice {
    const T *z_gradient, *filters;  // of the group
    T* d_inputs;
    Phase height, width;
    int phase_height, phase_width, depth;
  };

  const T *z_gradient, *filters;
  T* d_inputs;
  Image input, output;
  int stride_height, stride_width, filter_width;
  int64_t slices;
  int lines, columns, rows, cols, group_out;  // lines, columns: of a phase, or one more than it has
  int64_t tap;                                // elements of a tap's filters
  Phase heights[kMostStride], widths[kMostStride];
  Divisor of_image, of_line, of_tap;

  TensorDgrad(const Windows& w, const T* gradient, const T* filters, T* to)
      : z_gradient(gradient),
        filters(filters),
        d_inputs(to),
        input(Image::input_of(w)),
        output(Image::output_of(w)),
        stride_height(w.stride_height),
        stride_width(w.stride_width),
        filter_width(w.filter_width),
        slices(w.groups * w.stride_height * w.stride_width),
        lines((w.in_height + w.stride_height - 1) / w.stride_height),
        columns((w.in_width + w.stride_width - 1) / w.stride_width),
        rows(static_cast<int>(w.in_pixels / w.input.pixels) * lines * columns),
        cols(static_cast<int>(w.group_in)),
        group_out(static_cast<int>(w.group_out)),
        tap(w.group_in * w.out_channels),
        of_image(int64_t{lines} * columns),
        of_line(columns),
        of_tap(group_out) {
    for (int i = 0; i < stride_height; ++i)
      heights[i] = Phase::of(i, stride_height, w.dilation_height, w.pad_top, w.taps / filter_width);
    for (int i = 0; i < stride_width; ++i)
      widths[i] = Phase::of(i, stride_width, w.dilation_width, w.pad_left, filter_width);
  }

  FCB_INLINE_MEMBER const T* anywhere() const { return filters; }
  FCB_INLINE_MEMBER Slice slice(int number) const {
    const int column = number % stride_width, line = number / stride_width % stride_height,
              group = number / stride_width / stride_height;
    return {z_gradient + group * group_out,
            filters + group * group_out,
            d_inputs + group * cols,
            heights[line],
            widths[column],
            line,
            column,
            heights[line].taps * widths[column].taps * group_out};
  }
  FCB_INLINE_MEMBER LineA line_a(const Slice& s, int r) const {
    if (r >= rows) return {z_gradient, kFar, kFar};
    const int image = of_image.quotient(r), rest = of_image.rest(r, image), line = of_line.quotient(rest);
    return {s.z_gradient + image * output.elements, s.height.first + line, s.width.first + of_line.rest(rest, line)};
  }
  FCB_INLINE_MEMBER PointA point_a(const Slice& s, int d) const {
    if (d >= s.depth) return {kFar, kFar, 0};
    const int number = of_tap.quotient(d), line = s.width.by_taps.quotient(number);
    return {-line * s.height.back, -s.width.by_taps.rest(number, line) * s.width.back, of_tap.rest(d, number)};
  }
  FCB_INLINE_MEMBER const T* a(const LineA& line, const PointA& point) const { return output.chunk(line, point); }
  FCB_INLINE_MEMBER LineB line_b(const Slice&, int c) const { return c < cols ? int64_t{c} * output.channels : -1; }
  FCB_INLINE_MEMBER PointB point_b(const Slice& s, int d) const {
    if (d >= s.depth) return nullptr;
    const int number = of_tap.quotient(d), line = s.width.by_taps.quotient(number);
    const int of_filter = (s.height.tap + line * s.height.step) * filter_width + s.width.tap +
                          s.width.by_taps.rest(number, line) * s.width.step;
    return s.filters + (of_filter * tap + of_tap.rest(d, number));
  }
  FCB_INLINE_MEMBER const T* b(LineB line, PointB point) const {
    return line < 0 || point == nullptr ? nullptr : point + line;
  }
  FCB_INLINE_MEMBER None shared_by_rows(const Slice&, int) const { return {}; }
  FCB_INLINE_MEMBER void emit(const Slice& s, int r, int c, None, const float (&sums)[kEight]) const {
    const int image = of_image.quotient(r), rest = of_image.rest(r, image), of_phase = of_line.quotient(rest);
    const int line = of_phase * stride_height + s.phase_height,
              column = of_line.rest(rest, of_phase) * stride_width + s.phase_width;
    if (line >= input.height || column >= input.width) return;
    store_chunk(sums, s.d_inputs + image * input.elements + (input.at(line, column) + c));
  }
};

// A slice is a range of pixels and a group, as in WgradOperands.
template <class T>
struct TensorWgrad {
  using Element = T;
  using LineA = Offset;
  using PointA = Corner<T>;
  using LineB = int;  // -1: none
  using PointB = const T*;
  static constexpr bool kDepthFirstA = false, kDepthFirstB = false, kMeasures = false;

  struct Slice {
    const T *inputs, *z_gradient;  // of the group; z_gradient: of the range
    float* sums;
    int first, depth;
  };

  const T *inputs, *z_gradient;
  float* sums;  // [ranges][kh,kw,C/groups,K]
  Image input;
  Places places;
  int64_t pixels, ranges, slices;
  int groups, rows, cols, group_in, out_channels;

  TensorWgrad(const Windows& w, const T* inputs, const T* gradient, float* sums, int64_t ranges)
      : inputs(inputs),
        z_gradient(gradient),
        sums(sums),
        input(Image::input_of(w)),
        places(w),
        pixels(w.pixels),
        ranges(ranges),
        slices(ranges * w.groups),
        groups(static_cast<int>(w.groups)),
        rows(static_cast<int>(w.taps * w.group_in)),
        cols(static_cast<int>(w.group_out)),
        group_in(static_cast<int>(w.group_in)),
        out_channels(static_cast<int>(w.out_channels)) {}

  FCB_INLINE_MEMBER int begin(int range) const { return static_cast<int>(range * pixels / ranges); }
  FCB_INLINE_MEMBER const T* anywhere() const { return inputs; }
  FCB_INLINE_MEMBER Slice slice(int number) const {
    const int group = number % groups, range = number / groups, first = begin(range);
    return {inputs + group * group_in, z_gradient + int64_t{first} * out_channels + group * cols,
            sums + int64_t{range} * rows * out_channels + group * cols, first, begin(range + 1) - first};
  }
  FCB_INLINE_MEMBER LineA line_a(const Slice&, int r) const {
    return r < rows ? places.offset(r) : Offset{kFar, kFar, 0};
  }
  FCB_INLINE_MEMBER PointA point_a(const Slice& s, int d) const {
    return d < s.depth ? places.corner(s.inputs, s.first + d) : Corner<T>{inputs, kFar, kFar};
  }
  FCB_INLINE_MEMBER const T* a(const LineA& line, const PointA& point) const { return input.chunk(point, line); }
  FCB_INLINE_MEMBER LineB line_b(const Slice&, int c) const { return c < cols ? c : -1; }
  FCB_INLINE_MEMBER PointB point_b(const Slice& s, int d) const {
    return d < s.depth ? s.z_gradient + int64_t{d} * out_channels : nullptr;
  }
  FCB_INLINE_MEMBER const T* b(LineB line, PointB point) const {
    return line < 0 || point == nullptr ? nullptr : point + line;
  }
  FCB_INLINE_MEMBER None shared_by_rows(const Slice&, int) const { return {}; }
  FCB_INLINE_MEMBER void emit(const Slice& s, int r, int c, None, const float (&of)[kEight]) const {
    store_chunk(of, s.sums + int64_t{r} * out_channels + c);
  }
};

inline Tiles forward_tiles(const ConvBnParams& p) { return tiles_for(p.pixels(), p.group_out(), p.groups); }

// Pixels of the tiles that forward measures, and the fewest that they may be.
constexpr int64_t kFewestMeasured = SquareTiles::kRows;
static_assert(NarrowTiles::kRows == SquareTiles::kRows, "the others are as high");
inline int64_t measured_rows(const ConvBnParams& p) {
  return forward_tiles(p) == Tiles::kWide ? WideTiles::kRows : SquareTiles::kRows;
}

// As wgrad_ranges(), of the tiles of the tensor kernel.
inline int64_t tensor_wgrad_ranges(const ConvBnParams& p) {
  return ranges_for_blocks(p, SquareTiles::kRows, p.group_out() > 64 ? SquareTiles::kCols : NarrowTiles::kCols, 256);
}

// Whether the tensor kernels can do it: of 16 bits, and numbers that fit into theirs.
inline bool suits_tensor_cores(const ConvBnParams& p) {
  constexpr int64_t kMost = 1 << 28;
  const bool small = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const bool strides =
      p.stride_height <= TensorDgrad<Half>::kMostStride && p.stride_width <= TensorDgrad<Half>::kMostStride;
  const int64_t lines = p.batch * ceil_div(p.in_height, p.stride_height) * ceil_div(p.in_width, p.stride_width);
  const auto fits = [](int64_t size) { return size < kMost; };
  return small && p.data_format == DataFormat::kNHWC && p.group_in() % kEight == 0 && p.group_out() % kEight == 0 &&
         strides && p.pixels() > 0 && p.group_in() > 0 && p.group_out() > 0 && p.taps() > 0 && fits(p.pixels()) &&
         fits(lines) && fits(p.in_height * p.in_width) && fits(p.in_height + p.pad_top + p.pad_bottom) &&
         fits(p.in_width + p.pad_left + p.pad_right) && fits(p.filter_height * p.dilation_height) &&
         fits(p.filter_width * p.dilation_width) && fits(p.in_channels) && fits(p.out_channels) &&
         fits(p.taps() * p.group_in()) && fits(p.taps() * p.group_out());
}

}  // namespace fusedconvbn::cuda
