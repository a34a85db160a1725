// The convolution of an image of few channels, such as a network's first: from lines in planes (phase_lines.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convolve.h"
#include "phase_lines.h"
#include "tasks.h"

namespace fusedconvbn {

// Interface as Convolution's (convolve.h); one group.
template <class C>
class FewChannelsConvolution {
 public:
  FewChannelsConvolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
                         const Windows& windows, const Channels& channels)
      : kernels_(kernels),
        storage_(storage),
        windows_(windows),
        depth_(channels.depth),
        cols_(channels.cols),
        lines_(kernels, source, channels.depth, windows) {}

  struct Worker {
    C* lines;  // [strip_lines()]
    C* stage;
    C* tile;  // [kBlockRows][panel]
  };
  struct Scratch {
    C* filters;        // [panels][taps][depth][panel]
    int64_t* offsets;  // [taps][depth]
    std::vector<Worker> workers;
  };

  // A block is some lines, or a part of one.
  int64_t blocks() const { return windows_.batch * image_blocks(); }
  int64_t block_pixels(int64_t block) const {
    const Span lines = block_lines(block % image_blocks()), columns = block_columns(block % image_blocks());
    return lines.size() * columns.size();
  }

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<C>(packed_elements()), arena->take<int64_t>(window_elements()), {}};
    for (int w = 0; w < workers; ++w)
      s.workers.push_back({arena->take<C>(strip_lines() * lines_.line_elements()),
                           arena->take<C>(lines_.scratch_elements()), arena->take<C>(kBlockRows * kernels_.panel)});
    return s;
  }

  int64_t packed_elements() const { return panels() * panel_elements(); }

  void pack(const FilterLayout& filters, const Scratch&, C* packed, ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t panel, int) { pack(filters, panel, packed + panel * panel_elements()); });
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    int64_t* offset = s.offsets;
    for (const Tap& tap : windows_.taps)
      for (int64_t c = 0; c < depth_; ++c) *offset++ = lines_.offset(tap, c);
    if (!filters.packed) pack(filters, s, s.filters, parallel);
    const C* packed = filters.packed ? static_cast<const C*>(filters.packed) : s.filters;
    // Few images: bands of lines, so that every thread has several.
    const int64_t bands = std::min(groups(), ceil_div(wanted_tasks(*parallel, kTasks), windows_.batch));
    parallel->run(windows_.batch * bands, [&](int64_t task, int worker) {
      run_band(task / bands, part(task % bands, bands, groups()), s.workers[worker],
               [&](const Block& b) { run_block(b, packed, s.offsets, s.workers[worker].tile, worker, epilogue); });
      kernels_.end_streaming();
    });
  }

 private:
  static constexpr int64_t kStripBytes = 256 << 10;  // in L2 beside what streams through it

  int64_t taps() const { return static_cast<int64_t>(windows_.taps.size()); }
  int64_t window_elements() const { return taps() * depth_; }
  int64_t panels() const { return ceil_div(cols_, kernels_.panel); }
  int64_t panel_elements() const { return window_elements() * kernels_.panel; }

  // Output lines of a block, or the parts that a line is made of.
  int64_t line_parts() const { return ceil_div(windows_.width, kBlockRows); }
  int64_t group_lines() const {
    return line_parts() > 1 ? 1 : std::max<int64_t>(1, kBlockRows / std::max<int64_t>(1, windows_.width));
  }
  int64_t groups() const { return ceil_div(windows_.height, group_lines()); }
  int64_t image_blocks() const { return groups() * line_parts(); }
  Span block_lines(int64_t block) const {
    const int64_t first = block / line_parts() * group_lines();
    return {first, std::min(first + group_lines(), windows_.height)};
  }
  Span block_columns(int64_t block) const {
    const int64_t first = block % line_parts() * kBlockRows;
    return {first, std::min(first + kBlockRows, windows_.width)};
  }

  Span source_lines(int64_t group) const {
    const Span lines = block_lines(group * line_parts());
    return {lines.begin * windows_.step_height + lines_.lines().begin,
            (lines.end - 1) * windows_.step_height + lines_.lines().end};
  }

  // Source lines in scratch: those of a group, and more where they are short, so that few are moved.
  int64_t group_span() const { return (group_lines() - 1) * windows_.step_height + lines_.lines().size(); }
  int64_t strip_lines() const {
    const int64_t bytes = std::max<int64_t>(1, lines_.line_elements()) * static_cast<int64_t>(sizeof(C));
    return std::max(group_span(), std::min(4 * group_span(), kStripBytes / bytes));
  }

  void pack(const FilterLayout& f, int64_t panel, C* packed) const {
    const int64_t column = panel * kernels_.panel, cols = std::min(kernels_.panel, cols_ - column);
    if (cols < kernels_.panel) std::fill(packed, packed + panel_elements(), C(0));
    for (int64_t offset : f.tap_offset) {
      const char* from =
          static_cast<const char*>(f.data) + (offset + column * f.column_stride) * storage_.element_bytes;
      storage_.kernels.load(from, f.depth_stride, f.column_stride, depth_, cols, packed, kernels_.panel);
      packed += depth_ * kernels_.panel;
    }
  }

  // Source lines `staged` of an image are in scratch.
  struct Strip {
    int64_t image;
    Span staged;
  };
  struct Block {
    int64_t image, number, panel;
    const C* lines;  // those that its first output line reads
  };

  template <class F>
  void run_band(int64_t image, const Span& band, const Worker& w, F run) const {
    std::fill(w.lines, w.lines + strip_lines() * lines_.line_elements(), C(0));
    const int64_t top = source_lines(band.begin).begin;
    Strip strip{image, {top, top}};
    for (int64_t group = band.begin; group < band.end; ++group) {
      const Span needed = source_lines(group);
      stage(needed, w, &strip);
      const C* source = w.lines + (needed.begin - strip.staged.begin) * lines_.line_elements();
      for (int64_t panel = 0; panel < panels(); ++panel)
        for (int64_t part = 0; part < line_parts(); ++part) run({image, group * line_parts() + part, panel, source});
    }
  }

  // Has lines `needed` in scratch, those before them no longer needed.
  void stage(const Span& needed, const Worker& w, Strip* strip) const {
    const int64_t line = lines_.line_elements();
    if (needed.end - strip->staged.begin > strip_lines()) {
      const int64_t keep = std::clamp(needed.begin, strip->staged.begin, strip->staged.end);
      std::copy(w.lines + (keep - strip->staged.begin) * line, w.lines + strip->staged.size() * line, w.lines);
      strip->staged.begin = keep;
    }
    if (needed.begin >= strip->staged.end) strip->staged = {needed.begin, needed.begin};
    for (int64_t& h = strip->staged.end; h < needed.end; ++h)
      lines_.stage(strip->image, h, w.stage, w.lines + (h - strip->staged.begin) * line);
  }

  void run_block(const Block& b, const C* packed, const int64_t* offsets, C* data, int worker,
                 const TileEpilogue<C>& epilogue) const {
    const Span rows = block_lines(b.number), columns = block_columns(b.number);
    const int64_t column = b.panel * kernels_.panel, line = windows_.step_height * lines_.line_elements();
    const C* filters = packed + b.panel * panel_elements();
    const Tile<C> tile{data,
                       kernels_.panel,
                       (b.image * windows_.height + rows.begin) * windows_.width + columns.begin,
                       rows.size() * columns.size(),
                       column,
                       std::min(kernels_.panel, cols_ - column),
                       b.image * image_blocks() + b.number,
                       worker};
    ShiftedRows<C> in{b.lines + columns.begin, offsets, window_elements(), columns.size()};
    const GemmOutput<C> to = epilogue.output(tile);
    GemmOutput<C> line_to = to;
    for (int64_t i = 0; i < rows.size(); ++i, in.from += line, advance(in.count, &line_to))
      kernels_.multiply_shifted(in, filters, line_to);
    epilogue.end(to, tile);
  }

  // To the rows behind the next `count`.
  void advance(int64_t count, GemmOutput<C>* to) const {
    AffineBlock<C>& b = to->block;
    to->tile += count * kernels_.panel;
    const int64_t bytes = bytes_of<C>(to->rows);
    if (b.y) b.y = static_cast<char*>(b.y) + count * b.ld_y * bytes;
    if (b.residual) b.residual = static_cast<const char*>(b.residual) + count * b.ld_residual * bytes;
  }

  const ComputeKernels<C>& kernels_;
  Storage<C> storage_;
  Windows windows_;
  int64_t depth_, cols_;
  PhaseLines<C> lines_;
};

}  // namespace fusedconvbn
