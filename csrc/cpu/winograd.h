// The Winograd convolution F(MxM, 3x3): 3x3 filters at stride 1, in windows of (M+2)x(M+2) pixels that give MxM
// outputs.
//
// A block of windows is transformed into (M+2)^2 planes, each plane is multiplied by its plane of the transformed
// filters, and the products are transformed back, a panel of output channels at a time while they are in cache.
// Same interface as Convolution (convolve.h); the windows come from the same tables of pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "convolve.h"
#include "image.h"
#include "tasks.h"
#include "windows.h"
#include "winograd_choice.h"
#include "winograd_windows.h"

namespace fusedconvbn {

template <class C, int M>
const WinogradKernels<C>& winograd_kernels(const ComputeKernels<C>& kernels) {
  return M == 2 ? kernels.winograd2 : kernels.winograd4;
}

template <class C, int M>
class WinogradConvolution {
 public:
  // `windows` are those of the direct algorithm: 9 taps, steps of 1.
  WinogradConvolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
                      const Windows& windows, const Channels& channels)
      : kernels_(kernels),
        transforms_(winograd_kernels<C, M>(kernels)),
        storage_(storage),
        windows_(windows),
        depth_(channels.depth),
        cols_(channels.cols),
        few_(inputs_fit_cache(channels.kept_filters)),
        low_(few_ && kernels.multiply_low_planes && windows_.positions() <= kernels.outer_rows),
        part_depth_(low_ ? kLowDepth : kPartDepth),
        pass_panels_(few_ ? 1 : std::min(kMaxPassPanels, ceil_div(channels.cols, kernels.panel))),
        block_windows_(block_windows()),
        reader_(source, depth_, windows_.windows(), false, block_windows_, block_windows_) {}

