// The gradient by the filters: d_filters[tap][c][k] = sum over positions of input[position through tap][c]
// dz[position][k].
//
// A task computes a part of that matrix (units by columns) over a range of the positions: for each block of positions
// it packs both operands into panels, while outer products of the block before asked for their lines, and accumulates
// tiles. Sums of several ranges are added in their order at the end. Parts, ranges and blocks follow from the problem
// alone, so the bits do not depend on the threads.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "convolve.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

// Budget of a task in an L2 of 2 MiB: the sums of a part, 264 x 256 floats, are 0.26 MiB; for 192 positions its
// operands as they lie, packed, and those of the next block 3 x 0.4 MiB. 192 rows of 8 KiB just fit the 16 ways of
// their sets.
constexpr int64_t kDepth = 192;                         // positions of a block, the depth of an outer product, at most
constexpr int64_t kPartRows = 264, kPartColumns = 256;  // of a part of the gradient, about
constexpr int64_t kTasks = 16;                          // enough for as many threads
constexpr int64_t kMinBlocks = 4;                       // of a range of positions

template <class C>
class FilterGradient {
 public:
  FilterGradient(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers, const void* conv_grad)
      : p_(p),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        dz_(static_cast<const C*>(conv_grad)),
        d_filters_(static_cast<char*>(buffers.d_filters)),
        reader_(Image<C>(buffers.inputs, storage_, input_grid(p)), p.in_channels, forward_windows(p), p.groups == 1,
                kDepth, kDepth) {
    blocks_ = ceil_div(p.pixels(), kDepth);
    column_parts_ = ceil_div(column_panels() * k_.panel, kPartColumns);
    unit_parts_ = ceil_div(units() * k_.outer_rows, kPartRows);
    ranges_ = std::clamp<int64_t>(blocks_ / kMinBlocks, 1, ceil_div(kTasks, unit_parts_ * column_parts_));
    unit_parts_ = std::max(unit_parts_, std::min(units(), ceil_div(kTasks, ranges_ * column_parts_)));
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
    if (ranges_ > 1) parallel->run(parts() * part_units(), [&](int64_t task, int) { merge(task); });
  }

 private:
  // Where the operands of a block of positions lie in memory, or in lines staged from there.
  struct Rows {
    typename WindowReader<C>::Scratch inputs;
    const C** dz;  // [kDepth]
  };
  struct Worker {
    Rows rows[2];  // of the even and of the odd blocks
    C* inputs;     // [part_units()][kDepth][outer_rows]
    C* dz;         // [part_panels()][kDepth][panel]
    C* sums;       // of a part, where there is one range
  };
  // A unit is a group's and tap's `outer_rows` rows (input channels) of the gradient.
  struct Unit {
    int64_t group, tap, row;
  };
  struct Part {
    int64_t unit, units, panel, panels;
    C* sums;  // [units][panels][outer_rows][panel]
  };

  int64_t tap_rows() const { return reader_.depth() * p_.group_in(); }
  int64_t row_panels() const { return ceil_div(tap_rows(), k_.outer_rows); }
  int64_t column_panels() const { return ceil_div(p_.group_out(), k_.panel); }
  int64_t units() const { return p_.groups * reader_.taps() * row_panels(); }
  int64_t parts() const { return unit_parts_ * column_parts_; }
  int64_t part_units() const { return ceil_div(units(), unit_parts_); }             // at most
  int64_t part_panels() const { return ceil_div(column_panels(), column_parts_); }  // at most
  int64_t tile_elements() const { return k_.outer_rows * k_.panel; }
  int64_t part_elements() const { return part_units() * part_panels() * tile_elements(); }

  Unit unit_at(int64_t unit) const {
    return {unit / (reader_.taps() * row_panels()), unit / row_panels() % reader_.taps(),
            unit % row_panels() * k_.outer_rows};
  }
  Part part_at(int64_t range, int64_t number, C* local) const {
    const int64_t u = number / column_parts_, c = number % column_parts_;
    const int64_t unit = u * units() / unit_parts_, panel = c * column_panels() / column_parts_;
    C* sums = ranges_ > 1 ? sums_ + (range * parts() + number) * part_elements() : local;
    return {unit, (u + 1) * units() / unit_parts_ - unit, panel, (c + 1) * column_panels() / column_parts_ - panel,
            sums};
  }

  int64_t block_begin(int64_t block) const { return block * p_.pixels() / blocks_; }
  int64_t block_count(int64_t block) const { return block_begin(block + 1) - block_begin(block); }

