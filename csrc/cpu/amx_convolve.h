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
    const auto packed = filters.packed ? static_cast<const uint16_t*>(filters.packed) : filters_in(s);
    const int64_t groups = ceil_div(strips, group_);
    const int64_t shares = std::min(panels(), ceil_div(4 * (parallel->threads() - 1) + 1, groups));
    parallel->run(groups * shares, [&](int64_t task, int worker) {
      const int64_t group = task / shares, share = task % shares;
      Rows rows[kMaxGroup];
      const int64_t count = read_group(group, rows, s.staged[worker]);
      const Job job{rows,
                    count,
                    share * panels() / shares,
                    (share + 1) * panels() / shares,
                    packed,
                    shares == 1 ? memory_of(group + parallel->threads()) : Memory{},
                    worker};
      run_job(job, s, epilogue);
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
    run_job({&strip, 1, 0, panels(), filters_in(s), {}, worker}, s, epilogue);
  }
  int64_t row_elements() const { return reader_.row_elements(); }

 private:
  using Memory = AmxRowReader::Memory;
  struct Rows {
    AmxRowReader::Strip strip;
    const uint16_t* data;
    int64_t first_chunk;
  };
  // What a thread does at once: `count` strips by some panels.
  struct Job {
    const Rows* rows;
    int64_t count, panel_begin, panel_end;
    const uint16_t* filters;
    Memory next;  // to be read by the thread's next job
    int worker;
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

  static const uint16_t* filters_in(const Scratch& s) { return reinterpret_cast<const uint16_t*>(s.filters); }

  int64_t read_group(int64_t group, Rows* rows, uint16_t* staged) const {
    const int64_t begin = group * group_, count = std::min(group_, reader_.strips() - begin);
    for (int64_t i = 0; i < count; ++i, staged += reader_.staged_elements()) {
      const auto strip = reader_.strip(begin + i);
      rows[i] = {strip, reader_.read(strip, staged), reader_.first_chunk(begin + i)};
    }
    return count;
  }

  Memory memory_of(int64_t group) const {
    if (group * group_ >= reader_.strips()) return {};
    const int64_t last = std::min((group + 1) * group_, reader_.strips()) - 1;
    return {reader_.memory_of(reader_.strip(group * group_)).begin, reader_.memory_of(reader_.strip(last)).end};
  }

  // Either a chunk's rows stay in cache for all panels, and the next rows are fetched meanwhile, or a panel's filters
  // for all chunks, and the next panel's.
  void run_job(const Job& job, const Scratch& s, const TileEpilogue<C>& epilogue) const {
    kernels_.amx.begin(reader_.depth().chunk);
    const int64_t panels = job.panel_end - job.panel_begin;
    if (2 * panels * panel_elements() <= kFilterBytes) {
      AmxFetch fetch = fetch_during(job, panels, job.next);
      for_chunks(job, [&](const Rows& rows, int64_t chunk) {
        for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel)
          run_tile(rows, chunk, panel, job, &fetch, s, epilogue);
      });
    } else {
      for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
        const uint16_t *next = job.filters + (panel + 1) * panel_elements(), *end = next + panel_elements();
        AmxFetch fetch = fetch_during(job, 1, panel + 1 < job.panel_end ? Memory{next, end} : job.next);
        for_chunks(job,
                   [&](const Rows& rows, int64_t chunk) { run_tile(rows, chunk, panel, job, &fetch, s, epilogue); });
      }
    }
    kernels_.amx.end();
  }

  template <class F>
  static void for_chunks(const Job& job, F f) {
    for (int64_t i = 0; i < job.count; ++i)
      for (int64_t chunk = 0; chunk < job.rows[i].strip.chunks(); ++chunk) f(job.rows[i], chunk);
  }

  // So fast that the products of a job's rows with some panels take as long.
  AmxFetch fetch_during(const Job& job, int64_t panels, const Memory& memory) const {
    constexpr int64_t kLine = 64, kTileRows = 32;  // bytes; rows of a step
    int64_t steps = 0;
    for (int64_t i = 0; i < job.count; ++i) steps += ceil_div(job.rows[i].strip.rows(), kTileRows);
    steps *= panels * reader_.taps() * reader_.depth().chunks;
    const auto *begin = reinterpret_cast<const char*>(memory.begin), *end = reinterpret_cast<const char*>(memory.end);
    return {begin, end, steps == 0 ? 0 : ceil_div(end - begin, kLine * steps)};
  }

  void run_tile(const Rows& rows, int64_t chunk, int64_t panel, const Job& job, AmxFetch* fetch, const Scratch& s,
                const TileEpilogue<C>& epilogue) const {
    const AmxRowReader::Strip& strip = rows.strip;
    const int64_t row = chunk * kChunk, end = std::min(row + kChunk, strip.rows()), stride = reader_.row_elements();
    C* data = s.tile[job.worker];
    kernels_.amx.multiply({rows.data + row * stride, stride, reader_.tap_offset().data(), reader_.taps(),
                           reader_.depth().chunks, reader_.depth().chunk, end - row},
                          job.filters + panel * panel_elements(), data, fetch);
    const int64_t column = panel * kernels_.panel, ld = kernels_.panel;
    const int64_t first = strip.first + strip.positions_before(row), line = row / strip.pitch;
    Tile<C> tile{data, ld, first, 0, column, std::min(ld, cols_ - column), rows.first_chunk + chunk, job.worker};
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
