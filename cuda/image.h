// Where elements of images lie, and which pixels a window reads.
#pragma once

#include "element.h"

namespace fusedconvbn::cuda {

// An image [N,H,W,C] or [N,C,H,W]; distances in elements. Pixels are numbered through all images.
struct Layout {
  int64_t pixels, channels;       // of an image; of a pixel
  int64_t image, pixel, channel;  // distances of neighbours

  static Layout of(DataFormat format, int64_t height, int64_t width, int64_t channels) {
    const int64_t pixels = height * width;
    const bool last = format == DataFormat::kNHWC;
    return {pixels, channels, pixels * channels, last ? channels : 1, last ? 1 : pixels};
  }
  FCB_INLINE_MEMBER int64_t of_pixel(int64_t number) const { return number / pixels * image + number % pixels * pixel; }
  FCB_INLINE_MEMBER int64_t channel_of(int64_t element) const { return element / channel % channels; }
  FCB_INLINE_MEMBER int64_t pixel_of(int64_t element) const {
    return element / image * pixels + element % image / pixel % pixels;
  }
  FCB_INLINE_MEMBER bool channels_last() const { return channel == 1; }
};

inline Layout input_layout(const ConvBnParams& p) {
  return Layout::of(p.data_format, p.in_height, p.in_width, p.in_channels);
}
inline Layout output_layout(const ConvBnParams& p) {
  return Layout::of(p.data_format, p.out_height, p.out_width, p.out_channels);
}

}  // namespace fusedconvbn::cuda