  void carve(char* base, int workers) {
    Arena arena(base);
    sums_ = arena.take<C>(ranges_ > 1 ? ranges_ * parts() * part_elements() : 0);
    zeros_ = arena.take<C>(reader_.zero_elements());
    for (int i = 0; i < workers; ++i) {
      Worker w{};
      for (Rows& rows : w.rows) rows.dz = arena.take<const C*>(kDepth);
      w.rows[0].inputs = reader_.carve(&arena, zeros_);
      w.rows[1].inputs = reader_.staged() ? w.rows[0].inputs : reader_.carve(&arena, zeros_);
      w.inputs = arena.take<C>(part_units() * kDepth * k_.outer_rows);
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
    std::fill(part.sums, part.sums + part.units * part.panels * tile_elements(), C(0));
    const int64_t begin = range * blocks_ / ranges_, end = (range + 1) * blocks_ / ranges_;
    for (int64_t block = begin; block < end; ++block) {
      const Rows& rows = w.rows[block % 2];
      if (block == begin) point_dz(block, rows);
      if (block == begin || reader_.staged()) point_inputs(block, rows);
      NextBlock next;
      if (block + 1 < end) look_ahead(block + 1, part, w.rows[(block + 1) % 2], &next);
      multiply(part, block_count(block), rows, w, &next);
    }
    if (ranges_ == 1)
      for (int64_t i = 0; i < part.units; ++i) store(part, i);
  }

  void point_inputs(int64_t block, const Rows& rows) const {
    reader_.stage(block_begin(block), block_count(block), rows.inputs);
    reader_.point(block_begin(block), block_count(block), rows.inputs);
  }

  void point_dz(int64_t block, const Rows& rows) const {
    const C* dz = dz_ + block_begin(block) * p_.out_channels;
    for (int64_t i = 0; i < block_count(block); ++i, dz += p_.out_channels) rows.dz[i] = dz;
  }

  // What the next block will read: dz, and the inputs through the part's first tap, which cover most of the others'.
  struct NextBlock {
    Ahead<C> dz{}, inputs{};
    Ahead<C>* pending() { return dz.row < dz.count ? &dz : inputs.row < inputs.count ? &inputs : nullptr; }
  };

  void look_ahead(int64_t block, const Part& part, const Rows& rows, NextBlock* next) const {
    const int64_t column = part.panel * k_.panel, count = block_count(block);
    point_dz(block, rows);
    next->dz = ahead_of(rows.dz, column, count, std::min(part.panels * k_.panel, p_.group_out() - column));
    if (!reader_.staged()) {
      const Unit unit = unit_at(part.unit);
      point_inputs(block, rows);
      next->inputs = ahead_of(rows.inputs.rows + unit.tap * kDepth, unit.group * p_.group_in() + unit.row, count,
                              std::min(part.units * k_.outer_rows, tap_rows() - unit.row));
    }
    next->dz.steps = next->inputs.steps =
        std::max<int64_t>(1, part.units * part.panels / (next->dz.pairs + next->inputs.pairs));
  }

  void multiply(const Part& part, int64_t count, const Rows& rows, const Worker& w, NextBlock* next) const {
    int64_t packed_group = -1;
    for (int64_t i = 0, units; i < part.units; i += units) {
      const Unit unit = unit_at(part.unit + i);
      units = std::min(part.units - i, row_panels() - unit.row / k_.outer_rows);
      if (unit.group != packed_group) pack_dz(unit.group, part, count, rows, w.dz);
      packed_group = unit.group;
      multiply_units(unit, i, units, part, count, rows, w, next);
    }
  }

  void pack_dz(int64_t group, const Part& part, int64_t count, const Rows& rows, C* packed) const {
    const int64_t column = part.panel * k_.panel;
    k_.pack_columns(rows.dz, group * p_.group_out() + column, count,
                    std::min(part.panels * k_.panel, p_.group_out() - column), packed, kDepth * k_.panel);
  }

  // Units [index, index + units) of a part, all of one tap.
  void multiply_units(const Unit& unit, int64_t index, int64_t units, const Part& part, int64_t count, const Rows& rows,
                      const Worker& w, NextBlock* next) const {
    const int64_t valid = std::min(units * k_.outer_rows, tap_rows() - unit.row);
    k_.pack_rows(rows.inputs.rows + unit.tap * kDepth, unit.group * p_.group_in() + unit.row, count, valid, w.inputs,
                 kDepth * k_.outer_rows);
    C* tile = part.sums + index * part.panels * tile_elements();
    for (int64_t u = 0; u < units; ++u)
      for (int64_t panel = 0; panel < part.panels; ++panel, tile += tile_elements())
        k_.outer(w.inputs + u * kDepth * k_.outer_rows, w.dz + panel * kDepth * k_.panel, count,
                 std::min(k_.outer_rows, valid - u * k_.outer_rows), tile, next->pending());
  }

  // Adds the ranges' sums of a unit of a part and stores its tiles.
  void merge(int64_t task) const {
    const Part part = part_at(0, task / part_units(), nullptr);
    const int64_t i = task % part_units(), elements = part.panels * tile_elements(), size = parts() * part_elements();
    if (i >= part.units) return;
    C* tiles = part.sums + i * elements;
    for (int64_t range = 1; range < ranges_; ++range)
      for (int64_t e = 0; e < elements; ++e) tiles[e] += tiles[range * size + e];
    store(part, i);
  }

  void store(const Part& part, int64_t index) const {
    const Unit unit = unit_at(part.unit + index);
    const int64_t rows = std::min(k_.outer_rows, tap_rows() - unit.row);
    const C* tile = part.sums + index * part.panels * tile_elements();
    for (int64_t panel = 0; panel < part.panels; ++panel, tile += tile_elements()) {
      const int64_t column = (part.panel + panel) * k_.panel, cols = std::min(k_.panel, p_.group_out() - column);
      const int64_t element =
          (unit.tap * tap_rows() + unit.row) * p_.out_channels + unit.group * p_.group_out() + column;
      storage_.kernels.store(tile, k_.panel, rows, cols, d_filters_ + element * storage_.element_bytes, p_.out_channels,
                             1, false);
    }
  }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  const C* dz_;  // [pixels][K]
  char* d_filters_;
  WindowReader<C> reader_;
  int64_t blocks_, ranges_, unit_parts_, column_parts_;
  C *sums_, *zeros_;  // sums: [ranges][parts], where there are several ranges
  std::vector<Worker> workers_;
  size_t scratch_bytes_ = 0;
};

}  // namespace

size_t wgrad_direct_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(
      p.dtype, [&](auto c) { return FilterGradient<decltype(c)>(set, p, {}, nullptr).scratch_bytes(device.threads); });
}

Status run_wgrad_direct(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_filters == nullptr) return Status{};
  with_compute_type(call.params.dtype, [&](auto c) {
    FilterGradient<decltype(c)>(set, call.params, *call.backward, call.conv_grad)
        .run(call.device.threads, call.scratch, call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
