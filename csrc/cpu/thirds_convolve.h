// The direct convolution of float32 on AMX (thirds.inl), with the interface of Convolution (convolve.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convolve.h"
#include "tasks.h"
#include "thirds.h"
#include "thirds_choice.h"

namespace fusedconvbn {

constexpr int64_t kThirdsChunk = 32;    // of the depth
constexpr int64_t kThirdsColumns = 32;  // of a panel, the right operand
constexpr int64_t kThirdsRows = 32;     // of a product

// Elements of operands.
inline int64_t left_elements(int64_t rows, int64_t chunks) { return kThirdPlanes * rows * kThirdsChunk * chunks; }
inline int64_t right_elements(int64_t chunks) { return kThirdPlanes * kThirdsColumns * kThirdsChunk * chunks; }

// So fast that it takes so many chunks of the depth.
inline AmxFetch fetch_in(int64_t steps, const void* begin, const void* end) {
  constexpr int64_t kLine = 64, kProducts = 6;  // bytes; of a chunk, with some lines each
  const auto *from = static_cast<const char*>(begin), *to = static_cast<const char*>(end);
  return {from, to, kLine, steps > 0 ? ceil_div(to - from, kLine * kProducts * steps) : 0};
}

// An operand to be cut in so many steps.
inline ThirdsLeftCut left_cut(const GatheredRows<float>& in, int64_t rows, uint16_t* to, int64_t steps) {
  const int64_t pieces = in.count * in.taps * ceil_div(in.depth, kThirdsChunk);
  return {in, rows, to, ceil_div(pieces, steps), 0, 0, 0, false};
}

template <class C>
class ThirdsConvolution {
 public:
  ThirdsConvolution(const ComputeKernels<C>& kernels, const Storage<C>&, const Image<C>& source, const Windows& windows,
                    const Channels& channels)
      : kernels_(kernels),
        windows_(windows),
        depth_(channels.depth),
        cols_(channels.cols),
        source_(source),
        rows_(thirds_block_rows(windows.positions(), chunks() * kThirdsChunk, packed_bytes())),
        reader_(source, channels.depth, windows, false, rows_, rows_) {}

  struct Worker {
    typename WindowReader<C>::Scratch reader[2];  // of even and odd blocks: one is cut while the other is multiplied
    uint16_t* left[2];
    C* tiles;    // two of [rows_][kSpan]: one is emitted while the other is computed
    C* filters;  // [depth][kThirdsColumns], transposed
  };
  struct Scratch {
    C* filters;
    C* zeros;
    std::vector<Worker> workers;
  };

