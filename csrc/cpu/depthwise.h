// The depthwise convolution: a panel of channels of a few lines of a strip at a time, from lines staged in a ring, or
// where they lie in the image if the kernels can do that: then they ask for the next lines meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convolve.h"
#include "depthwise_lines.h"
#include "tasks.h"
#include "windows.h"

namespace fusedconvbn {

// Interface as Convolution's (convolve.h); each group has one source channel.
template <class C>
class DepthwiseConvolution {
 public:
  DepthwiseConvolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
                       const Windows& windows, const Channels& channels)
      : kernels_(kernels),
        storage_(storage),
        windows_(windows),
        panels_{channels.groups * channels.cols, channels.cols},
        stager_(kernels, source, panels_),
        source_(source),
        source_height_(source.grid().height),
        in_place_(slides_in_place(kernels, source, windows, channels.cols)),
        depthwise_(in_place_ && !source.direct() ? source.in_place_kernels().depthwise : kernels.depthwise),
        clamped_(!in_place_        ? nullptr
                 : source.direct() ? kernels.depthwise_clamped
                                   : source.in_place_kernels().depthwise_clamped) {
    for (const Tap& tap : windows.taps) {
      high_ = {std::min(high_.begin, tap.height), std::max(high_.end, tap.height + 1)};
      wide_ = {std::min(wide_.begin, tap.width), std::max(wide_.end, tap.width + 1)};
    }
  }

  struct Scratch {
    struct Worker {
      LineRing<C> ring;
      const void** sources;  // [lines][taps]
      C *tile, *stage;       // [kBlockRows][kDepthwisePanel]
    };
    C* filters;  // [panels][taps][kDepthwisePanel]
    C* zeros;    // a line, if lines are read in place
    std::vector<Worker> workers;
  };

