// The gradient by the inputs on AMX where a strided convolution reads few channels: as one convolution of dz for all
// phases of the stride (dgrad.cc), whose columns are phases by channels.
//
// A phase alone would fill 3 of 32 columns, and all phases read the same rows. Where a phase has no filter position for
// a tap, its filter is 0: of the first layer's 7 x 7 filters, 16 taps in place of 16 + 12 + 12 + 9.
#pragma once

#include <algorithm>
#include <vector>

#include "amx_convolve.h"
#include "compute_type.h"

namespace fusedconvbn {

// One dimension: tap t reads dz `low + t` behind the phases' own position.
class PhaseTaps {
 public:
  PhaseTaps(int64_t filter, int64_t stride, int64_t dilation, int64_t pad)
      : filter_(filter), stride_(stride), dilation_(dilation), pad_(pad) {
    while (pad_ - (low_ - 1) * stride_ <= (filter_ - 1) * dilation_) --low_;
    while (stride_ - 1 + pad_ - (high_ + 1) * stride_ >= 0) ++high_;
  }

  int64_t count() const { return high_ - low_ + 1; }
  int64_t offset(int64_t tap) const { return low_ + tap; }
  // The filter position by which a phase reads through a tap, or -1.
  int64_t position(int64_t phase, int64_t tap) const {
    const int64_t distance = phase + pad_ - offset(tap) * stride_;
    const bool met = distance >= 0 && distance % dilation_ == 0 && distance / dilation_ < filter_;
    return met ? distance / dilation_ : -1;
  }

 private:
  int64_t filter_, stride_, dilation_, pad_, low_ = 0, high_ = 0;
};

class AmxMergedPhases {
 public:
  static bool suits(const ConvBnParams& p) {
    constexpr int64_t kColumns = 32;  // of a panel
    if (std::max(p.stride_height, p.stride_width) > kColumns) return false;
    const int64_t phases = p.stride_height * p.stride_width;
    return phases > 1 && phases * p.in_channels <= kColumns && p.in_height % p.stride_height == 0 &&
           p.in_width % p.stride_width == 0;
  }

  AmxMergedPhases(const KernelSet& set, const ConvBnParams& p, const Image<float>& conv_grad, const void* d_inputs)
      : p_(p),
        lines_(p.filter_height, p.stride_height, p.dilation_height, p.pad_top),
        columns_(p.filter_width, p.stride_width, p.dilation_width, p.pad_left),
        convolution_(set.f32, storage_of<float>(set, p.dtype), conv_grad, windows(),
                     {1, p.out_channels, p.stride_height * line_channels()}) {
    for (int64_t h = 0; h < p.stride_height; ++h) outputs_.push_back(lines_of_phase(set, d_inputs, h));
  }

  size_t scratch_bytes(int workers) const {
    Arena arena;
    carve(&arena, workers);
    return arena.used();
  }

  void run(const void* filters, int workers, char* scratch, ParallelFor* parallel) const {
    Arena arena(scratch);
    const Scratch s = carve(&arena, workers);
    merge(static_cast<const uint16_t*>(filters), s.filters);
    FilterLayout layout{s.filters, {}, cols(), cols(), 1};
    for (int64_t t = 0; t < taps(); ++t) layout.tap_offset.push_back(t * p_.out_channels * cols());
    TileEpilogue<float> epilogue;
    epilogue.emit = [this](const Tile<float>& t) {
      for (size_t h = 0; h < outputs_.size(); ++h)
        outputs_[h].write(t.first, t.rows, 0, line_channels(),
                          {t.data + static_cast<int64_t>(h) * line_channels(), t.ld});
    };
    convolution_.run(layout, s.convolution, parallel, epilogue);
  }

 private:
  struct Scratch {
    uint16_t* filters;  // [taps()][K][cols()]
    AmxConvolution<float>::Scratch convolution;
  };
  Scratch carve(Arena* arena, int workers) const {
    return {arena->take<uint16_t>(taps() * p_.out_channels * cols()), convolution_.carve(arena, workers)};
  }

  int64_t taps() const { return lines_.count() * columns_.count(); }
  // The phases of a line are neighbours: they count as channels of one pixel.
  int64_t line_channels() const { return p_.stride_width * p_.in_channels; }
  int64_t cols() const { return p_.stride_height * line_channels(); }

  Windows windows() const {
    Windows w{p_.batch, p_.in_height / p_.stride_height, p_.in_width / p_.stride_width, 1, 1, {}};
    for (int64_t h = 0; h < lines_.count(); ++h)
      for (int64_t v = 0; v < columns_.count(); ++v) w.taps.push_back({lines_.offset(h), columns_.offset(v)});
    return w;
  }

  Image<float> lines_of_phase(const KernelSet& set, const void* d_inputs, int64_t phase) const {
    const Storage<float> storage = storage_of<float>(set, p_.dtype);
    Grid grid = input_grid(p_);
    const int64_t bytes = phase * grid.line_stride * storage.element_bytes;
    grid.height /= p_.stride_height, grid.width /= p_.stride_width;
    grid.line_stride *= p_.stride_height, grid.pixel_stride *= p_.stride_width;
    return Image<float>(d_inputs ? static_cast<const char*>(d_inputs) + bytes : nullptr, storage, grid);
  }

  void merge(const uint16_t* filters, uint16_t* merged) const {
    std::fill_n(merged, taps() * p_.out_channels * cols(), uint16_t{0});
    for (int64_t t = 0; t < taps(); ++t)
      for (int64_t phase = 0; phase < p_.stride_height * p_.stride_width; ++phase) {
        const int64_t h = lines_.position(phase / p_.stride_width, t / columns_.count());
        const int64_t v = columns_.position(phase % p_.stride_width, t % columns_.count());
        if (h < 0 || v < 0) continue;
        const uint16_t* from = filters + (h * p_.filter_width + v) * p_.in_channels * p_.out_channels;
        uint16_t* to = merged + t * p_.out_channels * cols() + phase * p_.in_channels;
        for (int64_t c = 0; c < p_.in_channels; ++c)
          for (int64_t k = 0; k < p_.out_channels; ++k) to[k * cols() + c] = from[c * p_.out_channels + k];
      }
  }

  const ConvBnParams& p_;
  PhaseTaps lines_, columns_;
  AmxConvolution<float> convolution_;
  std::vector<Image<float>> outputs_;  // the lines of each phase
};

}  // namespace fusedconvbn
