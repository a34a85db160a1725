// The direct convolution of bfloat16 on AMX, with the interface of Convolution (convolve.h).
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "amx_rows.h"
#include "convolve.h"

namespace fusedconvbn {

template <class C>
class AmxConvolution {
 public:
  AmxConvolution(const ComputeKernels<C>& kernels, const Storage<C>&, const Image<C>& source, const Windows& windows,
                 const Channels& channels)
      : kernels_(kernels),
        depth_(channels.depth),
        cols_(channels.cols),
        filter_taps_(static_cast<int64_t>(windows.taps.size())),
        reader_(source.memory(), source.grid(), channels.depth, windows) {
    // Filters that fit no cache are read once for a group of strips.
    if (2 * panels() * panel_elements() > kFilterBytes)
      group_ = std::clamp<int64_t>(kGroupBytes / (2 * reader_.max_read_rows() * reader_.row_elements()), 1, kMaxGroup);
  }

  struct Scratch {
    C* filters;                                 // [panels][panel_elements] of bfloat16
    std::vector<const uint16_t**> filter_rows;  // a worker's, of a tap
    std::vector<uint16_t*> staged;
    std::vector<C*> tile;  // a worker's [kChunk][panel]
  };

  int64_t blocks() const { return reader_.chunks(); }
  int64_t block_pixels(int64_t block) const {
    const auto chunk = reader_.chunk(block);
    const auto strip = reader_.strip(chunk.strip);
    return strip.positions_before(std::min(strip.rows(), chunk.row + kChunk)) - strip.positions_before(chunk.row);
  }

  Scratch carve(Arena* arena, int workers) const {
    Scratch s;
    s.filters = arena->take<C>(ceil_div(2 * panels() * panel_elements(), kUnit));
    for (int w = 0; w < workers; ++w) {
      s.filter_rows.push_back(arena->take<const uint16_t*>(reader_.depth().elements()));
      s.staged.push_back(arena->take<uint16_t>(group_ * reader_.staged_elements()));
      s.tile.push_back(arena->take<C>(kChunk * kernels_.panel));
    }
    return s;
  }

  // In units of C. What is kept must not depend on more than the filters' shape: whether taps merge does.
  int64_t packed_elements() const {
    if (reader_.merges_by_dilation()) return 0;
    return ceil_div(2 * panels() * panel_elements(), kUnit);
  }

  void run(const FilterLayout& filters, const Scratch& s, ParallelFor* parallel,
           const TileEpilogue<C>& epilogue) const {
    const int64_t strips = reader_.strips();
    if (strips == 0) return;
    if (!filters.packed) pack(filters, s, s.filters, parallel);
    const C* packed = filters.packed ? static_cast<const C*>(filters.packed) : s.filters;
    const int64_t groups = ceil_div(strips, group_);
    const int64_t shares = std::min(panels(), ceil_div(4 * (parallel->threads() - 1) + 1, groups));
    parallel->run(groups * shares, [&](int64_t task, int worker) {
      const int64_t begin = task / shares * group_, share = task % shares;
      Rows rows[kMaxGroup];
      const int64_t count = std::min(group_, strips - begin);
      for (int64_t i = 0; i < count; ++i) {
        rows[i].strip = reader_.strip(begin + i);
        rows[i].data = reader_.read(rows[i].strip, s.staged[worker] + i * reader_.staged_elements());
        rows[i].first_chunk = reader_.first_chunk(begin + i);
      }
      run_rows(rows, count, share * panels() / shares, (share + 1) * panels() / shares, packed, s, worker, epilogue);
    });
  }