  int64_t blocks() const { return ceil_div(windows_.positions(), rows_); }
  int64_t block_pixels(int64_t block) const { return std::min(rows_, windows_.positions() - block * rows_); }

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<C>(packed_elements()), arena->take<C>(reader_.zero_elements()), {}};
    for (int w = 0; w < workers; ++w) {
      Worker worker{};
      for (auto& reader : worker.reader) reader = reader_.carve(arena, s.zeros);
      for (auto& left : worker.left) left = arena->take<uint16_t>(left_elements(rows_, chunks()));
      worker.tiles = arena->take<C>(2 * rows_ * kSpan);
      worker.filters = arena->take<C>(depth_ * kThirdsColumns);
      s.workers.push_back(worker);
    }
    return s;
  }

  // In units of C.
  int64_t packed_elements() const { return packed_bytes() / static_cast<int64_t>(sizeof(C)); }

  void pack(const FilterLayout& filters, const Scratch& s, C* packed, ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t panel, int worker) {
      uint16_t* to = reinterpret_cast<uint16_t*>(packed) + panel * panel_elements();
      const bool careful = pack(filters, panel, false, s.workers[worker].filters, to);
      if (careful) pack(filters, panel, true, s.workers[worker].filters, to);
      *flag_of(to) = careful;
    });
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    if (windows_.positions() == 0) return;
    std::fill(s.zeros, s.zeros + reader_.zero_elements(), C(0));
    if (!filters.packed) pack(filters, s, s.filters, parallel);
    const auto* packed = static_cast<const uint16_t*>(filters.packed ? filters.packed : s.filters);
    // Few blocks: tasks of fewer panels, so that every thread has several.
    const int64_t wanted = wanted_tasks(*parallel, kFewTasks);
    const int64_t task_blocks = std::clamp<int64_t>(blocks() / wanted, 1, kTaskBlocks);
    const int64_t block_tasks = ceil_div(blocks(), task_blocks),
                  shares = std::min(spans(), ceil_div(wanted, block_tasks));
    parallel->run(block_tasks * shares, [&](int64_t task, int worker) {
      const int64_t first = task / shares * task_blocks;
      run_task({first, std::min(first + task_blocks, blocks())}, part(task % shares, shares, spans()), packed,
               s.workers[worker], worker, epilogue);
    });
  }

 private:
  static constexpr int64_t kTaskBlocks = 16;            // all but the first are cut during products
  static constexpr int64_t kSpan = 2 * kThirdsColumns;  // columns of a tile: results are best stored by several lines

  int64_t taps() const { return static_cast<int64_t>(windows_.taps.size()); }
  int64_t chunks() const { return taps() * ceil_div(depth_, kThirdsChunk); }
  int64_t panels() const { return ceil_div(cols_, kThirdsColumns); }
  int64_t panels_in(const Span& spans) const { return std::min(2 * spans.end, panels()) - 2 * spans.begin; }
  int64_t spans() const { return ceil_div(cols_, kSpan); }
  // Behind a panel, in a line of its own, is whether it has the fourth plane.
  int64_t panel_elements() const { return right_elements(chunks()) + kThirdsColumns; }
  int64_t packed_bytes() const { return panels() * panel_elements() * static_cast<int64_t>(sizeof(uint16_t)); }
  uint16_t* flag_of(uint16_t* panel) const { return panel + right_elements(chunks()); }

  // Whether it has.
  bool pack(const FilterLayout& f, int64_t panel, bool careful, C* transposed, uint16_t* to) const {
    const int64_t column = panel * kThirdsColumns, cols = std::min(kThirdsColumns, cols_ - column);
    bool any = false;
    for (int64_t offset : f.tap_offset) {
      const C* from = static_cast<const C*>(f.data) + offset + column * f.column_stride;
      const bool rows = f.column_stride == 1;
      if (!rows) kernels_.transpose(from, f.column_stride, cols, depth_, transposed, kThirdsColumns);
      any |= kernels_.thirds->right(rows ? from : transposed, rows ? f.depth_stride : kThirdsColumns, depth_, cols,
                                    careful, to);
      to += right_elements(ceil_div(depth_, kThirdsChunk));
    }
    return any;
  }

  void run_task(const Span& blocks, const Span& spans, const uint16_t* packed, const Worker& w, int worker,
                const TileEpilogue<C>& epilogue) const {
    ThirdsAside aside{};
    int64_t tiles = 0;
    kernels_.amx.begin(kThirdsChunk);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      if (block == blocks.begin) start_cut(block, w, 1, &aside.left);
      kernels_.thirds->cut_left(&aside.left);
      const ThirdsLeftCut cut = aside.left;
      if (cut.careful) kernels_.thirds->left(cut.in, cut.rows, cut.to);
      const int64_t steps = ceil_div(cut.in.count, kThirdsRows) * chunks();  // of a panel
      aside.slice = ceil_div(cut.in.count, steps);
      if (block + 1 < blocks.end) start_cut(block + 1, w, steps * panels_in(spans), &aside.left);
      if (!fetches_filters()) aside.fetch = look_ahead(block + 2, steps * panels_in(spans));
      for (int64_t span = spans.begin; span < spans.end; ++span, ++tiles)
        run_tile(block, span, w.tiles + tiles % 2 * rows_ * kSpan,
                 {cut.to, rows_, nullptr, chunks(), cut.careful, false}, packed, worker, epilogue, &aside);
    }
    kernels_.thirds->emit(&aside);
    kernels_.amx.end();
    kernels_.end_streaming();
  }

  // Of few blocks those that are not in L2, a panel ahead, rather than what is left of the inputs.
  bool fetches_filters() const {
    constexpr int64_t kFewBlocks = 4, kMinBytes = 1 << 20;
    return blocks() <= kFewBlocks && packed_bytes() >= kMinBytes;
  }

  // What this block reads and those before do not.
  AmxFetch look_ahead(int64_t block, int64_t steps) const {
    if (block >= blocks() || !reader_.gapless()) return {};
    const C* data = source_.read(0, 1, 0, 1, nullptr).data;
    const Span next = reader_.new_elements(block * rows_, block_pixels(block));
    return fetch_in(steps, data + next.begin, data + next.end);
  }

  // In so many steps.
  void start_cut(int64_t block, const Worker& w, int64_t steps, ThirdsLeftCut* cut) const {
    const auto& reader = w.reader[block % 2];
    const int64_t count = block_pixels(block);
    reader_.point(block * rows_, count, reader);
    *cut = left_cut({reader.rows, rows_, count, taps(), depth_, 0}, rows_, w.left[block % 2], steps);
  }

  void run_tile(int64_t block, int64_t span, C* data, const ThirdsProduct& product, const uint16_t* packed, int worker,
                const TileEpilogue<C>& epilogue, ThirdsAside* aside) const {
    const int64_t count = block_pixels(block), channel = span * kSpan, cols = std::min(kSpan, cols_ - channel);
    const Tile<C> tile{data, kSpan, block * rows_, count, channel, cols, block, worker};
    const GemmOutput<C> to = epilogue.output(tile);
    aside->next = to.block, aside->next_rows = to.emit ? count : 0;
    for (int64_t column = 0; column < cols; column += kThirdsColumns) {
      const uint16_t* panel = packed + (channel + column) / kThirdsColumns * panel_elements();
      if (fetches_filters() && channel + column + kThirdsColumns < cols_)
        aside->fetch =
            fetch_in(ceil_div(count, kThirdsRows) * chunks(), panel + panel_elements(), panel + 2 * panel_elements());
      multiply(product, count, panel, data + column, aside);
    }
    kernels_.thirds->emit(aside);
    if (to.emit) {
      aside->emit = to.emit, aside->block = to.block, aside->rows = count;
      aside->block.z = data, aside->block.ld_z = kSpan;
    }
    epilogue.end(to, tile);
  }

  void multiply(ThirdsProduct product, int64_t count, const uint16_t* panel, C* tile, ThirdsAside* aside) const {
    product.right = panel, product.careful_right = panel[right_elements(chunks())] != 0;
    for (int64_t r = 0; r < count; r += kThirdsRows, product.left += kThirdsRows * kThirdsChunk)
      kernels_.thirds->multiply(product, false, tile + r * kSpan, kSpan, aside);
  }

  const ComputeKernels<C>& kernels_;
  Windows windows_;
  int64_t depth_, cols_;
  Image<C> source_;
  int64_t rows_;  // of a block
  WindowReader<C> reader_;
};

}  // namespace fusedconvbn
