// The direct convolution of bfloat16 on AMX, with the interface of Convolution (convolve.h).
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../half.h"
#include "amx_lines.h"
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
        taps_inner_(exceed_cache(filter_taps_, channels)),
        reader_(kernels.amx, source.memory(), source.grid(), channels.depth, windows, 0, taps_inner_) {
    // Outputs are best stored two cache lines at a time; but where products are deep, half as many leave L1 to filters.
    span_ = tap_chunks() <= kShallow ? kMaxSpan : 1;
    if (taps_inner_ && reader_.strips() > 0 && reader_.max_rows() > kTileRows && reader_.max_rows() <= kTallRows)
      block_rows_ = kTallRows;
    set_steps();
    // Filters that fit no cache are read once for a group of strips.
    if (2 * panels() * panel_elements() > kFilterBytes)
      group_ = std::clamp<int64_t>(kGroupBytes / (2 * reader_.max_read_rows() * reader_.row_elements()), 1, kMaxGroup);
  }

  struct Scratch {
    C* filters;                                 // [panels][panel_elements] of bfloat16
    std::vector<const uint16_t**> filter_rows;  // a worker's, of a tap
    std::vector<uint16_t*> staged;
    std::vector<C*> tile;  // a worker's [kChunk][columns()]
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
      s.tile.push_back(arena->take<C>(std::max(kChunk, 2 * block_rows_) * columns()));
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
    const int64_t shares = std::min(spans(), ceil_div(4 * (parallel->threads() - 1) + 1, groups));
    parallel->run(groups * shares, [&](int64_t task, int worker) {
      const int64_t group = task / shares, share = task % shares;
      Rows rows[kMaxGroup];
      const int64_t count = read_group(group, rows, s.staged[worker]);
      const Memory next = shares == 1 ? memory_of(group + parallel->threads()) : Memory{};
      const Job job{rows, count, share * spans() / shares, (share + 1) * spans() / shares, packed, next, worker};
      run_job(job, s, epilogue);
    });
  }

  // The two halves of run() for a caller that has the rows: `count` positions from `first` on, in order, in rows of
  // row_elements(), 32 more rows of memory behind them. `next` is fetched meanwhile.
  void pack(const FilterLayout& filters, const Scratch& s, C* packed, ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t panel, int worker) {
      pack(filters, panel, s.filter_rows[worker], reinterpret_cast<uint16_t*>(packed) + panel * panel_elements());
    });
  }
  void run_rows(const uint16_t* rows, int64_t first, int64_t count, const AmxRowReader::Memory& next, const Scratch& s,
                int worker, const TileEpilogue<C>& epilogue) const {
    const Rows strip{{first, 0, 0, count, 1, 1}, rows, 0};
    run_job({&strip, 1, 0, spans(), filters_in(s), next, worker}, s, epilogue);
  }
  int64_t row_elements() const { return reader_.row_elements(); }

 private:
  using Memory = AmxRowReader::Memory;
  struct Rows {
    AmxRowReader::Strip strip;
    const uint16_t* data;
    int64_t first_chunk;
  };
  // What a thread does at once: `count` strips by some spans.
  struct Job {
    const Rows* rows;
    int64_t count, begin, end;
    const uint16_t* filters;
    Memory next;  // to be read by the thread's next job
    int worker;
  };

  static constexpr int64_t kChunk = AmxRowReader::kChunk, kUnit = sizeof(C);
  static constexpr int64_t kPanel = 32, kMaxSpan = 2;
  static constexpr int64_t kTileRows = 32, kTallRows = 64;  // of a step
  static constexpr int64_t kLine = 64;                      // bytes of a cache line

  // Filters that L2 cannot hold pass in an order in which few rows serve many steps. How they are packed must not
  // depend on more than their shape.
  static bool exceed_cache(int64_t taps, const Channels& channels) {
    constexpr int64_t kMostBytes = 3 << 20;
    return taps > 1 && channels.depth > kPanel && 2 * taps * channels.depth * channels.cols > kMostBytes;
  }

  int64_t panels() const { return ceil_div(cols_, kPanel); }
  int64_t spans() const { return ceil_div(panels(), span_); }
  int64_t columns() const { return span_ * kPanel; }  // of a tile
  int64_t tap_elements() const { return reader_.depth().elements() * kPanel; }
  int64_t panel_elements() const { return reader_.taps() * tap_elements(); }
  // Packed filters: elements of a step by half a panel, and how far apart these lie.
  int64_t piece() const { return reader_.depth().chunk * kPanel / 2; }
  int64_t filter_step() const { return taps_inner_ ? piece() : 2 * piece(); }
  int64_t filter_half() const { return taps_inner_ ? panel_elements() / 2 : piece(); }

  void set_steps() {
    const int64_t chunks = reader_.depth().chunks;
    const int64_t taps = static_cast<int64_t>(reader_.tap_offset().size());  // none where there are no positions
    for (int64_t i = 0; i < taps * chunks; ++i) {
      const int64_t tap = taps_inner_ ? i % taps : i / chunks, chunk = taps_inner_ ? i / taps : i % chunks;
      step_offset_.push_back(reader_.tap_offset()[tap] + chunk * reader_.depth().chunk);
    }
  }

  // A merged tap has a row for each element of its pixels.
  void pack(const FilterLayout& f, int64_t panel, const uint16_t** rows, uint16_t* packed) const {
    const int64_t column = panel * kPanel, cols = std::min(kPanel, cols_ - column);
    const int64_t merged = reader_.taps() ? filter_taps_ / reader_.taps() : 0;
    const uint16_t* data = static_cast<const uint16_t*>(f.data) + column * f.column_stride;
    const int64_t chunk_distance = taps_inner_ ? reader_.taps() * piece() : 2 * piece();
    for (int64_t t = 0; t < reader_.taps(); ++t, packed += taps_inner_ ? piece() : tap_elements()) {
      std::fill(rows, rows + reader_.depth().elements(), nullptr);
      for (int64_t m = 0; m < merged; ++m)
        for (int64_t k = 0; k < depth_; ++k)
          rows[m * reader_.pixel() + k] = data + f.tap_offset[t * merged + m] + k * f.depth_stride;
      kernels_.amx.pack(rows, f.column_stride, cols, reader_.depth().chunks, reader_.depth().chunk, packed,
                        chunk_distance, filter_half());
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

  // Either a chunk's rows stay in cache for all spans, and the next rows are fetched meanwhile, or a span's filters
  // for all chunks, and the next span's.
  void run_job(const Job& job, const Scratch& s, const TileEpilogue<C>& epilogue) const {
    AmxAside aside{};
    Lines lines = lines_of(job, s.tile[job.worker], epilogue);
    const auto run = [&](const Rows& rows, int64_t row, int64_t begin, int64_t end) {
      if (lines.multiply) return run_lines(rows, row, begin, end, job, &lines, &aside);
      for (int64_t span = begin; span < end; ++span)
        run_tile(rows, row / kChunk, span, job, s.tile[job.worker], &aside, epilogue);
    };
    const int64_t height = lines.multiply ? block_rows_ : kChunk;
    kernels_.amx.begin(reader_.depth().chunk);
    if (filter_bytes(job.end - job.begin) <= kFilterBytes) {
      aside.fetch = fetch_during(job, job.end - job.begin, job.next, kLine);
      for_chunks(job, height, [&](const Rows& rows, int64_t row) { run(rows, row, job.begin, job.end); });
    } else {
      // By lines, rows of a single tap come into L1 once for several spans.
      const bool passes = lines.multiply && reader_.taps() == 1;
      const int64_t count = passes ? std::max<int64_t>(1, kPassBytes / filter_bytes(1)) : 1;
      for (int64_t begin = job.begin, end; begin < job.end; begin = end) {
        end = std::min(begin + count, job.end);
        aside.fetch = end == job.end
                          ? fetch_during(job, end - begin, job.next, kLine)
                          : fetch_during(job, end - begin, filters_of(job, end, std::min(end + count, job.end)),
                                         (passes ? 4 : 2) * kLine);
        for_chunks(job, height, [&](const Rows& rows, int64_t row) { run(rows, row, begin, end); });
      }
    }
    finish(&lines, &aside);
    kernels_.amx.end();
    if (epilogue.in_place) kernels_.end_streaming();
  }

  // Blocks of 32 or 64 rows, each emitted line by line during the next.
  struct Lines {
    void (*multiply)(AmxLineBlocks*, AmxAside*);  // null: by tiles
    GemmOutput<C> to;                             // of the first position and channel
    AmxLineBlocks blocks;
  };

  Lines lines_of(const Job& job, C* tile, const TileEpilogue<C>& epilogue) const {
    Lines lines{};
    if (!epilogue.in_place || epilogue.finish || cols_ % kPanel != 0) return lines;
    lines.to = epilogue.in_place({tile, columns(), 0, 0, 0, std::min(columns(), cols_), 0, job.worker});
    if (lines.to.activation < 0) return lines;
    lines.multiply = kernels_.amx.multiply_lines[lines.to.activation];
    lines.blocks.emission.block = lines.to.block;
    lines.blocks.distance = panel_elements(), lines.blocks.width = span_;
    lines.blocks.tile[0] = tile, lines.blocks.tile[1] = tile + block_rows_ * columns();
    return lines;
  }

  void run_lines(const Rows& rows, int64_t row, int64_t begin, int64_t end, const Job& job, Lines* lines,
                 AmxAside* aside) const {
    const int64_t first = first_row(row, std::min(row + block_rows_, rows.strip.rows()));
    AmxLineBlocks& b = lines->blocks;
    const int64_t panel = begin * span_, stride = reader_.row_elements();
    b.rows = rows_of(rows.data + first * stride, block_rows_);
    b.filters = job.filters + panel * panel_elements();
    b.panels = std::min(end * span_, panels()) - panel;
    set_emission(rows.strip, row, row - first, panel * kPanel, lines->to.block, &b.emission);
    lines->multiply(&b, aside);
  }

  AmxRows rows_of(const uint16_t* first, int64_t count) const {
    const AmxDepth& depth = reader_.depth();
    return {first,       reader_.row_elements(), step_offset_.data(), reader_.taps(), depth.chunks,
            depth.chunk, filter_step(),          filter_half(),       count};
  }

  // Of `row` and those behind it, which lie `twice` rows into a block.
  void set_emission(const AmxRowReader::Strip& strip, int64_t row, int64_t twice, int64_t channel,
                    const AffineBlock<C>& all, AmxEmission* e) const {
    const int64_t before = strip.positions_before(row), position = strip.first + before;
    e->rows = strip.positions_before(std::min(row + block_rows_, strip.rows())) - before;
    e->row = twice;
    set_width(strip, row, e);
    AffineBlock<C>& b = e->block;
    b.mean = all.mean + channel, b.scale = all.scale + channel, b.beta = all.beta + channel;
    b.y = static_cast<BFloat16*>(all.y) + position * b.ld_y + channel;
    if (b.residual) b.residual = static_cast<const BFloat16*>(all.residual) + position * b.ld_residual + channel;
  }

  void finish(Lines* lines, AmxAside* aside) const {
    if (!lines->multiply) return kernels_.amx.emit(&aside->emission);
    lines->blocks.panels = 0;
    lines->multiply(&lines->blocks, aside);
  }

  int64_t tap_chunks() const { return reader_.taps() * reader_.depth().chunks; }

  template <class F>
  static void for_chunks(const Job& job, int64_t height, F f) {
    for (int64_t i = 0; i < job.count; ++i)
      for (int64_t row = 0; row < job.rows[i].strip.rows(); row += height) f(job.rows[i], row);
  }

  int64_t filter_bytes(int64_t spans) const { return 2 * span_ * spans * panel_elements(); }
  Memory filters_of(const Job& job, int64_t begin, int64_t end) const {
    return {job.filters + begin * span_ * panel_elements(),
            job.filters + std::min(end * span_, panels()) * panel_elements()};
  }

  // So fast that the products of a job's rows with some spans take as long. Of filters, which L3 holds, every other
  // line, whose neighbour L2 takes by itself, so that no place is left waiting for both; every fourth where they pass
  // in the order of memory. From memory L2 often does not.
  AmxFetch fetch_during(const Job& job, int64_t spans, const Memory& memory, int64_t distance) const {
    int64_t steps = 0;
    for (int64_t i = 0; i < job.count; ++i) steps += ceil_div(job.rows[i].strip.rows(), kTileRows);
    steps *= span_ * spans * reader_.taps() * reader_.depth().chunks;
    const auto *begin = reinterpret_cast<const char*>(memory.begin), *end = reinterpret_cast<const char*>(memory.end);
    return {begin, end, distance, steps == 0 ? 0 : ceil_div(end - begin, distance * steps)};
  }

  // Few rows behind others of their strip are computed with some of those: none is read behind the strip.
  static int64_t first_row(int64_t row, int64_t end) {
    return row > 0 && end - row < kTileRows ? end - kTileRows : row;
  }

  // A tile is emitted while the next is computed, if the epilogue can.
  void run_tile(const Rows& rows, int64_t chunk, int64_t span, const Job& job, C* data, AmxAside* aside,
                const TileEpilogue<C>& epilogue) const {
    const AmxRowReader::Strip& strip = rows.strip;
    const int64_t row = chunk * kChunk, end = std::min(row + kChunk, strip.rows()), stride = reader_.row_elements();
    const int64_t first = first_row(row, end), twice = row - first;
    const int64_t ld = columns(), channel = span * ld, cols = std::min(ld, cols_ - channel);
    const int64_t before = strip.positions_before(row), count = strip.positions_before(end) - before;
    const Tile<C> tile{data + twice * ld, ld,   strip.first + before,     count,
                       channel,           cols, rows.first_chunk + chunk, job.worker};
    AmxEmission emission{};
    if (epilogue.in_place) emission = emission_of(tile, epilogue.in_place(tile), strip, row, twice);
    aside->emission.ahead = static_cast<const char*>(emission.block.residual);
    for (int64_t panel = span * span_; panel < std::min((span + 1) * span_, panels()); ++panel)
      kernels_.amx.multiply(rows_of(rows.data + first * stride, end - first), job.filters + panel * panel_elements(),
                            data + panel % span_ * kPanel, ld, aside);
    kernels_.amx.emit(&aside->emission);
    aside->emission = emission;
    if (epilogue.in_place) return;
    close_up(tile, strip, row, end);
    epilogue.emit(tile);
    if (epilogue.finish) epilogue.finish(tile);
  }

  // 32 rows of the tile take new sums when their products are done: until then they are emitted, slice by slice.
  AmxEmission emission_of(const Tile<C>& tile, const GemmOutput<C>& to, const AmxRowReader::Strip& strip, int64_t row,
                          int64_t twice) const {
    constexpr int64_t kSlices = 4, kPart = 16;  // fewer would come in bursts; chunks of a single tap, about
    const int64_t steps = reader_.taps() == 1 ? std::min(tap_chunks(), kPart) : tap_chunks();
    const int64_t slices = std::clamp<int64_t>(steps, 1, kSlices);
    AmxEmission e{};
    e.emit = to.emit, e.block = to.block, e.rows = tile.rows;
    e.slice = kTileRows / slices, e.steps = e.wait = steps / slices;
    set_width(strip, row, &e);
    e.block.z = tile.data + e.row * tile.ld, e.block.ld_z = tile.ld;
    e.row += twice;
    return e;
  }

  // Of e->rows positions from `row` on.
  static void set_width(const AmxRowReader::Strip& strip, int64_t row, AmxEmission* e) {
    const bool flat = strip.pitch == strip.width;
    const int64_t column = flat ? 0 : row % strip.pitch;
    e->width = flat ? e->rows : strip.width, e->gap = strip.pitch - strip.width;
    const bool between = !flat && column >= e->width;
    if (between) e->row += strip.pitch - column;
    e->line = std::min(e->rows, between ? e->width : e->width - column);
  }

  // The rows between lines are dropped.
  static void close_up(const Tile<C>& tile, const AmxRowReader::Strip& strip, int64_t row, int64_t end) {
    if (strip.pitch == strip.width) return;
    C* to = tile.data;
    for (int64_t line = row / strip.pitch; line * strip.pitch < end; ++line) {
      const int64_t first = std::max(row, line * strip.pitch);
      const int64_t rows = std::min(end, line * strip.pitch + strip.width) - first;
      if (rows <= 0) continue;
      const C* from = tile.data + (first - row) * tile.ld;
      if (from != to) std::memmove(to, from, rows * tile.ld * sizeof(C));
      to += rows * tile.ld;
    }
  }

  static constexpr int64_t kFilterBytes = 1 << 20, kGroupBytes = 1 << 20;  // halves of L2
  static constexpr int64_t kPassBytes = 128 << 10;                         // of filters that pass 32 rows in L1
  static constexpr int64_t kMaxGroup = 16, kShallow = 18;                  // strips; chunks

  const ComputeKernels<C>& kernels_;
  int64_t depth_, cols_, filter_taps_;
  bool taps_inner_;  // of each chunk the steps of all taps, not of each tap those of all chunks
  AmxRowReader reader_;
  int64_t group_ = 1;                 // strips of a task
  int64_t span_ = 1;                  // panels of a tile, of which a job has one or more
  int64_t block_rows_ = kTileRows;    // that are emitted line by line
  std::vector<int64_t> step_offset_;  // [taps][chunks], or [chunks][taps]
};

}  // namespace fusedconvbn
