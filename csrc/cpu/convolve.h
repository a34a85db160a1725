// The direct convolution: packed filters, a table of pointers for each block of positions, register tiles.
//
// A convolution of any windows; forward and the gradient by the input are both made of it. WinogradConvolution
// (winograd.h) and DepthwiseConvolution (depthwise.h) have the same interface. What becomes of a tile while it is hot
// in L1 is the caller's TileEpilogue.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "arena.h"
#include "image.h"
#include "windows.h"

namespace fusedconvbn {

// Positions of a block: 8 register tiles of AVX-512, 16 of the others. A tile of the block, 96 x 32 floats, is 12 KiB.
// Also the unit of the batch statistics, so it never depends on the number of threads.
constexpr int64_t kBlockRows = 96;
constexpr int64_t kMaxTaskRows = 4096;  // of a task that stages its source: longer lines need no more of them

// Where the filters of a tap, of a reduced and of a produced channel lie: strides in elements.
struct FilterLayout {
  const void* data;
  std::vector<int64_t> tap_offset;  // [taps]
  int64_t group_stride, depth_stride, column_stride;
  const void* packed = nullptr;  // what pack() of the same filters wrote; null: run() packs them into its scratch
};

// A block's outputs of a few channels: consecutive pixels as rows.
template <class C>
struct Tile {
  C* data;
  int64_t ld, first, rows, channel, cols;
  int64_t block;  // of blocks()
  int worker;
};

template <class C>
struct TileEpilogue {
  // For each run of consecutive pixels, at most kBlockRows.
  std::function<void(const Tile<C>&)> emit;
  // May be empty; for the rows of all the block's runs at once, up to twice as many.
  std::function<void(const Tile<C>&)> finish;
};

struct Channels {
  int64_t groups, depth, cols;  // per group: reduced, produced
};

template <class C>
class Convolution {
 public:
  // `storage` is that of the filters.
  Convolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
              const Windows& windows, const Channels& channels)
      : kernels_(kernels),
        storage_(storage),
        windows_(windows),
        groups_(channels.groups),
        depth_(channels.depth),
        cols_(channels.cols),
        blocks_in_task_(ceil_div(std::min(4 * windows.width, kMaxTaskRows), kBlockRows)),
        in_cache_(fits_cache(source.grid())),
        table_rows_(in_cache_ ? std::max(kBlockRows, windows.positions()) : kBlockRows),
        reader_(source, groups_ * depth_, windows, groups_ == 1, table_rows_, blocks_in_task_ * kBlockRows) {
    if (!reader_.staged()) blocks_in_task_ = 1;
  }

  struct Scratch {
    C* filters;  // [panels][taps][depth][panel]
    C* zeros;
    std::vector<C*> tile;  // a worker's [kBlockRows][panel]
    std::vector<typename WindowReader<C>::Scratch> reader;
  };

  int64_t blocks() const { return ceil_div(windows_.positions(), kBlockRows); }
  int64_t block_pixels(int64_t block) const { return std::min(kBlockRows, windows_.positions() - block * kBlockRows); }

  Scratch carve(Arena* arena, int workers) const {
    Scratch s;
    s.filters = arena->take<C>(packed_elements());
    s.zeros = arena->take<C>(reader_.zero_elements());
    for (int w = 0; w < workers; ++w) {
      s.tile.push_back(arena->take<C>(kBlockRows * kernels_.panel));
      s.reader.push_back(reader_.carve(arena, s.zeros));
    }
    return s;
  }

  int64_t packed_elements() const { return panels() * panel_elements(); }

