// The gradient by the filters on AMX: d_filters[tap][c][k] = sum over positions of input[position through tap][c]
// dz[position][k], pixels as the depth of the products.
//
// For each strip of positions the input's rows are transposed, once for all taps (a tap reads them at an offset), and
// pairs of rows of dz are interleaved as filters are. Strips are split into ranges, which have sums of their own, added
// in their order at the end. The split follows from the problem alone, so the bits do not depend on the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "amx_rounding.h"
#include "amx_rows.h"
#include "arena.h"
#include "compute_type.h"

namespace fusedconvbn {

class AmxFilterGradient {
 public:
  AmxFilterGradient(const KernelSet& set, const ConvBnParams& p, const void* inputs)
      : p_(p),
        k_(set.f32.amx),
        storage_(storage_of<float>(set, p.dtype)),
        reader_(k_, inputs, input_grid(p), p.in_channels, forward_windows(p), strip_rows(p)) {
    // Sums are read and written once a group: small ones are in L2, and a group in L1 is better for all taps.
    const int64_t rows = 4 * sum_elements() > kSumsInCache ? kMaxGroupRows : kMinGroupRows;
    group_strips_ =
        reader_.equal_strips() ? std::clamp<int64_t>(rows / depth(reader_.max_rows()), 1, reader_.strips()) : 1;
    const int64_t most = std::min(groups(), kMaxSums / sum_elements());
    ranges_ = std::clamp<int64_t>(most, 1, kMaxRanges);
  }

