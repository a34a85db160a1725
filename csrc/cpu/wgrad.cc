// The gradient by the filters: d_filters[tap][c][k] = sum over positions of input[position through tap][c]
// dz[position][k].
//
// A task computes a part of that matrix (units by columns) over a range of the positions: for each block of positions
// it packs both operands into panels, while outer products of the block before asked for their lines, and accumulates
// tiles. Sums of several ranges are added in their order at the end. Ranges and blocks follow from the problem alone,
// so the bits do not depend on the threads; parts may: each element is summed up in one.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "convolve.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

// Budget of a task in an L2 of 2 MiB: half of it for the sums of a part. That is all of most gradients, so that whole
// rows of both operands are read, once, page after page; of 3x3 and of the last layers it is some taps or many columns.
constexpr int64_t kDepth = 192;               // positions of a block, the depth of an outer product, at most
constexpr int64_t kPartElements = 264 << 10;  // sums of a part
constexpr int64_t kMaxPartRows = 1032;        // of one tap: what is packed at once
constexpr int64_t kMinPartColumns = 512, kMaxPartColumns = 1024;
constexpr int64_t kMaxRanges = 16, kMaxSums = 512 << 10;  // of all ranges: adding them reads them once more
constexpr int64_t kMinBlocks = 4;                         // of a range of positions
constexpr int64_t kTasksPerThread = 4;

template <class C>
class FilterGradient {
 public:
  FilterGradient(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& buffers,
                 const void* conv_grad)
      : p_(p),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        dz_(static_cast<const C*>(conv_grad)),
        d_filters_(buffers.d_filters, storage_, filter_grid(p)),
        taps_(forward_windows(p).taps),
        reader_(Image<C>(buffers.inputs, storage_, input_grid(p)), p.in_channels, forward_windows(p), p.groups == 1,
                kDepth, kDepth) {
    blocks_ = ceil_div(p.pixels(), kDepth);
    ranges_ = std::clamp<int64_t>(std::min(blocks_ / kMinBlocks, kMaxSums / all_elements()), 1, kMaxRanges);
    const int64_t rows = units() * k_.outer_rows;
    const int64_t columns = std::clamp(kPartElements / rows, kMinPartColumns, kMaxPartColumns);
    column_parts_ = ceil_div(column_panels() * k_.panel, columns);
    int64_t part_rows = kPartElements / (part_panels() * k_.panel);
    if (tap_rows() > kMaxPartRows) part_rows = std::min(part_rows, kMaxPartRows);
    const int64_t tasks = device.threads == 1 ? 1 : kTasksPerThread * device.threads;
    unit_parts_ = std::max(ceil_div(rows, part_rows), ceil_div(tasks, ranges_ * column_parts_));
    unit_parts_ = std::min(unit_parts_, units());
  }

  size_t scratch_bytes(int workers) {
    carve(nullptr, workers);
    return scratch_bytes_;
  }

  void run(int workers, char* scratch, ParallelFor* parallel) {
    carve(scratch, workers);
    std::fill(zeros_, zeros_ + reader_.zero_elements(), C(0));
    parallel->run(ranges_ * parts(),
                  [&](int64_t task, int worker) { accumulate(task / parts(), task % parts(), worker); });
    if (ranges_ > 1) parallel->run(units(), [&](int64_t unit, int) { merge(unit); });
  }

 private:
  // Where the operands of a block of positions lie in memory, or in lines staged from there.
  struct Rows {
    typename WindowReader<C>::Scratch inputs;
    const C** dz;  // [kDepth]
  };
  struct Worker {
    Rows rows[2];  // of the even and of the odd blocks
    C* inputs;     // [units of one tap][kDepth][outer_rows]
    C* dz;         // [part_panels()][kDepth][panel]
    C* sums;       // of a part, where there is one range
  };
  // A unit is a group's and tap's `outer_rows` rows (input channels) of the gradient.
  struct Unit {
    int64_t group, tap, row;
  };
  struct Part {
    int64_t unit, units, panel, panels;
    C* sums;     // [units][panels][outer_rows][panel]
    int64_t ld;  // tiles from one unit's to the next
  };

  // The gradient as rows of output channels.
  static Grid filter_grid(const ConvBnParams& p) { return {1, 1, p.taps() * p.group_in(), 0, 0, p.out_channels, 1}; }

  int64_t tap_rows() const { return reader_.depth() * p_.group_in(); }
  int64_t row_panels() const { return ceil_div(tap_rows(), k_.outer_rows); }
  int64_t column_panels() const { return ceil_div(p_.group_out(), k_.panel); }
  int64_t units() const { return p_.groups * reader_.taps() * row_panels(); }
  int64_t parts() const { return unit_parts_ * column_parts_; }
  int64_t part_units() const { return ceil_div(units(), unit_parts_); }             // at most
  int64_t part_panels() const { return ceil_div(column_panels(), column_parts_); }  // at most
  int64_t tile_elements() const { return k_.outer_rows * k_.panel; }
  int64_t part_elements() const { return part_units() * part_panels() * tile_elements(); }
  int64_t all_elements() const { return units() * column_panels() * tile_elements(); }