  // A block is a few lines of a strip.
  int64_t blocks() const { return windows_.batch * strips() * groups(); }
  int64_t block_pixels(int64_t block) const {
    return lines(block % groups()).size() * columns(block / groups() % strips()).size();
  }

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<C>(panels_.count() * panel_elements()), arena->take<C>(zero_elements()), {}};
    for (int w = 0; w < workers; ++w) {
      LineRing<C> ring{};
      if (!in_place_) ring = LineRing<C>::carve(arena, ring_share(), ring_lines(), source_columns());
      s.workers.push_back({ring, arena->take<const void*>(group_lines() * taps()),
                           arena->take<C>(kBlockRows * kDepthwisePanel),
                           arena->take<C>(stager_.scratch_elements(source_columns()))});
    }
    return s;
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    pack_panels(filters.data, filters.tap_offset, storage_, panels_, s.filters);
    std::fill_n(s.zeros, zero_elements(), C(0));
    const int64_t images = windows_.batch * strips(), wanted = kFewTasks * parallel->threads();
    const int64_t share = in_place_ ? panels_.share(panels_.count() * images * groups() / wanted) : ring_share();
    const int64_t shares = ceil_div(panels_.count(), share);
    // Few images: bands of lines, so that every thread has several.
    const int64_t bands = std::min(groups(), ceil_div(wanted, images * shares));
    parallel->run(images * bands * shares, [&](int64_t task, int worker) {
      const int64_t first = task % shares * share;
      run_task(task / shares / bands, part(task / shares % bands, bands, groups()),
               {first, std::min(first + share, panels_.count())}, s, worker, epilogue);
    });
  }

 private:
  static constexpr int64_t kRingBytes = 256 << 10;  // in L2 beside what streams through it

  int64_t taps() const { return static_cast<int64_t>(windows_.taps.size()); }
  int64_t panel_elements() const { return taps() * kDepthwisePanel; }
  // Taps of a line of the filter, and how many pixels they lie apart.
  int64_t row_taps() const {
    const auto in_first_line = [this](const Tap& tap) { return tap.height == windows_.taps[0].height; };
    return std::count_if(windows_.taps.begin(), windows_.taps.end(), in_first_line);
  }
  int64_t tap_step() const { return row_taps() > 1 ? windows_.taps[1].width - windows_.taps[0].width : 0; }

  int64_t strips() const { return ceil_div(windows_.width, kBlockRows); }
  Span columns(int64_t strip) const { return part(strip, strips(), windows_.width); }
  int64_t group_lines() const {
    return strips() > 1 ? 1 : std::max<int64_t>(1, kBlockRows / std::max<int64_t>(1, windows_.width));
  }
  int64_t groups() const { return ceil_div(windows_.height, group_lines()); }
  Span lines(int64_t group) const {
    return {group * group_lines(), std::min((group + 1) * group_lines(), windows_.height)};
  }

  int64_t ring_lines() const {
    return std::clamp<int64_t>((group_lines() - 1) * windows_.step_height + high_.size(), 1,
                               std::max<int64_t>(1, source_height_));
  }
  int64_t source_columns() const {
    return (ceil_div(windows_.width, std::max<int64_t>(1, strips())) - 1) * windows_.step_width + wide_.size();
  }
  int64_t zero_elements() const { return in_place_ ? LinesInPlace<C>::zero_elements(source_.grid()) : 0; }
  // Panels of a task whose lines lie in a ring.
  int64_t ring_share() const {
    const int64_t bytes = (ring_lines() + 1) * source_columns() * kDepthwisePanel * static_cast<int64_t>(sizeof(C));
    return panels_.share(kRingBytes / std::max<int64_t>(1, bytes));
  }

  void run_task(int64_t image, const Span& band, const Span& panels, const Scratch& s, int worker,
                const TileEpilogue<C>& epilogue) const {
    const auto& w = s.workers[worker];
    if (!in_place_) w.ring.zero_last_line();
    int64_t staged = 0;  // source lines below it are in the ring, or no longer needed
    for (int64_t group = band.begin; group < band.end; ++group) {
      const Span outputs = lines(group), strip = columns(image % strips());
      const Span needed{outputs.begin * windows_.step_height + high_.begin,
                        (outputs.end - 1) * windows_.step_height + high_.end};
      if (!in_place_) stage(image, {std::max(staged, needed.begin), std::min(needed.end, source_height_)}, panels, w);
      staged = std::max(staged, needed.end);
      point(image, outputs, s, w);
      const int64_t pixel = (image / strips() * windows_.height + outputs.begin) * windows_.width + strip.begin;
      const int64_t pixels = outputs.size() * strip.size();
      PanelLines in = windows_of(outputs, strip, w);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const Tile<C> tile{w.tile,
                           kDepthwisePanel,
                           pixel,
                           pixels,
                           panels_.channel(panel),
                           panels_.cols(panel),
                           image * groups() + group,
                           worker};
        in.offset = in_place_ ? tile.channel : (panel - panels.begin) * kDepthwisePanel, in.cols = tile.cols;
        if (in_place_ && panels.size() == panels_.count()) in.ahead = next_lines(image, needed.end, tile);
        compute_tile(in, s.filters + panel * panel_elements(), tile, epilogue);
      }
    }
    kernels_.end_streaming();
  }

  // Straight to memory if that can be and the kernels ask for its lines ahead, which those of depthwise_clamped do.
  void compute_tile(const PanelLines& in, const C* filters, Tile<C> tile, const TileEpilogue<C>& epilogue) const {
    GemmOutput<C> to = epilogue.output(tile);
    if (clamped_ && to.clamps && !to.block.residual && !to.keep) return clamped_(in, filters, to);
    if (clamped_ && !to.block.stream && to.emit == kernels_.emit_sums && to.rows == RowType::kCompute) {
      tile.data = static_cast<C*>(to.block.y), tile.ld = to.block.ld_y;
      depthwise_(in, filters, {tile.data, in.columns * tile.ld, tile.ld, false});
      return epilogue.end(to, tile);
    }
    depthwise_(in, filters, {tile.data, in.columns * tile.ld, tile.ld, false});
    to.block.z = tile.data, to.block.ld_z = tile.ld, to.block.rows = tile.rows;
    if (to.emit) to.emit(to.block);
    epilogue.end(to, tile);
  }

  // But for what depends on the panel.
  PanelLines windows_of(const Span& outputs, const Span& strip, const typename Scratch::Worker& w) const {
    const int64_t ld = in_place_ ? source_.ld() : w.ring.ld(), step = windows_.step_width;
    PanelLines in{w.sources, outputs.size(), strip.size(), taps(), row_taps(), tap_step() * ld, step * ld, 0, 0};
    in.left = in_place_ && strip.begin * step + wide_.begin < 0;
    in.right = in_place_ && (strip.end - 1) * step + wide_.end > source_.grid().width;
    return in;
  }

  // A panel's share of what follows line `end` in memory: the next lines, or the next image.
  const void* next_lines(int64_t image, int64_t end, const Tile<C>& tile) const {
    const int64_t line = image / strips() * source_height_ + std::min(end, source_height_);
    const int64_t step = windows_.step_width,
                  first = line * source_.grid().width + columns(image % strips()).begin * step;
    return source_.address(first, 0) + tile.rows * step * step * tile.channel * source_.element_bytes();
  }

  void stage(int64_t image, const Span& source_lines, const Span& panels, const typename Scratch::Worker& w) const {
    const int64_t first = columns(image % strips()).begin * windows_.step_width + wide_.begin;
    for (int64_t h = source_lines.begin; h < source_lines.end; ++h)
      stager_.stage(image / strips(), h, {first, first + source_columns()}, panels, w.stage, w.ring);
  }

  void point(int64_t image, const Span& outputs, const Scratch& s, const typename Scratch::Worker& w) const {
    const LinesInPlace<C> lines{source_, s.zeros};
    const int64_t first = columns(image % strips()).begin * windows_.step_width;
    const void** source = w.sources;
    for (int64_t line = outputs.begin; line < outputs.end; ++line)
      for (const Tap& tap : windows_.taps) {
        const int64_t h = line * windows_.step_height + tap.height;
        if (in_place_) {
          *source++ = lines.at(image / strips(), h, first + tap.width);
        } else {
          const C* row = h >= 0 && h < source_height_ ? w.ring.line(h) : w.ring.zeros();
          *source++ = row + (tap.width - wide_.begin) * w.ring.ld();
        }
      }
  }

  const ComputeKernels<C>& kernels_;
  Storage<C> storage_;
  Windows windows_;
  DepthwisePanels panels_;
  PanelStager<C> stager_;
  Image<C> source_;
  int64_t source_height_;
  bool in_place_;
  decltype(ComputeKernels<C>::depthwise) depthwise_;
  decltype(ComputeKernels<C>::depthwise_clamped) clamped_;      // may be null
  Span high_{1 << 30, -(1 << 30)}, wide_{1 << 30, -(1 << 30)};  // of the taps: lines, columns
};

}  // namespace fusedconvbn