  struct Worker {
    uint16_t *staged, *columns, *panels;
  };
  struct Scratch {
    float* sums;  // [ranges][panels][row blocks][taps][32][32]
    std::vector<Worker> workers;
    const AmxRounding* rounding = nullptr;  // unless null, what dz lost is restored where it matters
  };

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<float>(ranges_ * sum_elements()), {}};
    for (int w = 0; w < workers; ++w) {
      const auto staged = arena->take<uint16_t>(reader_.staged_elements());
      const auto columns = arena->take<uint16_t>(group_strips_ * piece_columns());
      s.workers.push_back({staged, columns, arena->take<uint16_t>(group_strips_ * piece_panels())});
    }
    return s;
  }

  const AmxRowReader& reader() const { return reader_; }
  int64_t ranges() const { return ranges_; }

  // A range is whole groups of strips.
  int64_t first_strip(int64_t range) const {
    return std::min(range * groups() / ranges_ * group_strips_, reader_.strips());
  }

  // A range is done in one or more parts, each its share of the sums; parts may run at once.
  int64_t parts(int threads) const { return std::clamp<int64_t>(ceil_div(threads, ranges_), 1, panels()); }

  // Sums up a part of a range, and stores it if there is no other range. dz_of(strip) is a strip's dz: rows of `stride`
  // elements, those between two lines 0.
  template <class DzOf>
  void accumulate(int64_t range, int64_t part, int64_t parts, int64_t stride, const DzOf& dz_of, void* d_filters,
                  const Scratch& s, int worker) const {
    accumulate_strips(first_strip(range), first_strip(range + 1), range, part, parts, stride, dz_of,
                      ranges_ == 1 ? d_filters : nullptr, s, worker);
  }

  // The same of strips [begin, end), as the sums of `range` or, unless null, into d_filters.
  template <class DzOf>
  void accumulate_strips(int64_t begin, int64_t end, int64_t range, int64_t part, int64_t parts, int64_t stride,
                         const DzOf& dz_of, void* d_filters, const Scratch& s, int worker) const {
    for (int64_t first = begin, pieces; first < end; first += pieces) {
      pieces = equal_strips(first, std::min(first + group_strips_, end));
      for (int64_t i = 0; i < pieces; ++i) {
        const uint16_t* dz = dz_of(first + i);
        if (restores(s)) add_lost(range, first + i, dz, stride, part, parts, s, worker);
        pack(i, first + i, dz, stride, part, parts, s, worker);
      }
      char* stored = first + pieces == end ? static_cast<char*>(d_filters) : nullptr;
      multiply(range, pieces, reader_.strip(first).rows(), first > begin, stored, part, parts, s, worker);
    }
  }

  // Adds the ranges and stores, where there are several.
  void finish(void* d_filters, const Scratch& s, ParallelFor* parallel) const {
    if (ranges_ == 1) return;
    for_tiles(s, parallel, [&](float* tile, int64_t tap, int64_t block, int64_t panel) {
      store(tile, tap, block, panel, static_cast<char*>(d_filters), s);
    });
  }

  static constexpr int64_t kTile = 32;

  // Adds the ranges, and calls f(tile[kTile][kTile], tap, block of rows, panel) for each tile of the gradient.
  template <class F>
  void for_tiles(const Scratch& s, ParallelFor* parallel, F f) const {
    parallel->run(panels() * row_blocks(), [&](int64_t unit, int) {
      const int64_t elements = reader_.taps() * kTile * kTile;
      float* sums = s.sums + unit * elements;
      for (int64_t range = 1; range < ranges_; ++range)
        for (int64_t i = 0; i < elements; ++i) sums[i] += sums[range * sum_elements() + i];
      for (int64_t t = 0; t < reader_.taps(); ++t)
        f(sums + t * kTile * kTile, t, unit % row_blocks(), unit / row_blocks());
    });
  }

  // Of a range: panel by panel, in them block of rows by block of rows.
  int64_t sum_elements() const { return panels() * panel_sums(); }

 private:
  // How many strips from `first` on have as many rows: only the last of all may have fewer.
  int64_t equal_strips(int64_t first, int64_t end) const {
    int64_t next = first + 1;
    while (next < end && reader_.strip(next).rows() == reader_.strip(first).rows()) ++next;
    return next - first;
  }
  static constexpr int64_t kMaxRanges = 16, kSumsInCache = 4 << 20;
  static constexpr int64_t kMinGroupRows = 240, kMaxGroupRows = 960;
  static constexpr int64_t kMaxSums = 1 << 20;     // of all ranges: adding them reads them once more
  static constexpr int64_t kStripBytes = 2 << 20;  // both operands, before and after packing
  static constexpr int64_t kMinRows = 192,
                           kMaxRows = 480;   // sums are read and written once a strip; its panels are in L1
  static constexpr int64_t kTapsRows = 256;  // of both operands in L1, which are read for each tap
  // Of few channels taps merge, sums are few, and what strips cost is the lines that two of them read.
  static constexpr int64_t kFewChannels = 16, kFewChannelsRows = 1024;

  static int64_t strip_rows(const ConvBnParams& p) {
    if (p.taps() > 1) return p.in_channels <= kFewChannels ? kFewChannelsRows : kTapsRows;
    const int64_t rows = kStripBytes / (4 * (p.in_channels + p.out_channels));
    return std::clamp(rows, kMinRows, kMaxRows) / AmxRowReader::kChunk * AmxRowReader::kChunk;
  }
  static int64_t depth(int64_t rows) { return ceil_div(rows, kTile) * kTile; }

  int64_t groups() const { return ceil_div(reader_.strips(), group_strips_); }
  int64_t piece_columns() const { return row_blocks() * kTile * ld(); }
  int64_t piece_panels() const { return panels() * kTile * depth(reader_.max_rows()); }

  int64_t rows() const { return reader_.depth().elements(); }  // of a tap's gradient, the elements of a staged tap
  int64_t row_blocks() const { return ceil_div(rows(), kTile); }
  int64_t panels() const { return ceil_div(p_.out_channels, kTile); }
  int64_t first_panel(int64_t part, int64_t parts) const { return part * panels() / parts; }
  int64_t panel_sums() const { return row_blocks() * reader_.taps() * kTile * kTile; }
  int64_t ld() const { return depth(reader_.max_read_rows()) + kTile; }  // no multiple of a page

  static bool restores(const Scratch& s) { return s.rounding && s.rounding->matters(); }
  Span columns(int64_t part, int64_t parts) const {
    return {first_panel(part, parts) * kTile, std::min(first_panel(part + 1, parts) * kTile, p_.out_channels)};
  }

  void add_lost(int64_t range, int64_t strip, const uint16_t* dz, int64_t stride, int64_t part, int64_t parts,
                const Scratch& s, int worker) const {
    const Span of = columns(part, parts);
    s.rounding->add(range, dz + of.begin, stride, reader_.strip(strip).rows(), of.begin, of.size(), worker);
  }

  // Packs a strip as piece `piece` of a group.
  void pack(int64_t piece, int64_t strip_index, const uint16_t* dz, int64_t stride, int64_t part, int64_t parts,
            const Scratch& s, int worker) const {
    const AmxRowReader::Strip strip = reader_.strip(strip_index);
    const Worker& w = s.workers[worker];
    k_.transpose(reader_.read(strip, w.staged), reader_.row_elements(), reader_.read_rows(strip), rows(),
                 w.columns + piece * piece_columns(), ld());
    const Span of = columns(part, parts);
    k_.pairs(dz + of.begin, stride, strip.rows(), of.size(), w.panels + piece * piece_panels());
  }

  // Adds the products of a group's first `pieces` to a range's sums, or sets them. Sums that are complete are stored
  // from L1, and those of the only group are in no other memory.
  void multiply(int64_t range, int64_t pieces, int64_t rows, bool add, char* stored, int64_t part, int64_t parts,
                const Scratch& s, int worker) const {
    alignas(64) float only[kTile * kTile];
    const Worker& w = s.workers[worker];
    const int64_t begin = first_panel(part, parts), end = first_panel(part + 1, parts), depth = this->depth(rows);
    float* sums = s.sums + range * sum_elements() + begin * panel_sums();
    k_.begin(kTile);
    for (int64_t panel = 0; panel < end - begin; ++panel)
      for (int64_t block = 0; block < row_blocks(); ++block)
        for (int64_t t = 0; t < reader_.taps(); ++t, sums += kTile * kTile) {
          float* to = stored && !add ? only : sums;
          const uint16_t* columns = w.columns + block * kTile * ld() + reader_.tap_offset()[t] / reader_.row_elements();
          k_.outer({columns, ld(), piece_columns(), w.panels + panel * kTile * depth, piece_panels(), pieces, depth},
                   add, to);
          if (stored) store(to, t, block, begin + panel, stored, s);
        }
    k_.end();
  }

  // Rows of a merged tap are pixel after pixel, with padding.
  void store(float* tile, int64_t tap, int64_t block, int64_t panel, char* d_filters, const Scratch& s) const {
    const int64_t pixel = reader_.pixel(), column = panel * kTile, end = std::min((block + 1) * kTile, rows());
    const int64_t merged = p_.taps() / reader_.taps(), cols = std::min(kTile, p_.out_channels - column);
    for (int64_t row = block * kTile, count; row < end; row += count) {
      const int64_t channel = row % pixel, left = p_.in_channels - channel;
      count = std::min(end - row, pixel - channel);
      if (left <= 0) continue;
      const int64_t own_tap = tap * merged + row / pixel;
      float* gradient = tile + (row - block * kTile) * kTile;
      if (restores(s)) s.rounding->restore(own_tap, channel, std::min(count, left), column, cols, gradient, kTile);
      const int64_t element = (own_tap * p_.in_channels + channel) * p_.out_channels + column;
      storage_.kernels.store(gradient, kTile, std::min(count, left), cols, d_filters + element * storage_.element_bytes,
                             p_.out_channels, 1, false);
    }
  }

  const ConvBnParams& p_;
  const AmxKernels& k_;
  Storage<float> storage_;
  AmxRowReader reader_;
  int64_t group_strips_, ranges_;
};

}  // namespace fusedconvbn