  Unit unit_at(int64_t unit) const {
    return {unit / (reader_.taps() * row_panels()), unit / row_panels() % reader_.taps(),
            unit % row_panels() * k_.outer_rows};
  }
  // With one range a part's sums are the worker's own, and stay in its L2.
  Part part_at(int64_t range, int64_t number, C* own) const {
    const int64_t u = number / column_parts_, c = number % column_parts_;
    const int64_t unit = u * units() / unit_parts_, panel = c * column_panels() / column_parts_;
    const int64_t units_end = (u + 1) * units() / unit_parts_, panels_end = (c + 1) * column_panels() / column_parts_;
    Part part{unit, units_end - unit, panel, panels_end - panel, own, panels_end - panel};
    if (ranges_ == 1) return part;
    part.ld = column_panels();
    part.sums = sums_ + range * all_elements() + (unit * part.ld + panel) * tile_elements();
    return part;
  }
  int64_t block_begin(int64_t block) const { return block * p_.pixels() / blocks_; }
  int64_t block_count(int64_t block) const { return block_begin(block + 1) - block_begin(block); }

  void carve(char* base, int workers) {
    Arena arena(base);
    sums_ = arena.take<C>(ranges_ > 1 ? ranges_ * all_elements() : 0);
    zeros_ = arena.take<C>(reader_.zero_elements());
    for (int i = 0; i < workers; ++i) {
      Worker w{};
      for (Rows& rows : w.rows) rows.dz = arena.take<const C*>(kDepth);
      w.rows[0].inputs = reader_.carve(&arena, zeros_);
      w.rows[1].inputs = reader_.staged() ? w.rows[0].inputs : reader_.carve(&arena, zeros_);
      w.inputs = arena.take<C>(std::min(part_units(), row_panels()) * kDepth * k_.outer_rows);
      w.dz = arena.take<C>(part_panels() * kDepth * k_.panel);
      w.sums = arena.take<C>(ranges_ > 1 ? 0 : part_elements());
      workers_.push_back(w);
    }
    scratch_bytes_ = arena.used();
  }

  // One part of the gradient over one range of the positions.
  void accumulate(int64_t range, int64_t number, int worker) const {
    const Worker& w = workers_[worker];
    const Part part = part_at(range, number, w.sums);
    const int64_t begin = range * blocks_ / ranges_, end = (range + 1) * blocks_ / ranges_;
    if (begin == end) std::fill(part.sums, part.sums + part_elements(), C(0));
    for (int64_t block = begin; block < end; ++block) {
      const Rows& rows = w.rows[block % 2];
      if (block == begin) point_dz(block, rows);
      if (block == begin || reader_.staged()) point_inputs(block, rows);
      NextBlock next;
      if (block + 1 < end) look_ahead(block + 1, part, w.rows[(block + 1) % 2], &next);
      multiply(part, {block_count(block), block > begin, rows}, w, &next);
    }
    if (ranges_ == 1)
      for (int64_t i = 0; i < part.units; ++i)
        store(part.sums + i * part.ld * tile_elements(), part.unit + i, part.panel, part.panels);
  }

  void point_inputs(int64_t block, const Rows& rows) const {
    reader_.stage(block_begin(block), block_count(block), rows.inputs);
    reader_.point(block_begin(block), block_count(block), rows.inputs);
  }

  void point_dz(int64_t block, const Rows& rows) const {
    const C* dz = dz_ + block_begin(block) * p_.out_channels;
    for (int64_t i = 0; i < block_count(block); ++i, dz += p_.out_channels) rows.dz[i] = dz;
  }

  // What the next block will read: dz, and the inputs through one tap of each phase of the stride: those of the same
  // phase read nearly the same pixels.
  struct NextBlock {
    static constexpr int kMost = 5;  // up to stride 2
    Ahead<C> lines[kMost];
    int count = 0, current = 0;

    void add(const Ahead<C>& ahead) {
      if (count < kMost) lines[count++] = ahead;
    }
    // Spreads them over products of `tiles` tiles.
    void spread(int64_t tiles) {
      int64_t all = 0;
      for (int i = 0; i < count; ++i) all += lines[i].lines;
      for (int i = 0; i < count; ++i) lines[i].steps = std::max<int64_t>(1, tiles / all);
    }
    Ahead<C>* pending() {
      while (current < count && lines[current].row == lines[current].count) ++current;
      return current < count ? &lines[current] : nullptr;
    }
  };

  void look_ahead(int64_t block, const Part& part, const Rows& rows, NextBlock* next) const {
    const Unit unit = unit_at(part.unit);
    const int64_t column = part.panel * k_.panel, count = block_count(block);
    point_dz(block, rows);
    next->add(ahead_of(rows.dz, unit.group * p_.group_out() + column, count,
                       std::min(part.panels * k_.panel, p_.group_out() - column)));
    if (!reader_.staged()) {
      point_inputs(block, rows);
      const int64_t row = part.units < row_panels() ? unit.row : 0;
      const int64_t last_tap = std::min(unit.tap + (part.units - 1) / row_panels(), reader_.taps() - 1);
      for (int64_t tap = unit.tap; tap <= last_tap; ++tap)
        if (is_first_of_phase(tap, unit.tap))
          next->add(ahead_of(rows.inputs.rows + tap * kDepth, unit.group * p_.group_in() + row, count,
                             std::min(part.units * k_.outer_rows, tap_rows() - row)));
    }
    next->spread(part.units * part.panels);
  }

