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
#include "windows.h"

namespace fusedconvbn {

// The windows of F(MxM, 3x3) that cover the positions of `w`, whose taps are 3x3 and steps 1.
template <int M>
Windows winograd_windows(const Windows& w) {
  Windows tiles{w.batch, ceil_div(w.height, M), ceil_div(w.width, M), M, M, {}};
  for (int64_t h = 0; h < M + 2; ++h)
    for (int64_t v = 0; v < M + 2; ++v) tiles.taps.push_back({w.taps[0].height + h, w.taps[0].width + v});
  return tiles;
}

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
        outputs_(windows),
        windows_(winograd_windows<M>(windows)),
        depth_(channels.depth),
        cols_(channels.cols),
        block_windows_(block_windows(channels.depth)),
        reader_(source, depth_, windows_, false, block_windows_, block_windows_) {}

  struct Worker {
    typename WindowReader<C>::Scratch reader;
    C* planes;    // [kPlanes][windows][ld()]
    C* products;  // [kPlanes][windows][panel]
    C* outputs;   // [kGroupRows][panel]
    C* filters;   // [9][kDepth][panel]
  };
  struct Scratch {
    C* filters;  // [panels][kPlanes][depth][panel]
    C* zeros;
    std::vector<Worker> workers;
  };

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<C>(panels() * panel_elements()), arena->take<C>(reader_.zero_elements()), {}};
    for (int w = 0; w < workers; ++w)
      s.workers.push_back({reader_.carve(arena, s.zeros), arena->take<C>(kPlanes * plane()),
                           arena->take<C>(kPlanes * product_plane()), arena->take<C>(kGroupRows * kernels_.panel),
                           arena->take<C>(9 * kDepth * kernels_.panel)});
    return s;
  }

  int64_t blocks() const { return ceil_div(windows_.positions(), kGroup); }
  int64_t block_pixels(int64_t block) const {
    int64_t pixels = 0;
    for_lines(block, [&](const Line& line) { pixels += line.pixels * line.lines; });
    return pixels;
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    std::fill(s.zeros, s.zeros + reader_.zero_elements(), C(0));
    parallel->run(panels(), [&](int64_t panel, int worker) { pack(filters, panel, s, s.workers[worker]); });
    const int64_t tasks = ceil_div(windows_.positions(), block_windows_);
    const int64_t panel_tasks = std::min(panels(), ceil_div(4 * parallel->threads(), tasks));
    parallel->run(tasks * panel_tasks, [&](int64_t task, int worker) {
      const int64_t share = task % panel_tasks;
      run_task(task / panel_tasks, share * panels() / panel_tasks, (share + 1) * panels() / panel_tasks, s, worker,
               epilogue);
    });
  }

 private:
  static constexpr int64_t kPlanes = (M + 2) * (M + 2);
  static constexpr int64_t kGroupRows = 2 * kBlockRows;    // pixels of a block: of blocks()
  static constexpr int64_t kGroup = kGroupRows / (M * M);  // its windows
  static constexpr int64_t kDepth = 64;  // channels of filters transformed at once: 9 x 64 x 32 floats are 72 KiB
  static constexpr int64_t kOdd = 64 / sizeof(C);  // elements that make a plane an odd number of cache lines

  // A run of windows of one image line: `lines` output lines of `pixels`, fewer than M where the image ends.
  struct Line {
    int64_t window, windows;  // within the group
    int64_t first, pixels, lines;
  };

  int64_t ld() const { return depth_ + kOdd; }  // not a power of two, whose rows would share few sets of the cache
  int64_t plane() const { return block_windows_ * ld() + kOdd; }
  int64_t product_plane() const { return block_windows_ * kernels_.panel + kOdd; }
  int64_t panels() const { return ceil_div(cols_, kernels_.panel); }
  int64_t filter_plane() const { return depth_ * kernels_.panel + kOdd; }
  int64_t panel_elements() const { return kPlanes * filter_plane(); }

  // Windows of a task: their planes take half of an L2 of 2 MiB, but where that leaves few windows to the filters,
  // which then are better read again and again than they.
  static int64_t block_windows(int64_t depth) {
    constexpr int64_t kBudget = 1 << 20, kMin = std::max<int64_t>(kGroup, 36), kMax = 2048;
    const int64_t windows = kBudget / (kPlanes * (depth + kOdd) * static_cast<int64_t>(sizeof(C)));
    return std::clamp(windows, kMin, kMax) / kGroup * kGroup;
  }

  void pack(const FilterLayout& f, int64_t panel, const Scratch& s, const Worker& w) const {
    const int64_t column = panel * kernels_.panel, cols = std::min(kernels_.panel, cols_ - column);
    C* packed = s.filters + panel * panel_elements();
    for (int64_t begin = 0; begin < depth_; begin += kDepth) {
      const int64_t depth = std::min(kDepth, depth_ - begin);
      if (cols < kernels_.panel) std::fill(w.filters, w.filters + 9 * depth * kernels_.panel, C(0));
      for (int64_t t = 0; t < 9; ++t) {
        const int64_t element = f.tap_offset[t] + begin * f.depth_stride + column * f.column_stride;
        storage_.kernels.load(static_cast<const char*>(f.data) + element * storage_.element_bytes, f.depth_stride,
                              f.column_stride, depth, cols, w.filters + t * depth * kernels_.panel, kernels_.panel);
      }
      transforms_.filter(w.filters, depth, packed + begin * kernels_.panel, filter_plane());
    }
  }

  void run_task(int64_t task, int64_t panel_begin, int64_t panel_end, const Scratch& s, int worker,
                const TileEpilogue<C>& epilogue) const {
    const Worker& w = s.workers[worker];
    const int64_t first = task * block_windows_, count = std::min(block_windows_, windows_.positions() - first);
    reader_.stage(first, count, w.reader);
    reader_.point(first, count, w.reader);
    transforms_.window({w.reader.rows, block_windows_, count, kPlanes, depth_, 0}, w.planes, ld(), plane());
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      kernels_.multiply_planes({kPlanes, count, depth_, w.planes, ld(), plane(), s.filters + panel * panel_elements(),
                                kernels_.panel, filter_plane(), w.products, product_plane(), false});
      for (int64_t done = 0; done < count; done += kGroup)
        emit((first + done) / kGroup, panel, w.products + done * kernels_.panel, worker, w.outputs, epilogue);
    }
  }

  // Transforms the products of a group back, line by line, so that the outputs of a line are consecutive rows.
  void emit(int64_t group, int64_t panel, const C* products, int worker, C* outputs,
            const TileEpilogue<C>& epilogue) const {
    const int64_t column = panel * kernels_.panel, cols = std::min(kernels_.panel, cols_ - column);
    Tile<C> tile{outputs, kernels_.panel, 0, 0, column, cols, group, worker};
    for_lines(group, [&](const Line& line) {
      transforms_.output(products + line.window * kernels_.panel, product_plane(), line.windows, line.pixels,
                         line.lines, tile.data);
      tile.rows = line.pixels;
      for (int64_t l = 0; l < line.lines; ++l, tile.data += line.pixels * kernels_.panel) {
        tile.first = line.first + l * outputs_.width;
        epilogue.emit(tile);
      }
    });
    if (!epilogue.finish) return;
    tile.rows = (tile.data - outputs) / kernels_.panel;
    tile.data = outputs;
    epilogue.finish(tile);
  }

  template <class F>
  void for_lines(int64_t group, F f) const {
    const int64_t begin = group * kGroup, end = std::min(begin + kGroup, windows_.positions());
    for (int64_t at = begin, count; at < end; at += count) {
      const int64_t line = at / windows_.width, column = at % windows_.width;
      count = std::min(end - at, windows_.width - column);
      const int64_t image = line / windows_.height, h = line % windows_.height * M;
      f(Line{at - begin, count, (image * outputs_.height + h) * outputs_.width + M * column,
             std::min(M * count, outputs_.width - M * column), std::min<int64_t>(M, outputs_.height - h)});
    }
  }

  const ComputeKernels<C>& kernels_;
  const WinogradKernels<C>& transforms_;
  Storage<C> storage_;
  Windows outputs_, windows_;
  int64_t depth_, cols_;
  int64_t block_windows_;  // of a task
  WindowReader<C> reader_;
};

template <class C>
using Winograd2 = WinogradConvolution<C, 2>;
template <class C>
using Winograd4 = WinogradConvolution<C, 4>;

}  // namespace fusedconvbn
