// The Winograd convolution: 3x3 filters at stride 1, in windows of 4x4 pixels that give 2x2 outputs.
//
// A block of windows is transformed into 16 planes, each plane is multiplied by its plane of the transformed filters,
// and the products are transformed back, a panel of output channels at a time while they are in cache. Same interface
// as Convolution (convolve.h); the windows come from the same tables of pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "convolve.h"
#include "image.h"
#include "windows.h"

namespace fusedconvbn {

template <class C>
class WinogradConvolution {
 public:
  // `windows` are those of the direct algorithm: 9 taps, steps of 1.
  WinogradConvolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
                      const Windows& windows, const Channels& channels)
      : kernels_(kernels),
        storage_(storage),
        outputs_(windows),
        windows_(tile(windows)),
        depth_(channels.depth),
        cols_(channels.cols),
        reader_(source, depth_, windows_, false, kWindows, kWindows) {}

  struct Worker {
    typename WindowReader<C>::Scratch reader;
    const C** rows;  // [kWindows]: of a plane
    C* planes;       // [16][kWindows][ld()]
    C* products;     // [16][kWindows][panel]
    C* outputs;      // [4 * kWindows][panel]
    C* filters;      // [9][kDepth][panel]
  };
  struct Scratch {
    C* filters;  // [panels][16][depth][panel]
    C* zeros;
    std::vector<Worker> workers;
  };

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<C>(packed_elements()), arena->take<C>(reader_.zero_elements()), {}};
    for (int w = 0; w < workers; ++w)
      s.workers.push_back({reader_.carve(arena, s.zeros), arena->take<const C*>(kWindows),
                           arena->take<C>(kPlanes * kWindows * ld()),
                           arena->take<C>(kPlanes * kWindows * kernels_.panel),
                           arena->take<C>(4 * kWindows * kernels_.panel), arena->take<C>(9 * kDepth * kernels_.panel)});
    return s;
  }

  int64_t blocks() const { return ceil_div(windows_.positions(), kWindows); }
  int64_t block_pixels(int64_t block) const {
    int64_t pixels = 0;
    for_lines(block, [&](const Line& line) { pixels += line.pixels * line.lines; });
    return pixels;
  }

  int64_t packed_elements() const { return panels() * panel_elements(); }

  void pack(const FilterLayout& filters, const Scratch& s, C* packed, ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t panel, int worker) {
      pack(filters, panel, s.workers[worker].filters, packed + panel * panel_elements());
    });
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    std::fill(s.zeros, s.zeros + reader_.zero_elements(), C(0));
    if (!filters.packed) pack(filters, s, s.filters, parallel);
    const C* packed = filters.packed ? static_cast<const C*>(filters.packed) : s.filters;
    const int64_t panel_tasks = std::min(panels(), ceil_div(4 * parallel->threads(), blocks()));
    parallel->run(blocks() * panel_tasks, [&](int64_t task, int worker) {
      const int64_t share = task % panel_tasks;
      run_block(task / panel_tasks, share * panels() / panel_tasks, (share + 1) * panels() / panel_tasks, packed, s,
                worker, epilogue);
    });
  }

 private:
  static constexpr int64_t kPlanes = 16;
  // Windows of a block: 4 register tiles of AVX-512. 256 channels of 16 planes are 0.8 MiB, within an L2 of 2 MiB.
  static constexpr int64_t kWindows = 48;
  static constexpr int64_t kDepth = 64;  // channels of filters transformed at once: 9 x 64 x 32 floats are 72 KiB

  // A run of windows of one image line: two output lines of `pixels`, one where the image ends between them.
  struct Line {
    int64_t window, windows;  // within the block
    int64_t first, pixels, lines;
  };

  static Windows tile(const Windows& w) {
    Windows tiles{w.batch, ceil_div(w.height, 2), ceil_div(w.width, 2), 2, 2, {}};
    for (int64_t h = 0; h < 4; ++h)
      for (int64_t v = 0; v < 4; ++v) tiles.taps.push_back({w.taps[0].height + h, w.taps[0].width + v});
    return tiles;
  }

  int64_t ld() const { return depth_ + 16; }  // not a power of two, whose rows would share few sets of the cache
  int64_t plane() const { return kWindows * ld(); }
  int64_t panels() const { return ceil_div(cols_, kernels_.panel); }
  int64_t panel_elements() const { return kPlanes * depth_ * kernels_.panel; }

  // loaded: a worker's filters.
  void pack(const FilterLayout& f, int64_t panel, C* loaded, C* packed) const {
    const int64_t column = panel * kernels_.panel, cols = std::min(kernels_.panel, cols_ - column);
    for (int64_t begin = 0; begin < depth_; begin += kDepth) {
      const int64_t depth = std::min(kDepth, depth_ - begin);
      if (cols < kernels_.panel) std::fill(loaded, loaded + 9 * depth * kernels_.panel, C(0));
      for (int64_t t = 0; t < 9; ++t) {
        const int64_t element = f.tap_offset[t] + begin * f.depth_stride + column * f.column_stride;
        storage_.kernels.load(static_cast<const char*>(f.data) + element * storage_.element_bytes, f.depth_stride,
                              f.column_stride, depth, cols, loaded + t * depth * kernels_.panel, kernels_.panel);
      }
      kernels_.winograd_filter(loaded, depth, packed + begin * kernels_.panel, depth_ * kernels_.panel);
    }
  }

  void run_block(int64_t block, int64_t panel_begin, int64_t panel_end, const C* packed, const Scratch& s, int worker,
                 const TileEpilogue<C>& epilogue) const {
    const Worker& w = s.workers[worker];
    const int64_t first = block * kWindows, count = std::min(kWindows, windows_.positions() - first);
    reader_.stage(first, count, w.reader);
    reader_.point(first, count, w.reader);
    kernels_.winograd_window({w.reader.rows, kWindows, count, kPlanes, depth_, 0}, w.planes, ld(), plane());
    for (int64_t r = 0; r < count; ++r) w.rows[r] = w.planes + r * ld();
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const C* filters = packed + panel * panel_elements();
      for (int64_t p = 0; p < kPlanes; ++p)
        kernels_.gemm({w.rows, kWindows, count, 1, depth_, p * plane()}, filters + p * depth_ * kernels_.panel,
                      w.products + p * kWindows * kernels_.panel);
      const int64_t column = panel * kernels_.panel;
      emit(block, w, {w.outputs, kernels_.panel, 0, 0, column, std::min(kernels_.panel, cols_ - column), block, worker},
           epilogue);
    }
  }

  // Transforms the products of a block back, line by line, so that the outputs of a line are consecutive rows.
  void emit(int64_t block, const Worker& w, Tile<C> tile, const TileEpilogue<C>& epilogue) const {
    C* rows = w.outputs;
    for_lines(block, [&](const Line& line) {
      C* lower = rows + line.pixels * kernels_.panel;
      kernels_.winograd_output(w.products + line.window * kernels_.panel, kWindows * kernels_.panel, line.windows,
                               line.pixels, rows, line.lines == 2 ? lower : nullptr);
      for (int64_t l = 0; l < line.lines; ++l, rows += line.pixels * kernels_.panel) {
        tile.data = rows, tile.first = line.first + l * outputs_.width, tile.rows = line.pixels;
        epilogue.emit(tile);
      }
    });
    if (!epilogue.finish) return;
    tile.data = w.outputs, tile.rows = (rows - w.outputs) / kernels_.panel;
    epilogue.finish(tile);
  }

  template <class F>
  void for_lines(int64_t block, F f) const {
    const int64_t begin = block * kWindows, end = std::min(begin + kWindows, windows_.positions());
    for (int64_t at = begin, count; at < end; at += count) {
      const int64_t line = at / windows_.width, column = at % windows_.width;
      count = std::min(end - at, windows_.width - column);
      const int64_t image = line / windows_.height, h = line % windows_.height * 2;
      f(Line{at - begin, count, (image * outputs_.height + h) * outputs_.width + 2 * column,
             std::min(2 * count, outputs_.width - 2 * column), std::min<int64_t>(2, outputs_.height - h)});
    }
  }

  const ComputeKernels<C>& kernels_;
  Storage<C> storage_;
  Windows outputs_, windows_;
  int64_t depth_, cols_;
  WindowReader<C> reader_;
};

}  // namespace fusedconvbn