  struct Worker {
    typename WindowReader<C>::Scratch reader;
    int64_t* transformed;  // first of the windows in `planes`; -1: none
    C* planes;             // [kPlanes][depth / kPlaneDepth][windows][kPlaneDepth]
    C* products;           // [pass_panels_][kPlanes][windows][panel]
    C* outputs;            // [kGroupRows][panel]
    C* filters;            // [9][kBlockElements], or of few windows a part, [kPlanes][part_depth_][panel]
  };
  struct Scratch {
    C* filters;  // [panels][kPlanes][depth][panel], or of few windows [panels][parts][9][part_depth_][panel]
    C* zeros;
    std::vector<Worker> workers;
  };

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<C>(packed_elements()), arena->take<C>(reader_.zero_elements()), {}};
    for (int w = 0; w < workers; ++w)
      s.workers.push_back({reader_.carve(arena, s.zeros), arena->take<int64_t>(1), arena->take<C>(kPlanes * plane()),
                           arena->take<C>(pass_panels_ * product_panel()), arena->take<C>(kGroupRows * kernels_.panel),
                           arena->take<C>(few_ ? kPlanes * part_plane() : 9 * kBlockElements)});
    return s;
  }

  int64_t blocks() const { return ceil_div(windows_.positions(), kGroup); }
  int64_t block_pixels(int64_t block) const {
    int64_t pixels = 0;
    windows_.for_lines(block * kGroup, block_end(block),
                       [&](const WindowLine& line) { pixels += line.pixels * line.lines; });
    return pixels;
  }

  int64_t packed_elements() const { return panels() * panel_elements(); }

  void pack(const FilterLayout& filters, const Scratch& s, C* packed, ParallelFor* parallel) const {
    const FilterBlocks blocks = filter_blocks(filters);
    const int64_t wide = ceil_div(panels(), blocks.panels);
    parallel->run(ceil_div(depth_, blocks.depth) * wide, [&](int64_t task, int worker) {
      const int64_t begin = task / wide * blocks.depth, panel = task % wide * blocks.panels;
      const int64_t depth = std::min(blocks.depth, depth_ - begin), count = std::min(blocks.panels, panels() - panel);
      if (few_) return load(filters, begin, depth, panel, 1, packed + panel * panel_elements() + part_element(begin));
      load(filters, begin, depth, panel, count, s.workers[worker].filters);
      transform(s.workers[worker].filters, begin, depth, panel, count, packed);
    });
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    std::fill(s.zeros, s.zeros + reader_.zero_elements(), C(0));
    if (!filters.packed) pack(filters, s, s.filters, parallel);
    const C* packed = filters.packed ? static_cast<const C*>(filters.packed) : s.filters;
    for (const Worker& w : s.workers) *w.transformed = -1;
    // Few windows: tasks of fewer panels, for which each thread transforms the windows again. A plane's rows, which a
    // task reads from L2, should serve more than one of them.
    const int64_t tasks = ceil_div(blocks(), block_windows_ / kGroup), most = ceil_div(panels(), 2);
    const int64_t panel_tasks = std::min(most, ceil_div(wanted_tasks(*parallel, kTasks / 2), tasks));
    parallel->run(tasks * panel_tasks, [&](int64_t task, int worker) {
      const int64_t at = task / panel_tasks, share = task % panel_tasks;
      run_task(at * blocks() / tasks, (at + 1) * blocks() / tasks, share * panels() / panel_tasks,
               (share + 1) * panels() / panel_tasks, packed, s, worker, epilogue);
    });
  }

 private:
  static constexpr int64_t kPlanes = (M + 2) * (M + 2);
  static constexpr int64_t kGroupRows = 2 * kBlockRows;    // pixels of a block: of blocks()
  static constexpr int64_t kGroup = kGroupRows / (M * M);  // its windows
  static constexpr int64_t kMaxPassPanels = 16;
  static constexpr int64_t kPartDepth = (M == 2 ? 2 : 1) * kPlaneDepth;  // 256 KiB of transformed floats, or 288
  static constexpr int64_t kLowDepth = 32;                               // 24 KiB of two lines of planes
  static constexpr int64_t kOdd = 64 / sizeof(C);  // elements that make a plane an odd number of cache lines

  int64_t block_end(int64_t block) const { return std::min((block + 1) * kGroup, windows_.positions()); }
  int64_t depth_block() const { return block_windows_ * kPlaneDepth; }
  int64_t plane() const { return ceil_div(depth_, kPlaneDepth) * depth_block() + kOdd; }
  int64_t product_plane() const { return block_windows_ * kernels_.panel + kOdd; }
  int64_t product_panel() const { return kPlanes * product_plane(); }
  int64_t panels() const { return ceil_div(cols_, kernels_.panel); }
  int64_t filter_plane() const { return depth_ * kernels_.panel + kOdd; }
  int64_t part_plane() const { return part_depth_ * kernels_.panel + kOdd; }
  int64_t part_element(int64_t begin) const { return 9 * begin * kernels_.panel; }
  int64_t panel_elements() const { return few_ ? part_element(depth_) : kPlanes * filter_plane(); }

  // Whether all windows make one block, whose planes stay in L2 with a part of the transformed filters. These are then
  // used but once, and made just before that: of all of them (M+2)^2 planes would come from memory in place of 9.
  bool inputs_fit_cache(bool kept_filters) const {
    return winograd_inputs_fit_cache<M>(max_input_bytes(kernels_.l2, kept_filters), windows_.positions(), depth_,
                                        sizeof(C));
  }

  // Windows of a task. The filters pass by once a task: so many windows hide that they come from L3, and those of up to
  // 256 channels, and their products, about stay in an L2 of 2 MiB. Deeper ones do not: then more of them are better.
  int64_t block_windows() const {
    constexpr int64_t kWindows = 36, kDeepWindows = 72, kDeep = 3 << 20;
    if (few_) return std::max<int64_t>(1, blocks()) * kGroup;
    const int64_t bytes = kPlanes * (depth_ + pass_panels_ * kernels_.panel) * static_cast<int64_t>(sizeof(C));
    const int64_t windows = kWindows * bytes > kDeep ? kDeepWindows : kWindows;
    return std::clamp(windows / kGroup, int64_t{1}, std::max<int64_t>(1, blocks())) * kGroup;
  }

  // Filters are transformed in blocks that are loaded first, as they lie in memory: some of their rows or, of
  // transposed filters, some of their columns.
  struct FilterBlocks {
    int64_t depth, panels;
  };
  static constexpr int64_t kStreamed = 16 << 20;    // bytes of transformed filters that are better written past caches
  static constexpr int64_t kBlockElements = 16384;  // for each tap: 9 of them are 576 KiB of floats

  FilterBlocks filter_blocks(const FilterLayout& f) const {
    if (few_) return {part_depth_, 1};
    const int64_t depth = f.depth_stride == 1 ? kBlockElements / kernels_.panel / 2 : 16;
    return {depth, std::max<int64_t>(1, kBlockElements / (depth * kernels_.panel))};
  }

  // to[9][depth][count][panel] = these filters and columns of zeros.
  void load(const FilterLayout& f, int64_t begin, int64_t depth, int64_t panel, int64_t count, C* to) const {
    const int64_t ld = count * kernels_.panel, tap = depth * ld, column = panel * kernels_.panel;
    const int64_t cols = std::min(ld, cols_ - column);
    if (cols < ld) std::fill(to, to + 9 * tap, C(0));
    for (int64_t t = 0; t < 9; ++t, to += tap) {
      const int64_t element = f.tap_offset[t] + begin * f.depth_stride + column * f.column_stride;
      const char* from = static_cast<const char*>(f.data) + element * storage_.element_bytes;
      if (storage_.is_compute_type && f.depth_stride == 1)
        kernels_.transpose(reinterpret_cast<const C*>(from), f.column_stride, cols, depth, to, ld);
      else
        storage_.kernels.load(from, f.depth_stride, f.column_stride, depth, cols, to, ld);
    }
  }

  void transform(const C* loaded, int64_t begin, int64_t depth, int64_t panel, int64_t count, C* packed) const {
    const int64_t ld = count * kernels_.panel;
    constexpr int64_t kElement = sizeof(C), kLine = 64;  // bytes; parts of lines, to 36 planes in turn, would be slow
    const bool streams = kernels_.lanes * kElement == kLine && packed_elements() * kElement > kStreamed;
    for (int64_t p = 0; p < count; ++p)
      transforms_.filter(loaded + p * kernels_.panel, depth * ld, ld, depth,
                         packed + (panel + p) * panel_elements() + begin * kernels_.panel, filter_plane(), streams);
  }

  // Blocks begin <= i < end.
  void run_task(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end, const C* packed, const Scratch& s,
                int worker, const TileEpilogue<C>& epilogue) const {
    const Worker& w = s.workers[worker];
    const int64_t first = begin * kGroup, last = block_end(end - 1);
    const WindowRows rows = windows_.rows(first, last);
    if (*w.transformed != first) {
      reader_.stage(first, last - first, w.reader);
      point(first, last, rows, w.reader);
      transform_windows(rows, w);
      *w.transformed = first;
    }
    for (int64_t panel = panel_begin; panel < panel_end; panel += pass_panels_) {
      const int64_t pass_end = std::min(panel + pass_panels_, panel_end);
      if (low_)
        multiply_by_lines(rows, packed + panel * panel_elements(), w);
      else if (few_)
        multiply_by_parts(rows, packed + panel * panel_elements(), w);
      else
        multiply(rows, packed + panel * panel_elements(), pass_end - panel, w);
      WindowRows from = rows, behind = rows;
      for (int64_t block = begin; block < end; ++block, from = behind)
        for (int64_t p = panel; p < pass_end; ++p)
          behind = emit(block, p, w.products + (p - panel) * product_panel(), from, worker, w.outputs, epilogue);
    }
  }

  // Points the table's column of each window's row at its pixels.
  void point(int64_t first, int64_t last, WindowRows rows, typename WindowReader<C>::Scratch reader) const {
    const C** const table = reader.rows;
    windows_.for_lines(first, last, [&](const WindowLine& line) {
      reader.rows = table + rows.take(window_kind(line.low, false), line.wide());
      reader_.point(line.window, line.wide(), reader);
      if (!line.narrow) return;
      reader.rows = table + rows.take(window_kind(line.low, true), 1);
      reader_.point(line.window + line.wide(), 1, reader);
    });
  }

  void transform_windows(const WindowRows& rows, const Worker& w) const {
    for (const WindowKind kind : {kLowWindow, kWholeWindow, kNarrowWindow, kLowNarrowWindow})
      if (const int64_t row = rows.begin[kind], count = rows.count(kind); count > 0)
        transforms_.window[is_low(kind)][is_narrow(kind)](
            {w.reader.rows + row, block_windows_, count, kPlanes, depth_, 0},
            {w.planes + row * kPlaneDepth, kPlaneDepth, depth_block(), plane()});
  }

  // The products of some panels, plane by plane: a plane's rows stay in L2 meanwhile. While a panel is multiplied, what
  // comes after it is asked for: the next panel, plane or pass.
  void multiply(const WindowRows& rows, const C* filters, int64_t panels, const Worker& w) const {
    for (int64_t p = 0; p < kPlanes; ++p)
      for (int64_t i = 0; i < panels; ++i) {
        const C* const from = filters + p * filter_plane() + i * panel_elements();
        const C* const behind =
            p + 1 < kPlanes ? filters + (p + 1) * filter_plane() : filters + panels * panel_elements();
        const C* const ahead = i + 1 < panels ? from + panel_elements() : behind;
        multiply_plane(rows, p, 0,
                       {1, 0, depth_, nullptr, depth_block(), 0, from, kernels_.panel, 0,
                        w.products + i * product_panel(), 0, false, ahead, kernels_.panel},
                       w);
      }
  }

  // The products of a panel, whose parts lie one after the other: while one is multiplied, the next is asked for.
  void multiply_by_parts(const WindowRows& rows, const C* filters, const Worker& w) const {
    const int64_t panel = kernels_.panel, ahead_row = ceil_div(9 * panel, kPlanes);
    for (int64_t begin = 0; begin < depth_; begin += part_depth_) {
      const int64_t depth = std::min(part_depth_, depth_ - begin);
      const C* const next = filters + part_element(begin + depth);
      transforms_.filter(filters + part_element(begin), depth * panel, panel, depth, w.filters, part_plane(), false);
      for (int64_t p = 0; p < kPlanes; ++p)
        multiply_plane(rows, p, begin,
                       {1, 0, depth, nullptr, depth_block(), 0, w.filters + p * part_plane(), panel, 0, w.products, 0,
                        begin > 0, next + p * depth * ahead_row, ahead_row},
                       w);
    }
  }

  // The same of so few windows that the products of a line of planes are but a tile for each.
  void multiply_by_lines(const WindowRows& rows, const C* filters, const Worker& w) const {
    const int64_t panel = kernels_.panel, ahead_row = ceil_div(9 * panel, kPlanes);
    for (int64_t begin = 0; begin < depth_; begin += part_depth_) {
      const int64_t depth = std::min(part_depth_, depth_ - begin);
      const C* const from = filters + part_element(begin);
      const C* next = filters + part_element(begin + depth);
      for (int64_t pair = 0; pair <= M / 2; ++pair) {
        transforms_.filter_lines[pair](from, depth * panel, panel, depth, w.filters, part_plane());
        const int64_t low = pair == 0 ? 0 : 2 * pair - 1, high = pair == 0 ? M + 1 : 2 * pair;
        next = multiply_line(rows, low, {begin, begin + depth}, w.filters, next, ahead_row, w);
        next =
            multiply_line(rows, high, {begin, begin + depth}, w.filters + (M + 2) * part_plane(), next, ahead_row, w);
      }
    }
  }

  // A line of planes, those at once that have the same rows. Returns what is to be asked for after it.
  const C* multiply_line(const WindowRows& rows, int64_t line, Span depth, const C* filters, const C* next,
                         int64_t ahead_row, const Worker& w) const {
    const int64_t at = depth.begin / kPlaneDepth * depth_block() + depth.begin % kPlaneDepth;
    for (int64_t x = 0, end; x < M + 2; x = end) {
      const int64_t first = line * (M + 2) + x;
      const Span span = rows.of_plane<M>(first);
      for (end = x + 1; end < M + 2; ++end)
        if (const Span s = rows.of_plane<M>(first + end - x); s.begin != span.begin || s.end != span.end) break;
      if (span.size() > 0)
        kernels_.multiply_low_planes({end - x, span.size(), depth.size(),
                                      w.planes + first * plane() + at + span.begin * kPlaneDepth, 0, plane(),
                                      filters + x * part_plane(), kernels_.panel, part_plane(),
                                      w.products + first * product_plane() + span.begin * kernels_.panel,
                                      product_plane(), depth.begin > 0, next, ahead_row});
      next += (end - x) * depth.size() * ahead_row;
    }
    return next;
  }

  // `product` of the rows that plane p has, from the depth `begin` on.
  void multiply_plane(const WindowRows& rows, int64_t p, int64_t begin, Planes<C> product, const Worker& w) const {
    const Span span = rows.of_plane<M>(p);
    if (span.begin == span.end) return;
    product.rows = span.end - span.begin;
    product.a = w.planes + p * plane() + begin / kPlaneDepth * depth_block() + span.begin * kPlaneDepth;
    product.c += p * product_plane() + span.begin * kernels_.panel;
    kernels_.multiply_plane(product);
  }

  // Transforms the products of a group back, line by line, so that the outputs of a line are consecutive rows. Returns
  // the rows behind those of the group.
  WindowRows emit(int64_t group, int64_t panel, const C* products, WindowRows rows, int worker, C* outputs,
                  const TileEpilogue<C>& epilogue) const {
    const int64_t column = panel * kernels_.panel, cols = std::min(kernels_.panel, cols_ - column);
    Tile<C> tile{outputs, kernels_.panel, 0, 0, column, cols, group, worker};
    windows_.for_lines(group * kGroup, block_end(group), [&](const WindowLine& line) {
      transform_line(line, products, &rows, tile.data);
      tile.rows = line.pixels;
      for (int64_t l = 0; l < line.lines; ++l, tile.data += line.pixels * kernels_.panel) {
        tile.first = line.first + l * windows_.output_width();
        epilogue.emit(tile);
      }
    });
    if (!epilogue.finish) return rows;
    tile.rows = (tile.data - outputs) / kernels_.panel;
    tile.data = outputs;
    epilogue.finish(tile);
    return rows;
  }

  void transform_line(const WindowLine& line, const C* products, WindowRows* rows, C* outputs) const {
    const int64_t panel = kernels_.panel, wide = line.wide(), pixels = std::min(M * wide, line.pixels);
    const auto transform = [&](bool narrow, int64_t count, int64_t first, int64_t end) {
      const C* from = products + rows->take(window_kind(line.low, narrow), count) * panel;
      transforms_.output[line.low][narrow](from, product_plane(), count, end - first, line.lines,
                                           outputs + first * panel, line.pixels);
    };
    if (wide > 0) transform(false, wide, 0, pixels);
    if (line.narrow) transform(true, 1, pixels, line.pixels);
  }

  const ComputeKernels<C>& kernels_;
  const WinogradKernels<C>& transforms_;
  Storage<C> storage_;
  WinogradWindows<M> windows_;
  int64_t depth_, cols_;
  bool few_;               // windows: see inputs_fit_cache()
  bool low_;               // no more of them than a tile has rows
  int64_t part_depth_;     // of few windows
  int64_t pass_panels_;    // multiplied in a pass over the planes
  int64_t block_windows_;  // of a task, at most
  WindowReader<C> reader_;
};

template <class C>
using Winograd2 = WinogradConvolution<C, 2>;
template <class C>
using Winograd4 = WinogradConvolution<C, 4>;

}  // namespace fusedconvbn
