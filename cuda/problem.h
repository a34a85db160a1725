// What of a problem all its kernels follow from: sizes, ranges, which kernels can take it, and memory for them.
#pragma once

#include "element.h"

#include <algorithm>
#include <initializer_list>

#include "tensor_convolve.cuh"

namespace fusedconvbn::cuda {

// Hands out memory; of a null base only its size counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class V>
  V* take(int64_t elements) {
    char* const at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += static_cast<size_t>(ceil_div(elements * static_cast<int64_t>(sizeof(V)), 256) * 256);
    return reinterpret_cast<V*>(at);
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

template <class V>
const V* in(const void* buffer) {
  return static_cast<const V*>(buffer);
}
template <class V>
V* out(void* buffer) {
  return static_cast<V*>(buffer);
}

inline int64_t output_elements(const ConvBnParams& p) { return p.pixels() * p.out_channels; }
inline int64_t input_elements(const ConvBnParams& p) { return p.batch * p.in_height * p.in_width * p.in_channels; }
inline int64_t filter_elements(const ConvBnParams& p) { return p.taps() * p.group_in() * p.out_channels; }

inline bool is_depthwise(const ConvBnParams& p) { return p.group_in() == 1 && p.groups > 1; }

// Of the filters' gradient of groups of one channel.
inline Ranges depthwise_ranges(const ConvBnParams& p) { return Ranges(p).in_at_most(most_filter_ranges(p)); }

// How many sums of each element of the filters' gradient there are.
inline int64_t filter_ranges(const ConvBnParams& p) {
  return is_depthwise(p) ? depthwise_ranges(p).count : suits_tensor_cores(p) ? tensor_wgrad_ranges(p) : wgrad_ranges(p);
}

// The most blocks of threads that a kernel of either direction takes.
inline int64_t most_blocks(const ConvBnParams& p) {
  const auto tiles = [&p](int64_t rows, int64_t cols) {
    return p.groups * ceil_div(rows, kTile) * ceil_div(cols, kTile);
  };
  const int64_t pixels = p.batch * p.in_height * p.in_width;
  const int64_t elements = std::max({output_elements(p), input_elements(p), filter_elements(p)});
  return std::max({blocks_for(elements), Ranges(p).blocks() * p.taps(), tiles(p.pixels(), p.group_out()),
                   tiles(pixels, p.group_in()), tiles(p.taps() * p.group_in(), p.group_out()) * filter_ranges(p)});
}

// Null, or what of the problem the kernels' numbers cannot hold.
inline const char* too_large(const ConvBnParams& p) {
  constexpr int64_t kMost = INT32_MAX;
  if (const char* wrong = wrong_tiles()) return wrong;
  for (int64_t size : {p.stride_height, p.stride_width, p.pad_top, p.pad_left, p.filter_height * p.dilation_height,
                       p.filter_width * p.dilation_width, p.taps()})
    if (size > kMost) return "strides, paddings or filters of more than 2^31 - 1 have no GPU kernel";
  if (p.batch > 0 && std::max(p.in_height * p.in_width, p.out_height * p.out_width) > kMost)
    return "an image of more than 2^31 - 1 pixels has no GPU kernel";
  return most_blocks(p) > kMost ? "tensors this large have no GPU kernel" : nullptr;
}

// Whether chunks can be read from them.
inline bool aligned(std::initializer_list<const void*> buffers) {
  return std::all_of(buffers.begin(), buffers.end(),
                     [](const void* buffer) { return reinterpret_cast<uintptr_t>(buffer) % 16 == 0; });
}

// Whether passes over the output can go by chunks, of buffers that are aligned.
template <class T>
bool has_chunks(const ConvBnParams& p) {
  return p.data_format == DataFormat::kNHWC && p.out_channels % kOfChunk<T> == 0 && p.out_channels > 0 &&
         output_elements(p) / kOfChunk<T> < INT32_MAX;
}

}  // namespace fusedconvbn::cuda
