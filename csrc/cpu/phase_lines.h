// Lines of an image of few channels as its convolution wants them: a plane for each phase of the stride and channel, in
// which the pixels that one tap reads at neighbouring positions are neighbours, with their zero padding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "image.h"
#include "span.h"
#include "windows.h"

namespace fusedconvbn {

template <class C>
class PhaseLines {
 public:
  PhaseLines(const ComputeKernels<C>& kernels, const Image<C>& source, int64_t channels, const Windows& windows)
      : kernels_(kernels), source_(source), channels_(channels), step_(windows.step_width) {
    int64_t last = 0;
    for (const Tap& tap : windows.taps) {
      margin_ = std::max(margin_, -floor_div(tap.width, step_));
      last = std::max(last, floor_div(tap.width, step_));
      lines_ = {std::min(lines_.begin, tap.height), std::max(lines_.end, tap.height + 1)};
    }
    width_ = margin_ + std::max(windows.width + last, ceil_div(source.grid().width, step_));
  }

  int64_t line_elements() const { return planes() * width_; }
  int64_t scratch_elements() const { return source_.direct() ? 0 : source_.grid().width * channels_; }
  // The source lines that the taps of position 0 read.
  const Span& lines() const { return lines_; }

  // Where, in the lines from lines().begin on, position 0 reads `channel` through a tap; position j does at j more.
  int64_t offset(const Tap& tap, int64_t channel) const {
    const int64_t shift = floor_div(tap.width, step_), phase = tap.width - shift * step_;
    return (tap.height - lines_.begin) * line_elements() + (phase * channels_ + channel) * width_ + margin_ + shift;
  }

  // Line h of an image, zeros where there is none, to `line`, whose margins are zero.
  void stage(int64_t image, int64_t h, C* scratch, C* line) const {
    const Grid& grid = source_.grid();
    if (h < 0 || h >= grid.height) {
      std::fill(line, line + line_elements(), C(0));
      return;
    }
    const Block<C> pixels = source_.read((image * grid.height + h) * grid.width, grid.width, 0, channels_, scratch);
    kernels_.split(pixels.data, grid.width * channels_, planes(), line + margin_, width_);
  }

 private:
  int64_t planes() const { return step_ * channels_; }

  const ComputeKernels<C>& kernels_;
  Image<C> source_;
  int64_t channels_, step_;
  int64_t margin_ = 0;  // pixels of a plane left of the image
  int64_t width_;       // pixels of a plane
  Span lines_{1 << 30, -(1 << 30)};
};

}  // namespace fusedconvbn
