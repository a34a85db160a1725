// The convolution and its gradients as products of matrices (multiply.cuh).
//
//   forward  z[pixel][k]          = sum over (tap, c) of x[pixel at tap][c] w[tap][c][k]
//   dgrad    dx[input pixel][c]   = sum over (tap, k) of dz[output pixel that reads it at tap][k] w[tap][c][k]
//   wgrad    dw[tap, c][k]        = sum over pixels of x[pixel at tap][c] dz[pixel][k], in ranges of pixels
//
// for each group. Sizes of an image and of a filter fit into an int.
#pragma once

#include "image.h"
#include "multiply.cuh"

namespace fusedconvbn::cuda {

// What of ConvBnParams the windows follow from.
struct Windows {
  int64_t group_in, group_out, out_channels, groups, pixels, in_pixels;
  int in_height, in_width, out_height, out_width, filter_width, taps;
  int stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
  Layout input, output;

  explicit Windows(const ConvBnParams& p)
      : group_in(p.group_in()),
        group_out(p.group_out()),
        out_channels(p.out_channels),
        groups(p.groups),
        pixels(p.pixels()),
        in_pixels(p.batch * p.in_height * p.in_width),
        in_height(narrow(p.in_height)),
        in_width(narrow(p.in_width)),
        out_height(narrow(p.out_height)),
        out_width(narrow(p.out_width)),
        filter_width(narrow(p.filter_width)),
        taps(narrow(p.taps())),
        stride_height(narrow(p.stride_height)),
        stride_width(narrow(p.stride_width)),
        dilation_height(narrow(p.dilation_height)),
        dilation_width(narrow(p.dilation_width)),
        pad_top(narrow(p.pad_top)),
        pad_left(narrow(p.pad_left)),
        input(input_layout(p)),
        output(output_layout(p)) {}

  static int narrow(int64_t size) { return static_cast<int>(size); }
};

struct Pixel {
  int64_t image;  // where the image begins that is read for it, in elements
  int height, width;
};
struct Tap {
  int height, width;  // in elements of the input
};

FCB_INLINE Pixel pixel_of(int64_t number, const Layout& layout, int width, const Layout& read) {
  const int rest = static_cast<int>(number % layout.pixels);
  return {number / layout.pixels * read.image, rest / width, rest % width};
}
FCB_INLINE Tap tap_of(int64_t number, const Windows& w) {
  const int tap = static_cast<int>(number);
  return {tap / w.filter_width * w.dilation_height, tap % w.filter_width * w.dilation_width};
}

// Where the input that output pixel `p` reads at `tap` lies; -1: padding.
FCB_INLINE int64_t input_at(const Pixel& p, const Tap& tap, const Windows& w) {
  const int64_t h = int64_t{p.height} * w.stride_height + tap.height - w.pad_top,
                v = int64_t{p.width} * w.stride_width + tap.width - w.pad_left;
  if (h < 0 || h >= w.in_height || v < 0 || v >= w.in_width) return -1;
  return (h * w.in_width + v) * w.input.pixel;
}

// Where the output that reads input pixel `p` at `tap` lies; -1: there is none.
FCB_INLINE int64_t output_at(const Pixel& p, const Tap& tap, const Windows& w) {
  const int64_t h = int64_t{p.height} + w.pad_top - tap.height, v = int64_t{p.width} + w.pad_left - tap.width;
  if (h < 0 || v < 0 || h % w.stride_height != 0 || v % w.stride_width != 0) return -1;
  if (h / w.stride_height >= w.out_height || v / w.stride_width >= w.out_width) return -1;
  return (h / w.stride_height * w.out_width + v / w.stride_width) * w.output.pixel;
}

// Epilogue: emit(element of the output, channel, sum).
template <class T, class Epilogue>
struct ForwardOperands {
  using Sum = Compute<T>;
  static constexpr bool kDepthFirstA = true, kDepthFirstB = false;
  struct Depth {
    int64_t number, channel;
    Tap tap;
  };
  struct Row {
    Pixel pixel;
    int64_t channel;  // of the group's first
  };

  Windows w;
  const T *inputs, *filters;
  Epilogue epilogue;
  int64_t slices = w.groups, rows = w.pixels, cols = w.group_out;

  FCB_INLINE_MEMBER Span depth(int64_t) const { return {0, w.taps * w.group_in}; }
  FCB_INLINE_MEMBER Row row(int64_t group, int64_t r) const {
    return {pixel_of(r, w.output, w.out_width, w.input), group * w.group_in};
  }
  FCB_INLINE_MEMBER Depth at(int64_t, int64_t d) const { return {d, d % w.group_in, tap_of(d / w.group_in, w)}; }
  FCB_INLINE_MEMBER Sum a(const Row& row, const Depth& d) const {
    const int64_t at = input_at(row.pixel, d.tap, w);
    return at < 0 ? Sum(0) : load(inputs + row.pixel.image + at + (row.channel + d.channel) * w.input.channel);
  }
  FCB_INLINE_MEMBER Sum b(int64_t group, const Depth& d, int64_t c) const {
    return load(filters + d.number * w.out_channels + group * w.group_out + c);
  }
  FCB_INLINE_MEMBER void emit(int64_t group, int64_t r, int64_t c, Sum sum) const {
    const int64_t channel = group * w.group_out + c;
    epilogue.emit(w.output.of_pixel(r) + channel * w.output.channel, channel, sum);
  }
};

// The gradient of z is in the compute type.
template <class T>
struct DgradOperands {
  using Sum = Compute<T>;
  static constexpr bool kDepthFirstA = true, kDepthFirstB = true;
  struct Depth {
    int64_t tap_number, channel;
    Tap tap;
  };
  struct Row {
    Pixel pixel;      // of the input
    int64_t channel;  // of the group's first
  };