  void pack(const FilterLayout& filters, const Scratch&, C* packed, ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t panel, int) { pack(filters, panel, packed + panel * panel_elements()); });
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    std::fill(s.zeros, s.zeros + reader_.zero_elements(), C(0));
    if (!filters.packed) pack(filters, s, s.filters, parallel);
    const C* packed = filters.packed ? static_cast<const C*>(filters.packed) : s.filters;

    // Few blocks: tasks of fewer panels, so that every thread has several.
    const int64_t threads = parallel->threads(), wanted = threads == 1 ? 1 : 4 * threads;
    const bool all_blocks = in_cache_ && !reader_.staged() && panels() >= wanted;
    const int64_t task_blocks = all_blocks ? blocks() : blocks_in_task_;
    const int64_t block_tasks = ceil_div(blocks(), task_blocks);
    const int64_t panel_tasks = std::min(panels(), ceil_div(wanted, block_tasks));
    parallel->run(block_tasks * panel_tasks, [&](int64_t task, int worker) {
      const int64_t block = task / panel_tasks * task_blocks, share = task % panel_tasks;
      run_task(block, std::min(block + task_blocks, blocks()), share * panels() / panel_tasks,
               (share + 1) * panels() / panel_tasks, packed, s, worker, epilogue);
    });
  }

 private:
  // Whether the source stays in half of an L2 of 2 MiB while the filters pass by. Then each panel of them is used for
  // all blocks at once, and read from memory once.
  bool fits_cache(const Grid& source) const {
    constexpr int64_t kMaxBytes = 1 << 20, kMaxBlocks = 4;  // and the pointers of all positions are few
    const int64_t elements = windows_.batch * source.height * source.width * groups_ * depth_;
    return blocks() <= kMaxBlocks && elements * static_cast<int64_t>(sizeof(C)) <= kMaxBytes;
  }

  int64_t panels_in_group() const { return ceil_div(cols_, kernels_.panel); }
  int64_t panels() const { return groups_ * panels_in_group(); }
  int64_t tap_elements() const { return depth_ * kernels_.panel; }
  int64_t panel_elements() const { return static_cast<int64_t>(windows_.taps.size()) * tap_elements(); }

  void pack(const FilterLayout& f, int64_t panel, C* packed) const {
    const int64_t group = panel / panels_in_group(), column = panel % panels_in_group() * kernels_.panel;
    const int64_t cols = std::min(kernels_.panel, cols_ - column);
    if (cols < kernels_.panel) std::fill(packed, packed + panel_elements(), C(0));
    const char* data = static_cast<const char*>(f.data);
    for (int64_t offset : f.tap_offset) {
      const int64_t element = offset + group * f.group_stride + column * f.column_stride;
      const char* from = data + element * storage_.element_bytes;
      if (storage_.is_compute_type && f.depth_stride == 1)
        kernels_.transpose(reinterpret_cast<const C*>(from), f.column_stride, cols, depth_, packed);
      else
        storage_.kernels.load(from, f.depth_stride, f.column_stride, depth_, cols, packed, kernels_.panel);
      packed += tap_elements();
    }
  }

  void run_task(int64_t block, int64_t block_end, int64_t panel_begin, int64_t panel_end, const C* packed,
                const Scratch& s, int worker, const TileEpilogue<C>& epilogue) const {
    const int64_t begin = block * kBlockRows, end = std::min(block_end * kBlockRows, windows_.positions());
    const auto& scratch = s.reader[worker];
    reader_.stage(begin, end - begin, scratch);
    for (int64_t first = begin; first < end; first += table_rows_) {
      const int64_t rows = std::min(table_rows_, end - first);
      reader_.point(first, rows, scratch);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel)
        for (int64_t done = 0; done < rows; done += kBlockRows) {
          const int64_t count = std::min(kBlockRows, rows - done);
          GatheredRows<C> in{scratch.rows + done,
                             table_rows_,
                             count,
                             reader_.taps(),
                             reader_.depth() * depth_,
                             panel / panels_in_group() * depth_};
          const C* filters = packed + panel * panel_elements();
          if (in_cache_ && panel + 1 < panel_end) fetch_share(filters + panel_elements(), done, rows, &in);
          kernels_.gemm(in, filters, s.tile[worker]);
          emit({s.tile[worker], kernels_.panel, first + done, count, 0, 0, (first + done) / kBlockRows, worker}, panel,
               epilogue);
        }
    }
  }

  // Of the next panel, as much as `in` is of the `rows` that this one serves.
  void fetch_share(const C* panel, int64_t done, int64_t rows, GatheredRows<C>* in) const {
    in->ahead = panel + panel_elements() * done / rows;
    in->ahead_end = panel + panel_elements() * (done + in->count) / rows;
  }

  void emit(Tile<C> tile, int64_t panel, const TileEpilogue<C>& epilogue) const {
    const int64_t group = panel / panels_in_group(), column = panel % panels_in_group() * kernels_.panel;
    tile.channel = group * cols_ + column;
    tile.cols = std::min(kernels_.panel, cols_ - column);
    epilogue.emit(tile);
    if (epilogue.finish) epilogue.finish(tile);
  }

  const ComputeKernels<C>& kernels_;
  Storage<C> storage_;
  Windows windows_;
  int64_t groups_, depth_, cols_;
  int64_t blocks_in_task_;  // enough lines that staging those above and below costs little
  bool in_cache_;           // see fits_cache()
  int64_t table_rows_;      // positions whose pointers are at hand at once
  WindowReader<C> reader_;
};

}  // namespace fusedconvbn
