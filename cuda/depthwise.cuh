// The convolution and its gradients for groups of one input channel: nothing to be shared among threads but through the
// caches, so a thread has an element; of the filters' gradient a block has a range of pixels, as of other channel sums.
// Padding is multiplied, too: 0 times infinity is NaN, as in other convolutions.
#pragma once

#include "channel_sums.cuh"
#include "convolve.cuh"

namespace fusedconvbn::cuda {

template <class T, class Epilogue>
__global__ void __launch_bounds__(kThreads)
    depthwise_forward(Windows w, int64_t elements, const T* inputs, const T* filters, Epilogue epilogue) {
  using C = Compute<T>;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= elements) return;
  const int64_t k = w.output.channel_of(at);
  const Pixel pixel = pixel_of(w.output.pixel_of(at), w.output, w.out_width, w.input);
  const T* const image = inputs + pixel.image + k / w.group_out * w.input.channel;
  C sum = 0;
  for (int tap = 0; tap < w.taps; ++tap) {
    const int64_t from = input_at(pixel, tap_of(tap, w), w);
    sum += (from < 0 ? C(0) : load(image + from)) * load(filters + tap * w.out_channels + k);
  }
  epilogue.emit(at, k, sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_dgrad(Windows w, int64_t elements, const Compute<T>* z_gradient, const T* filters, T* d_inputs) {
  using C = Compute<T>;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= elements) return;
  const int64_t first = w.input.channel_of(at) * w.group_out;
  const Pixel pixel = pixel_of(w.input.pixel_of(at), w.input, w.in_width, w.output);
  C sum = 0;
  for (int tap = 0; tap < w.taps; ++tap) {
    const int64_t from = output_at(pixel, tap_of(tap, w), w);
    for (int64_t k = first; k < first + w.group_out; ++k)
      sum += (from < 0 ? C(0) : z_gradient[pixel.image + from + k * w.output.channel]) *
             load(filters + tap * w.out_channels + k);
  }
  store(sum, d_inputs + at);
}

// sums: [ranges][kh,kw,1,K].
template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_wgrad(Windows w, Ranges ranges, const T* inputs, const Compute<T>* z_gradient, Compute<T>* sums) {
  using C = Compute<T>;
  __shared__ C shared[kThreads];
  const int tap = blockIdx.x % w.taps;
  const Share s = share_of(ranges, w.output.channels_last(), blockIdx.x / w.taps, threadIdx.x);
  const int64_t channel = s.channel / w.group_out * w.input.channel;
  C sum = 0;
  if (s.inside)
    for (int64_t p = s.begin + s.lane; p < s.end; p += s.lanes) {
      const Pixel pixel = pixel_of(p, w.output, w.out_width, w.input);
      const int64_t from = input_at(pixel, tap_of(tap, w), w);
      sum += (from < 0 ? C(0) : load(inputs + pixel.image + from + channel)) *
             z_gradient[w.output.of_pixel(p) + s.channel * w.output.channel];
    }
  sum = sum_of_lanes(sum, s, shared);
  if (s.inside && s.lane == 0) sums[(s.range * w.taps + tap) * w.out_channels + s.channel] = sum;
}

}  // namespace fusedconvbn::cuda