  // The two halves of run() for a caller that has the rows: `count` positions from `first` on, in order, in rows of
  // row_elements(). There is memory behind them for row_slack() more.
  void pack(const FilterLayout& filters, const Scratch& s, C* packed, ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t panel, int worker) {
      pack(filters, panel, s.filter_rows[worker], reinterpret_cast<uint16_t*>(packed) + panel * panel_elements());
    });
  }
  void run_rows(const uint16_t* rows, int64_t first, int64_t count, const Scratch& s, int worker,
                const TileEpilogue<C>& epilogue) const {
    const Rows strip{{first, 0, 0, count, 1, 1}, rows, 0};
    run_rows(&strip, 1, 0, panels(), s.filters, s, worker, epilogue);
  }
  int64_t row_elements() const { return reader_.row_elements(); }

 private:
  struct Rows {
    AmxRowReader::Strip strip;
    const uint16_t* data;
    int64_t first_chunk;
  };

  static constexpr int64_t kChunk = AmxRowReader::kChunk, kUnit = sizeof(C);

  int64_t panels() const { return ceil_div(cols_, kernels_.panel); }
  int64_t tap_elements() const { return reader_.depth().elements() * kernels_.panel; }
  int64_t panel_elements() const { return reader_.taps() * tap_elements(); }

  // A merged tap has a row for each element of its pixels.
  void pack(const FilterLayout& f, int64_t panel, const uint16_t** rows, uint16_t* packed) const {
    const int64_t column = panel * kernels_.panel, cols = std::min(kernels_.panel, cols_ - column);
    const int64_t merged = reader_.taps() ? filter_taps_ / reader_.taps() : 0;
    const uint16_t* data = static_cast<const uint16_t*>(f.data) + column * f.column_stride;
    for (int64_t t = 0; t < reader_.taps(); ++t, packed += tap_elements()) {
      std::fill(rows, rows + reader_.depth().elements(), nullptr);
      for (int64_t m = 0; m < merged; ++m)
        for (int64_t k = 0; k < depth_; ++k)
          rows[m * reader_.pixel() + k] = data + f.tap_offset[t * merged + m] + k * f.depth_stride;
      kernels_.amx.pack(rows, f.column_stride, cols, reader_.depth().chunks, reader_.depth().chunk, packed);
    }
  }

  // Either a chunk's rows stay in cache for all panels, or a panel's filters for all chunks.
  void run_rows(const Rows* rows, int64_t count, int64_t panel_begin, int64_t panel_end, const C* packed,
                const Scratch& s, int worker, const TileEpilogue<C>& epilogue) const {
    kernels_.amx.begin(reader_.depth().chunk);
    if (2 * (panel_end - panel_begin) * panel_elements() <= kFilterBytes) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t chunk = 0; chunk < rows[i].strip.chunks(); ++chunk)
          for (int64_t panel = panel_begin; panel < panel_end; ++panel)
            run_tile(rows[i], chunk, panel, packed, s, worker, epilogue);
    } else {
      for (int64_t panel = panel_begin; panel < panel_end; ++panel)
        for (int64_t i = 0; i < count; ++i)
          for (int64_t chunk = 0; chunk < rows[i].strip.chunks(); ++chunk)
            run_tile(rows[i], chunk, panel, packed, s, worker, epilogue);
    }
    kernels_.amx.end();
  }

  void run_tile(const Rows& rows, int64_t chunk, int64_t panel, const C* packed, const Scratch& s, int worker,
                const TileEpilogue<C>& epilogue) const {
    const AmxRowReader::Strip& strip = rows.strip;
    const int64_t row = chunk * kChunk, end = std::min(row + kChunk, strip.rows()), stride = reader_.row_elements();
    C* data = s.tile[worker];
    kernels_.amx.multiply({rows.data + row * stride, stride, reader_.tap_offset().data(), reader_.taps(),
                           reader_.depth().chunks, reader_.depth().chunk, end - row},
                          reinterpret_cast<const uint16_t*>(packed) + panel * panel_elements(), data);
    const int64_t column = panel * kernels_.panel, ld = kernels_.panel;
    const int64_t first = strip.first + strip.positions_before(row), line = row / strip.pitch;
    Tile<C> tile{data, ld, first, 0, column, std::min(ld, cols_ - column), rows.first_chunk + chunk, worker};
    // The positions of each line close up: a flat strip is one run.
    const int64_t runs = strip.pitch == strip.width ? 1 : ceil_div(end, strip.pitch) - line;
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t from = i == 0 ? row : (line + i) * strip.pitch;
      const int64_t to = strip.pitch == strip.width ? end : std::min(end, (line + i) * strip.pitch + strip.width);
      if (to <= from) continue;
      if (data + (from - row) * ld != tile.data + tile.rows * ld)
        std::memmove(tile.data + tile.rows * ld, data + (from - row) * ld, (to - from) * ld * sizeof(C));
      tile.rows += to - from;
    }
    epilogue.emit(tile);
    if (epilogue.finish) epilogue.finish(tile);
  }

  static constexpr int64_t kFilterBytes = 1 << 20, kGroupBytes = 1 << 20;  // halves of L2
  static constexpr int64_t kMaxGroup = 16;

  const ComputeKernels<C>& kernels_;
  int64_t depth_, cols_, filter_taps_;
  AmxRowReader reader_;
  int64_t group_ = 1;  // strips of a task
};

}  // namespace fusedconvbn
