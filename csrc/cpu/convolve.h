// The direct convolution: packed filters, a table of pointers for each block of positions, register tiles.
//
// A convolution of any windows; forward and the gradient by the input are both made of it. WinogradConvolution
// (winograd.h) and DepthwiseConvolution (depthwise.h) have the same interface. What becomes of a tile while it is hot
// in L1 is the caller's TileEpilogue.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "image.h"
#include "panel_parts.h"
#include "products.h"
#include "span.h"
#include "tasks.h"
#include "tile_epilogue.h"
#include "windows.h"

namespace fusedconvbn {

// Positions of a block: 8 to 16 register tiles. A tile of the block, 96 x 64 floats at most, is 24 KiB: half an L1.
// Also the unit of the batch statistics, so it never depends on the number of threads.
constexpr int64_t kBlockRows = 96;
constexpr int64_t kMaxTaskRows = 4096;  // of a task that stages its source: longer lines need no more of them

// Whether what so many positions read stays in half of an L2 of 2 MiB while the filters pass by. Then each panel of
// them is used for all blocks at once, and read from memory once.
inline bool source_fits_cache(int64_t positions, int64_t source_bytes) {
  constexpr int64_t kMaxBytes = 1 << 20, kMaxBlocks = 4;  // and the pointers of all positions are few
  return positions <= kMaxBlocks * kBlockRows && source_bytes <= kMaxBytes;
}

// Whether new filters, `rows` of all columns, are then read where they lie: there are few positions that packing them
// would serve. Many read packed panels faster: rows share sets of L1, and sums of all columns leave it. Of very many
// columns they would leave L2, and each worker has some.
inline bool outdoes_packing(int64_t positions, int64_t rows, int64_t cols) {
  constexpr int64_t kMaxSums = 256 << 10;  // 1 MiB of floats
  if (std::max(positions, kBlockRows) * cols > kMaxSums) return false;
  return positions <= kBlockRows || rows >= 2 * cols;
}

// Where the filters of a tap, of a reduced and of a produced channel lie: strides in elements.
struct FilterLayout {
  const void* data;
  std::vector<int64_t> tap_offset;  // [taps]
  int64_t group_stride, depth_stride, column_stride;
  const void* packed = nullptr;  // what pack() of the same filters wrote; null: run() packs them into its scratch
};

struct Channels {
  int64_t groups, depth, cols;  // per group: reduced, produced
  // Whether filters [taps][depth][cols] are new at each call, so that it is for that one alone that they are packed.
  bool new_filters = false;
  bool kept_filters = false;  // whether they are packed once for many calls
};

template <class C>
class Convolution {
 public:
  using Gemm = decltype(ComputeKernels<C>::gemm);