  // Whether no tap from `first` on reads pixels at a multiple of the stride from this one's.
  bool is_first_of_phase(int64_t tap, int64_t first) const {
    for (int64_t t = first; t < tap; ++t)
      if ((taps_[tap].height - taps_[t].height) % p_.stride_height == 0 &&
          (taps_[tap].width - taps_[t].width) % p_.stride_width == 0)
        return false;
    return true;
  }

  // A block of positions; `add`: to what the sums hold.
  struct BlockRows {
    int64_t count;
    bool add;
    const Rows& rows;
  };

  void multiply(const Part& part, const BlockRows& block, const Worker& w, NextBlock* next) const {
    int64_t packed_group = -1;
    for (int64_t i = 0, units; i < part.units; i += units) {
      const Unit unit = unit_at(part.unit + i);
      units = std::min(part.units - i, row_panels() - unit.row / k_.outer_rows);
      if (unit.group != packed_group) pack_dz(unit.group, part, block, w.dz);
      packed_group = unit.group;
      multiply_units(unit, i, units, part, block, w, next);
    }
  }

  void pack_dz(int64_t group, const Part& part, const BlockRows& block, C* packed) const {
    const int64_t column = part.panel * k_.panel;
    k_.pack_columns(block.rows.dz, group * p_.group_out() + column, block.count,
                    std::min(part.panels * k_.panel, p_.group_out() - column), packed, kDepth * k_.panel);
  }

  // Units [index, index + units) of a part, all of one tap. A panel of dz stays in L1 for all of them.
  void multiply_units(const Unit& unit, int64_t index, int64_t units, const Part& part, const BlockRows& block,
                      const Worker& w, NextBlock* next) const {
    const int64_t valid = std::min(units * k_.outer_rows, tap_rows() - unit.row);
    k_.pack_rows(block.rows.inputs.rows + unit.tap * kDepth, unit.group * p_.group_in() + unit.row, block.count, valid,
                 w.inputs, kDepth * k_.outer_rows);
    C* tiles = part.sums + index * part.ld * tile_elements();
    for (int64_t panel = 0; panel < part.panels; ++panel)
      for (int64_t u = 0; u < units; ++u)
        k_.outer(w.inputs + u * kDepth * k_.outer_rows, w.dz + panel * kDepth * k_.panel, block.count,
                 std::min(k_.outer_rows, valid - u * k_.outer_rows), block.add,
                 tiles + (u * part.ld + panel) * tile_elements(), next->pending());
  }

  // Adds the ranges' sums of a unit and stores them.
  void merge(int64_t unit) const {
    const int64_t elements = column_panels() * tile_elements();
    C* tiles = sums_ + unit * elements;
    for (int64_t range = 1; range < ranges_; ++range)
      for (int64_t e = 0; e < elements; ++e) tiles[e] += tiles[range * all_elements() + e];
    store(tiles, unit, 0, column_panels());
  }

  // Row by row, so that whole rows are written at once.
  void store(const C* tiles, int64_t number, int64_t panel, int64_t panels) const {
    const Unit unit = unit_at(number);
    const int64_t rows = std::min(k_.outer_rows, tap_rows() - unit.row), column = panel * k_.panel;
    const int64_t cols = std::min(panels * k_.panel, p_.group_out() - column), whole = cols / k_.panel * k_.panel;
    const auto write = [&](int64_t r, int64_t c, int64_t count, int64_t width) {
      const int64_t channel = unit.group * p_.group_out() + column + c;
      storage_.kernels.store(tiles + c / k_.panel * tile_elements() + r * k_.panel, tile_elements(), count, width,
                             d_filters_.address(unit.tap * tap_rows() + unit.row + r, channel), k_.panel, 1,
                             d_filters_.streams(channel, width));
    };
    for (int64_t r = 0; r < rows; ++r) {
      write(r, 0, whole / k_.panel, k_.panel);
      if (whole < cols) write(r, whole, 1, cols - whole);
    }
  }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  const C* dz_;  // [pixels][K]
  Image<C> d_filters_;
  std::vector<Tap> taps_;
  WindowReader<C> reader_;
  int64_t blocks_, ranges_, unit_parts_, column_parts_;
  C *sums_, *zeros_;  // sums: [ranges][parts], where there are several ranges
  std::vector<Worker> workers_;
  size_t scratch_bytes_ = 0;
};

}  // namespace

size_t wgrad_direct_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    return FilterGradient<decltype(c)>(set, p, device, {}, nullptr).scratch_bytes(device.threads);
  });
}

Status run_wgrad_direct(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_filters == nullptr) return Status{};
  with_compute_type(call.params.dtype, [&](auto c) {
    FilterGradient<decltype(c)>(set, call.params, call.device, *call.backward, call.conv_grad)
        .run(call.device.threads, call.scratch, call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