  Windows w;
  const Sum* z_gradient;
  const T* filters;
  T* d_inputs;
  int64_t slices = w.groups, rows = w.in_pixels, cols = w.group_in;

  FCB_INLINE_MEMBER Span depth(int64_t) const { return {0, w.taps * w.group_out}; }
  FCB_INLINE_MEMBER Row row(int64_t group, int64_t r) const {
    return {pixel_of(r, w.input, w.in_width, w.output), group * w.group_out};
  }
  FCB_INLINE_MEMBER Depth at(int64_t, int64_t d) const {
    return {d / w.group_out, d % w.group_out, tap_of(d / w.group_out, w)};
  }
  FCB_INLINE_MEMBER Sum a(const Row& row, const Depth& d) const {
    const int64_t at = output_at(row.pixel, d.tap, w);
    return at < 0 ? Sum(0) : load(z_gradient + row.pixel.image + at + (row.channel + d.channel) * w.output.channel);
  }
  FCB_INLINE_MEMBER Sum b(int64_t group, const Depth& d, int64_t c) const {
    return load(filters + (d.tap_number * w.group_in + c) * w.out_channels + group * w.group_out + d.channel);
  }
  FCB_INLINE_MEMBER void emit(int64_t group, int64_t r, int64_t c, Sum sum) const {
    store(sum, d_inputs + w.input.of_pixel(r) + (group * w.group_in + c) * w.input.channel);
  }
};

// A slice is a range of pixels and a group; sums of each range lie in a matrix of their own.
template <class T>
struct WgradOperands {
  using Sum = Compute<T>;
  static constexpr bool kDepthFirstA = false, kDepthFirstB = false;
  struct Depth {
    int64_t number;
    Pixel pixel;
  };
  struct Row {
    Tap tap;
    int64_t channel;
  };

  Windows w;
  const T* inputs;
  const Sum* z_gradient;
  Sum* sums;  // [ranges][kh,kw,C/groups,K]
  int64_t ranges;
  int64_t slices = ranges * w.groups, rows = w.taps * w.group_in, cols = w.group_out;

  FCB_INLINE_MEMBER Span depth(int64_t slice) const {
    const int64_t range = slice / w.groups;
    return {range * w.pixels / ranges, (range + 1) * w.pixels / ranges};
  }
  FCB_INLINE_MEMBER Row row(int64_t slice, int64_t r) const {
    return {tap_of(r / w.group_in, w), slice % w.groups * w.group_in + r % w.group_in};
  }
  FCB_INLINE_MEMBER Depth at(int64_t, int64_t d) const { return {d, pixel_of(d, w.output, w.out_width, w.input)}; }
  FCB_INLINE_MEMBER Sum a(const Row& row, const Depth& d) const {
    const int64_t at = input_at(d.pixel, row.tap, w);
    return at < 0 ? Sum(0) : load(inputs + d.pixel.image + at + row.channel * w.input.channel);
  }
  FCB_INLINE_MEMBER Sum b(int64_t slice, const Depth& d, int64_t c) const {
    return load(z_gradient + w.output.of_pixel(d.number) + (slice % w.groups * w.group_out + c) * w.output.channel);
  }
  FCB_INLINE_MEMBER void emit(int64_t slice, int64_t r, int64_t c, Sum sum) const {
    sums[(slice / w.groups * rows + r) * w.out_channels + slice % w.groups * w.group_out + c] = sum;
  }
};

// How many sums of each element of the filters' gradient memory should hold: of 64 MiB, but one.
inline int64_t most_filter_ranges(const ConvBnParams& p) {
  const int64_t bytes = p.taps() * p.group_in() * p.out_channels * static_cast<int64_t>(sizeof(double));
  const int64_t most = bytes == 0 ? 1 : (int64_t{64} << 20) / bytes;
  return most < 1 ? 1 : most;
}

// How many ranges of pixels: fixed by the problem, and the size of tiles. With the tiles some hundred blocks of
// threads, but of `least` pixels or more each.
inline int64_t ranges_for_blocks(const ConvBnParams& p, int64_t tile_rows, int64_t tile_cols, int64_t least) {
  constexpr int64_t kBlocks = 512;
  const int64_t blocks = p.groups * ceil_div(p.taps() * p.group_in(), tile_rows) * ceil_div(p.group_out(), tile_cols);
  const int64_t wanted = blocks == 0 ? 1 : ceil_div(kBlocks, blocks), most = most_filter_ranges(p);
  const int64_t ranges = p.pixels() / least < wanted ? p.pixels() / least : wanted;
  return ranges < 1 ? 1 : ranges < most ? ranges : most;
}
inline int64_t wgrad_ranges(const ConvBnParams& p) { return ranges_for_blocks(p, kTile, kTile, 1024); }

// The sum of the ranges, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_ranges(const Compute<T>* sums, int64_t ranges, int64_t elements, T* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  Compute<T> sum = 0;
  for (int64_t range = 0; range < ranges; ++range) sum += sums[range * elements + i];
  store(sum, to + i);
}

}  // namespace fusedconvbn::cuda