  // `storage` is that of the filters.
  Convolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
              const Windows& windows, const Channels& channels)
      : Convolution(kernels, storage, source, windows, channels, kernels.gemm) {}
  Convolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
              const Windows& windows, const Channels& channels, Gemm gemm)
      : kernels_(kernels),
        gemm_(gemm),
        storage_(storage),
        windows_(windows),
        groups_(channels.groups),
        depth_(channels.depth),
        cols_(channels.cols),
        blocks_in_task_(ceil_div(std::min(4 * windows.width, kMaxTaskRows), kBlockRows)),
        source_(source),
        in_cache_(fits_cache(source.grid())),
        table_rows_(in_cache_ ? std::max(kBlockRows, windows.positions()) : kBlockRows),
        reader_(source, groups_ * depth_, windows, groups_ == 1, table_rows_, blocks_in_task_ * kBlockRows, true),
        unpacked_(channels.new_filters && reads_unpacked()),
        parts_(reader_.taps(), reader_.depth() * depth_, rows_of_part()) {
    fetches_blocks_ = !in_cache_ && reader_.gapless();
    if (!reader_.staged() || reader_.stages_apart()) blocks_in_task_ = fetches_blocks_ ? kBlocksAhead : 1;
  }

  struct Scratch {
    C* filters;  // [groups][panels][taps][depth][panel]
    C* zeros;
    std::vector<C*> tile;   // a worker's [kBlockRows][panel], or the sums of parts: see sums()
    std::vector<C*> panel;  // a worker's [taps][depth][panel], where each panel serves one task
    std::vector<typename WindowReader<C>::Scratch> reader;
  };

  int64_t blocks() const { return ceil_div(windows_.positions(), kBlockRows); }
  int64_t block_pixels(int64_t block) const { return std::min(kBlockRows, windows_.positions() - block * kBlockRows); }

  Scratch carve(Arena* arena, int workers) const {
    Scratch s;
    s.filters = arena->take<C>(packed_elements());
    s.zeros = arena->take<C>(reader_.zero_elements());
    for (int w = 0; w < workers; ++w) {
      s.tile.push_back(arena->take<C>((parts_.count() > 1 ? table_rows_ : kBlockRows) * columns_at_once()));
      s.panel.push_back(arena->take<C>(whole_source() && !unpacked_ ? taps() * depth_ * kernels_.gemm_columns : 0));
      s.reader.push_back(reader_.carve(arena, s.zeros));
    }
    return s;
  }

  int64_t packed_elements() const { return unpacked_ ? 0 : groups_ * group_elements(); }

  void pack(const FilterLayout& filters, const Scratch&, C* packed, ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t index, int) {
      const Panel panel = panel_of(index);
      pack(filters, panel, packed + panel.element);
    });
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    std::fill(s.zeros, s.zeros + reader_.zero_elements(), C(0));
    // Few blocks: tasks of fewer panels, so that every thread has several.
    const int64_t wanted = wanted_tasks(*parallel, kTasks);
    const bool all_blocks = whole_source() && panels() >= wanted_tasks(*parallel, kFewTasks);
    const int64_t share = fetches_blocks_ ? std::max<int64_t>(1, blocks() / wanted) : blocks_in_task_;
    const int64_t task_blocks = all_blocks ? blocks() : std::min(blocks_in_task_, share);
    const int64_t block_tasks = ceil_div(blocks(), task_blocks);
    const int64_t panel_tasks = std::min(panels(), ceil_div(wanted, block_tasks));
    const C* panels_at = static_cast<const C*>(unpacked_ ? filters.data : filters.packed);
    if (!panels_at && !all_blocks) {
      pack(filters, s, s.filters, parallel);
      panels_at = s.filters;
    }
    parallel->run(block_tasks * panel_tasks, [&](int64_t task, int worker) {
      const int64_t block = task / panel_tasks * task_blocks, share = task % panel_tasks;
      const Span task_span{block, std::min(block + task_blocks, blocks())};
      const int64_t own = panel_tasks == 1 ? task_span.end * kBlockRows : 0;
      run_task(task_span, part(share, panel_tasks, panels()), filters,
               {panels_at, s, worker, epilogue, parallel->threads() == 1 ? windows_.positions() : own});
    });
  }

 private:
  static constexpr int64_t kBlocksAhead = 16;       // of a task: only its first block is not fetched ahead
  static constexpr int64_t kPartBytes = 128 << 10;  // of a part of a panel: fetched during a few dozen tiles, or more

  // Columns of the product that are computed at once.
  struct Panel {
    int64_t group, column, cols;  // in the group
    int64_t width;                // cols, rounded up to whole vectors
    int64_t element, ld;          // where its filters begin, and the distance of their rows
  };

  // What tasks have in common.
  struct Run {
    const C* panels;  // null where each panel is packed just before its use, and never leaves the caches
    const Scratch& scratch;
    int worker;
    const TileEpilogue<C>& epilogue;
    int64_t written_until;  // position up to which nobody else writes results meanwhile
  };

  // Whether the filters and what two blocks read, their pixels and that many channels of others, exceed an L2 of 2 MiB.
  // Then a block finds filters gone that the one before has used.
  bool exceeds_cache(int64_t other_channels) const {
    constexpr int64_t kMaxBytes = 3 << 19;
    const int64_t channels = windows_.step_height * windows_.step_width * groups_ * depth_ + other_channels;
    return (packed_elements() + 2 * kBlockRows * channels) * static_cast<int64_t>(sizeof(C)) > kMaxBytes;
  }

  bool fits_cache(const Grid& source) const {
    const int64_t pixels = windows_.taps.size() == 1 ? windows_.positions() : source.pixels();
    return source_fits_cache(windows_.positions(), pixels * groups_ * depth_ * static_cast<int64_t>(sizeof(C)));
  }

  // Whether a task may serve all positions, so that each panel of the filters belongs to one task.
  bool whole_source() const { return in_cache_ && !reader_.staged(); }

  bool reads_unpacked() const {
    return whole_source() && groups_ == 1 && storage_.is_compute_type && cols_ % kernels_.lanes == 0 &&
           outdoes_packing(windows_.positions(), taps() * depth_, cols_);
  }

  // Unpacked, a part is of all panels: their filters are read in the order of their addresses, which memory gives
  // fastest, and the sums of all panels wait in L2 for the next part. Fewer rows would cost more for the sums.
  int64_t rows_of_part() const {
    constexpr int64_t kMinRows = 64, kAllBytes = 256 << 10, kElement = sizeof(C);
    return unpacked_ ? std::max(kMinRows, kAllBytes / (cols_ * kElement))
                     : kPartBytes / (kernels_.gemm_columns * kElement);
  }
  int64_t columns_at_once() const { return unpacked_ && parts_.count() > 1 ? cols_ : kernels_.gemm_columns; }

  int64_t panels_in_group() const { return ceil_div(cols_, kernels_.gemm_columns); }
  int64_t panels() const { return groups_ * panels_in_group(); }
  int64_t taps() const { return static_cast<int64_t>(windows_.taps.size()); }
  int64_t whole_vectors(int64_t cols) const { return ceil_div(cols, kernels_.lanes) * kernels_.lanes; }
  int64_t group_elements() const { return taps() * depth_ * whole_vectors(cols_); }

  Panel panel_of(int64_t index) const {
    Panel p;
    p.group = index / panels_in_group();
    const ColumnPanel columns = column_panel(kernels_, cols_, index % panels_in_group());
    p.column = columns.column, p.cols = columns.cols, p.width = columns.width;
    p.element = unpacked_ ? p.column : p.group * group_elements() + taps() * depth_ * p.column;
    p.ld = unpacked_ ? cols_ : p.width;
    return p;
  }

  void pack(const FilterLayout& f, const Panel& panel, C* packed) const {
    if (panel.cols < panel.width) std::fill(packed, packed + taps() * depth_ * panel.width, C(0));
    const char* data = static_cast<const char*>(f.data);
    for (int64_t offset : f.tap_offset) {
      const int64_t element = offset + panel.group * f.group_stride + panel.column * f.column_stride;
      const char* from = data + element * storage_.element_bytes;
      if (storage_.is_compute_type && f.depth_stride == 1)
        kernels_.transpose(reinterpret_cast<const C*>(from), f.column_stride, panel.cols, depth_, packed, panel.width);
      else
        storage_.kernels.load(from, f.depth_stride, f.column_stride, depth_, panel.cols, packed, panel.width);
      packed += depth_ * panel.width;
    }
  }

  void run_task(const Span& blocks, const Span& panels, const FilterLayout& layout, const Run& run) const {
    const int64_t end = std::min(blocks.end * kBlockRows, windows_.positions());
    const auto& scratch = run.scratch.reader[run.worker];
    reader_.stage(blocks.begin * kBlockRows, end - blocks.begin * kBlockRows, scratch);
    for (int64_t first = blocks.begin * kBlockRows; first < end; first += table_rows_) {
      const Span positions{first, std::min(first + table_rows_, end)};
      reader_.point(first, positions.size(), scratch);
      run_parts(positions, panels, layout, run);
    }
    kernels_.end_streaming();
  }

  void run_parts(const Span& positions, const Span& panels, const FilterLayout& layout, const Run& run) const {
    if (unpacked_) {
      for (int64_t part = 0; part < parts_.count(); ++part)
        for (int64_t index = panels.begin; index < panels.end; ++index) run_part(positions, panels, index, part, run);
      return;
    }
    for (int64_t index = panels.begin; index < panels.end; ++index) {
      if (!run.panels) pack(layout, panel_of(index), run.scratch.panel[run.worker]);
      for (int64_t part = 0; part < parts_.count(); ++part) run_part(positions, panels, index, part, run);
    }
  }

  // Of a panel of these positions, the block `done` rows behind the first.
  C* sums(const Panel& panel, int64_t done, const Run& run) const {
    C* const tile = run.scratch.tile[run.worker];
    if (parts_.count() == 1) return tile;
    return tile + (unpacked_ ? panel.column * table_rows_ : 0) + done * panel.width;
  }

  // A part of panel `index` for all these positions. The first one sets their sums, the last makes results of them.
  void run_part(const Span& positions, const Span& panels, int64_t index, int64_t number, const Run& run) const {
    const Panel panel = panel_of(index);
    const PanelPart part = parts_[number];
    const C* filters = run.panels ? run.panels + panel.element : run.scratch.panel[run.worker];
    filters += part.rows.begin * panel.ld;
    for (int64_t done = 0; done < positions.size(); done += kBlockRows) {
      const int64_t first = positions.begin + done, rows = std::min(kBlockRows, positions.size() - done);
      const int64_t channel = panel.group * cols_ + panel.column, block = first / kBlockRows;
      const Tile<C> tile{sums(panel, done, run), panel.width, first, rows, channel, panel.cols, block, run.worker};
      const bool last = number + 1 == parts_.count();
      GemmOutput<C> to = last ? run.epilogue.output(tile) : GemmOutput<C>{tile.data};
      to.add = number > 0;
      GatheredRows<C> in{run.scratch.reader[run.worker].rows + part.taps.begin * table_rows_ + done,
                         table_rows_,
                         rows,
                         part.taps.size(),
                         part.depth.size(),
                         panel.group * depth_ + part.depth.begin};
      if (index == panels.begin || panel.column == 0)
        in.conversion = reader_.conversion(run.scratch.reader[run.worker], done);
      look_ahead(positions, done / kBlockRows, panels, index, number, run, &in);
      gemm_(in, {filters, panel.width, panel.ld}, to);
      if (last) run.epilogue.end(to, tile);
    }
  }

  // What comes next, while one of the blocks of these positions is multiplied by a part of a panel.
  void look_ahead(const Span& positions, int64_t block, const Span& panels, int64_t index, int64_t number,
                  const Run& run, GatheredRows<C>* in) const {
    const int64_t blocks = ceil_div(positions.size(), kBlockRows);
    if (in_cache_) {
      if (unpacked_)
        in->ahead[0] = share_of(next_rows(panels, number, run.panels), index * blocks + block, panels.size() * blocks);
      else if (run.panels)
        in->ahead[0] = share_of(next_filters(panels, index, number, run.panels), block, blocks);
      return;
    }
    if (exceeds_cache(run.epilogue.reads.row_bytes / static_cast<int64_t>(sizeof(C))))
      in->ahead[0] = next_filters(panels, index, number, run.panels);
    const int64_t share = (index - panels.begin) * parts_.count() + number, shares = panels.size() * parts_.count();
    fetch_pixels(positions.end, share, shares, run, in);
  }

  static Stretch<C> share_of(const Stretch<C>& all, int64_t number, int64_t shares) {
    const Span elements = part(number, shares, all.end - all.begin);
    return {all.begin + elements.begin, all.begin + elements.end};
  }

  // Memory of any type, in elements of this one.
  static Stretch<C> memory(const void* data, const Span& units, int64_t bytes) {
    const char* const from = static_cast<const char*>(data);
    return {reinterpret_cast<const C*>(from + units.begin * bytes),
            reinterpret_cast<const C*>(from + units.end * bytes)};
  }

  // A share of what the block at position `first` reads, and writes if a place is left.
  void fetch_pixels(int64_t first, int64_t number, int64_t shares, const Run& run, GatheredRows<C>* in) const {
    const int64_t count = std::min(kBlockRows, windows_.positions() - first);
    if (count <= 0) return;
    const auto rows = [&](const RowsAhead& image) {
      return share_of(memory(image.data, {first, first + count}, image.row_bytes), number, shares);
    };
    if (fetches_blocks_) {
      const Span elements = reader_.new_elements(first, count);
      in->ahead[1] = share_of(memory(source_.memory(), elements, source_.element_bytes()), number, shares);
    }
    const RowsAhead &reads = run.epilogue.reads, &writes = run.epilogue.writes;
    if (reads.data) in->ahead[2] = rows(reads);
    Stretch<C>& left = in->ahead[reads.data ? 0 : 2];
    if (writes.data && first < run.written_until && !left.begin) left = rows(writes);
  }

  // The part of all panels behind this one; a task of fewer panels would ask for what others read.
  Stretch<C> next_rows(const Span& panels, int64_t number, const C* filters) const {
    if (panels.size() < this->panels() || number + 1 == parts_.count()) return {};
    const Span rows = parts_[number + 1].rows;
    return {filters + rows.begin * cols_, filters + rows.end * cols_};
  }

  // The part behind this one. Behind the last are the first again, for the next block; or where a task serves all
  // blocks, those that the thread's next task is likely to begin with.
  Stretch<C> next_filters(const Span& panels, int64_t index, int64_t number, const C* packed) const {
    if (++number == parts_.count()) number = 0, ++index;
    if (index == panels.end && !in_cache_) index = panels.begin;
    if (index == this->panels()) return {};
    const Panel panel = panel_of(index);
    const PanelPart part = parts_[number];
    const C* const data = packed + panel.element;
    return {data + part.rows.begin * panel.width, data + part.rows.end * panel.width};
  }

  const ComputeKernels<C>& kernels_;
  Gemm gemm_;
  Storage<C> storage_;
  Windows windows_;
  int64_t groups_, depth_, cols_;
  int64_t blocks_in_task_;  // enough lines that staging those above and below costs little
  Image<C> source_;
  bool in_cache_;        // see fits_cache()
  bool fetches_blocks_;  // a block's pixels while the one before is multiplied: they are adjacent
  int64_t table_rows_;   // positions whose pointers are at hand at once
  WindowReader<C> reader_;
  bool unpacked_;  // filters are read where they lie: new ones, and few positions that packing would serve
  PanelParts parts_;
};

}  // namespace fusedconvbn
