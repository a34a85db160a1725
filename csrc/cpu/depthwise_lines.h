// Scratch of depthwise convolutions: panels of channels, rings of lines, strips of columns.
//
// The source lines that a few output lines need lie in scratch, pixel by pixel as in memory, with their zero padding:
// so memory is read from the first byte to the last, kernels read whole aligned vectors and no window is a special
// case. A line is staged once and stays until the lines below no longer need it. Panels hold output channels; with a
// multiplier a staged line repeats each input channel for each output channel that reads it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "image.h"
#include "span.h"
#include "windows.h"

namespace fusedconvbn {

// Output channels as panels. With a multiplier a panel ends between two input channels.
struct DepthwisePanels {
  int64_t channels, multiplier;  // output channels; of them for each input channel

  int64_t width() const { return kDepthwisePanel / multiplier * multiplier; }
  int64_t count() const { return ceil_div(channels, width()); }
  int64_t channel(int64_t panel) const { return panel * width(); }
  int64_t cols(int64_t panel) const { return std::min(width(), channels - channel(panel)); }
  // Panels of a task: equal shares of which each has at most `most` panels.
  int64_t share(int64_t most) const {
    return ceil_div(count(), ceil_div(count(), std::clamp<int64_t>(most, 1, count())));
  }
};

// Lines of pixels of which the last `lines` are kept: line h lies where line h - lines lay. One more line is all zeros.
// A pixel has the channels of some panels, kDepthwisePanel each.
template <class C>
struct LineRing {
  C* data;  // [lines + 1][pixels][ld]
  int64_t panels, lines, pixels;

  static LineRing carve(Arena* arena, int64_t panels, int64_t lines, int64_t pixels) {
    LineRing ring{nullptr, panels, lines, pixels};
    ring.data = arena->take<C>(ring.elements());
    return ring;
  }
  // An odd number of cache lines: a panel of many pixels then lies in all sets of a cache.
  int64_t ld() const { return panels * kDepthwisePanel + 64 / static_cast<int64_t>(sizeof(C)); }
  int64_t line_elements() const { return pixels * ld(); }
  int64_t elements() const { return (lines + 1) * line_elements(); }
  C* line(int64_t h) const { return data + h % lines * line_elements(); }
  C* zeros() const { return data + lines * line_elements(); }
  void zero_last_line() const { std::fill(zeros(), zeros() + line_elements(), C(0)); }
};

// Lines of an image that kernels read where they lie, and a line of zeros in place of those that it has not.
template <class C>
struct LinesInPlace {
  Image<C> source;
  const C* zeros;  // of all channels of a line's pixels and 2 more; in any type

  // `column` may be one beyond the image.
  const void* at(int64_t image, int64_t h, int64_t column) const {
    const Grid& grid = source.grid();
    if (h < 0 || h >= grid.height) return zeros;
    return source.address((image * grid.height + h) * grid.width + column, 0);
  }
  static int64_t zero_elements(const Grid& grid) { return (grid.width + 2) * grid.pixel_stride; }
};

// Whether kernels can read `source` so: 3x3 windows that are at most a column beyond it.
template <class C>
bool slides_in_place(const ComputeKernels<C>& kernels, const Image<C>& source, const Windows& windows,
                     int64_t multiplier) {
  const auto& taps = windows.taps;
  if (!(source.direct() || source.in_place()) || multiplier > 1 || source.ld() % kernels.lanes != 0 || taps.size() != 9)
    return false;
  for (int64_t t = 0; t < 9; ++t)
    if (taps[t].width != taps[0].width + t % 3 || taps[t].height != taps[t / 3 * 3].height) return false;
  return windows.step_width <= 2 && taps[0].width >= -1 &&
         (windows.width - 1) * windows.step_width + taps[2].width <= source.grid().width;
}

// Copies lines of an image into rings.
template <class C>
class PanelStager {
 public:
  PanelStager(const ComputeKernels<C>& kernels, const Image<C>& source, const DepthwisePanels& panels)
      : kernels_(kernels), source_(source), panels_(panels) {}

  int64_t scratch_elements(int64_t pixels) const { return panels_.multiplier > 1 ? pixels * kDepthwisePanel : 0; }

  // Columns [columns.begin, columns.end) of line h into the ring, zeros where the image has none.
  void stage(int64_t image, int64_t h, const Span& columns, const Span& panels, C* scratch,
             const LineRing<C>& ring) const {
    const Grid& grid = source_.grid();
    const int64_t begin = std::clamp<int64_t>(columns.begin, 0, grid.width);
    const int64_t count = std::clamp<int64_t>(columns.end, begin, grid.width) - begin;
    const int64_t before = std::clamp<int64_t>(begin - columns.begin, 0, columns.size());
    C *line = ring.line(h), *to = line + before * ring.ld();
    std::fill(line, to, C(0));
    std::fill(to + count * ring.ld(), line + columns.size() * ring.ld(), C(0));
    const int64_t first = (image * grid.height + h) * grid.width + begin;
    if (count == 0) return;
    if (panels_.multiplier > 1)
      spread(first, count, panels, scratch, to, ring.ld());
    else
      copy(first, count, panels, to, ring.ld());
  }

 private:
  void copy(int64_t first, int64_t count, const Span& panels, C* to, int64_t ld) const {
    const int64_t channel = panels_.channel(panels.begin), width = panels.size() * kDepthwisePanel;
    const int64_t cols = std::min(width, panels_.channels - channel);
    if (source_.direct()) {
      const Block<C> block = source_.read(first, count, channel, cols, nullptr);
      return kernels_.depthwise_copy(block.data, block.ld, count, cols, to, ld, width);
    }
    if (cols < width) std::fill(to, to + count * ld, C(0));
    source_.copy(first, count, channel, cols, {to, ld});
  }

  void spread(int64_t first, int64_t count, const Span& panels, C* scratch, C* to, int64_t ld) const {
    const int64_t m = panels_.multiplier;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel, to += kDepthwisePanel) {
      const int64_t cols = panels_.cols(panel) / m;
      source_.copy(first, count, panels_.channel(panel) / m, cols, {scratch, kDepthwisePanel});
      kernels_.depthwise_spread(scratch, count, cols, m, to, ld);
    }
  }

  const ComputeKernels<C>& kernels_;
  Image<C> source_;
  DepthwisePanels panels_;
};

// The filters' elements of each tap as packed[panels][taps][kDepthwisePanel].
template <class C>
void pack_panels(const void* filters, const std::vector<int64_t>& tap_offset, const Storage<C>& storage,
                 const DepthwisePanels& panels, C* packed) {
  for (int64_t panel = 0; panel < panels.count(); ++panel)
    for (int64_t offset : tap_offset) {
      const char* from = static_cast<const char*>(filters) + (offset + panels.channel(panel)) * storage.element_bytes;
      std::fill(packed, packed + kDepthwisePanel, C(0));
      storage.kernels.load(from, 0, 1, 1, panels.cols(panel), packed, kDepthwisePanel);
      packed += kDepthwisePanel;
    }
}

}  // namespace fusedconvbn
