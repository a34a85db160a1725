// Images as pixels by channels, whatever their layout and data type.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../conv_bn.h"
#include "compute_type.h"

namespace fusedconvbn {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels numbered line by line and image by image, and where each lies: strides in elements.
struct Grid {
  int64_t batch, height, width;
  int64_t image_stride, line_stride, pixel_stride, channel_stride;

  int64_t pixels() const { return batch * height * width; }
  bool uniform() const {  // pixel p lies at p * pixel_stride
    return (height == 1 || line_stride == width * pixel_stride) &&
           (batch == 1 || image_stride == height * width * pixel_stride);
  }
  int64_t offset(int64_t pixel) const {
    const int64_t line = pixel / width, image = line / height;
    return image * image_stride + (line % height) * line_stride + (pixel % width) * pixel_stride;
  }
  // How many pixels from this one on lie at equal distances.
  int64_t run(int64_t pixel) const {
    if (uniform()) return pixels() - pixel;
    if (line_stride == width * pixel_stride) return height * width - pixel % (height * width);
    return width - pixel % width;
  }
};

inline Grid image_grid(DataFormat format, int64_t batch, int64_t height, int64_t width, int64_t channels) {
  if (format == DataFormat::kNHWC)
    return {batch, height, width, height * width * channels, width * channels, channels, 1};
  return {batch, height, width, channels * height * width, width, 1, height * width};
}

inline Grid input_grid(const ConvBnParams& p) {
  return image_grid(p.data_format, p.batch, p.in_height, p.in_width, p.in_channels);
}
inline Grid output_grid(const ConvBnParams& p) {
  return image_grid(p.data_format, p.batch, p.out_height, p.out_width, p.out_channels);
}

// A block of pixels by channels in the compute type: in place where the memory already has that form.
template <class C>
struct Block {
  C* data;
  int64_t ld;
};

// Results of up to so many bytes are left in the caches: an L2 of 2 MiB. In inference some of L3 too, for there the
// next layer reads all of them, and little else is read before.
constexpr int64_t kLeftInCache = 2 << 20, kLeftInInference = 4 << 20;

template <class C>
class Image {
 public:
  Image(const void* data, const Storage<C>& storage, const Grid& grid, int64_t left_in_cache = kLeftInCache)
      : data_(static_cast<char*>(const_cast<void*>(data))),
        storage_(storage),
        grid_(grid),
        left_in_cache_(left_in_cache),
        rows_(grid.channel_stride == 1 && grid.uniform()),
        direct_(storage.is_compute_type && rows_) {}

  bool direct() const { return direct_; }
  bool present() const { return data_ != nullptr; }
  const Grid& grid() const { return grid_; }
  const void* memory() const { return data_; }
  bool rows() const { return rows_; }
  // Whether 16-bit numbers can be worked on where they lie, by in_place_kernels().
  bool in_place() const { return rows_ && storage_.kernels.in_place.round != nullptr; }
  // Whether tiles of the compute type can be made 16-bit numbers where those lie.
  bool takes_tiles() const { return rows_ && storage_.kernels.in_place.emit_sums != nullptr; }
  const InPlaceKernels<C>& in_place_kernels() const { return storage_.kernels.in_place; }
  char* address(int64_t first, int64_t channel) const {
    return data_ + (first * grid_.pixel_stride + channel) * storage_.element_bytes;
  }
  int64_t ld() const { return grid_.pixel_stride; }
  int64_t element_bytes() const { return storage_.element_bytes; }
  RowType row_type() const { return storage_.row_type; }
  const StorageKernels<C>& kernels() const { return storage_.kernels; }
  bool rounds() const { return !storage_.is_compute_type; }

  // Whether blocks written in place should go past the caches: where the image will not stay in them anyway.
  bool streams(int64_t channel, int64_t cols) const {
    constexpr int64_t kLine = 64;  // bytes
    const auto aligned = [](int64_t bytes) { return bytes % kLine == 0; };
    const int64_t bytes = storage_.element_bytes;
    return ((storage_.is_compute_type && grid_.channel_stride == 1) || in_place()) &&
           grid_.pixels() * grid_.pixel_stride * bytes > left_in_cache_ && aligned(reinterpret_cast<intptr_t>(data_)) &&
           aligned(grid_.pixel_stride * bytes) && aligned(grid_.line_stride * bytes) &&
           aligned(grid_.image_stride * bytes) && aligned(channel * bytes) && aligned(cols * bytes);
  }

  // Where to compute a block: in its own memory if that can be, else in `scratch`; write() ends it.
  Block<C> target(int64_t first, int64_t channel, const Block<C>& scratch) const {
    return direct_ ? place(first, channel) : scratch;
  }

  // The block in its own memory if that can be, else converted into scratch [rows][cols].
  Block<C> read(int64_t first, int64_t rows, int64_t channel, int64_t cols, C* scratch) const {
    if (direct_) return place(first, channel);
    copy(first, rows, channel, cols, {scratch, cols});
    return {scratch, cols};
  }

  // The block converted or copied into `to`.
  void copy(int64_t first, int64_t rows, int64_t channel, int64_t cols, const Block<C>& to) const {
    for_runs(first, rows, channel, [&](char* memory, int64_t done, int64_t count) {
      storage_.kernels.load(memory, grid_.pixel_stride, grid_.channel_stride, count, cols, to.data + done * to.ld,
                            to.ld);
    });
  }

  void write(int64_t first, int64_t rows, int64_t channel, int64_t cols, const Block<C>& block) const {
    if (direct_ && block.data == place(first, channel).data) return;
    for_runs(first, rows, channel, [&](char* memory, int64_t done, int64_t count) {
      storage_.kernels.store(block.data + done * block.ld, block.ld, count, cols, memory, grid_.pixel_stride,
                             grid_.channel_stride, streams(channel, cols));
    });
  }

 private:
  Block<C> place(int64_t first, int64_t channel) const {
    return {reinterpret_cast<C*>(address(first, channel)), grid_.pixel_stride};
  }

  template <class F>
  void for_runs(int64_t first, int64_t rows, int64_t channel, F f) const {
    for (int64_t done = 0, count; done < rows; done += count) {
      count = std::min(rows - done, grid_.run(first + done));
      const int64_t element = grid_.offset(first + done) + channel * grid_.channel_stride;
      f(data_ + element * storage_.element_bytes, done, count);
    }
  }

  char* data_;
  Storage<C> storage_;
  Grid grid_;
  int64_t left_in_cache_;
  bool rows_, direct_;  // pixels are rows of channels; and that in the compute type
};

// z or its gradient as one backward stage hands it to the next: compute type, NHWC whatever the data format.
template <class C>
Image<C> conv_grad_image(const KernelSet& set, const ConvBnParams& p, const void* data) {
  return Image<C>(data, storage_of<C>(set, sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32),
                  image_grid(DataFormat::kNHWC, p.batch, p.out_height, p.out_width, p.out_channels));
}

// z as forward saved it for backward.
template <class C>
Image<C> saved_image(const KernelSet& set, const ConvBnParams& p, Saved saved, const void* data) {
  if (saved != Saved::kBFloat16) return Image<C>(data, storage_of<C>(set, p.dtype), output_grid(p));
  return Image<C>(data, storage_of<C>(set, DType::kBFloat16),
                  image_grid(DataFormat::kNHWC, p.batch, p.out_height, p.out_width, p.out_channels));
}

}  // namespace fusedconvbn
