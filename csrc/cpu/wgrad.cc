// The gradient by the filters: d_filters[tap][c][k] = sum over positions of input[position through tap][c]
// dz[position][k].
//
// Both operands are packed into panels for a block of positions, then outer products accumulate into tiles. The tiles
// are split among tasks; where there are few, the positions are too, each range of them with sums of its own, added in
// their order at the end. Both splits follow from the problem alone, so the bits do not depend on the threads.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "convolve.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

constexpr int64_t kDepth = 192;        // positions of a block: the depth of an outer product
constexpr int64_t kTasks = 16;         // enough for as many threads
constexpr int64_t kMinBlocks = 4;      // of a range of positions
constexpr int64_t kMaxSums = 4 << 20;  // elements of all ranges' sums, beyond one range's

template <class C>
class FilterGradient {
 public:
  FilterGradient(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers, const void* conv_grad)
      : p_(p),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        dz_(conv_grad_image<C>(set, p, conv_grad)),
        d_filters_(static_cast<char*>(buffers.d_filters)),
        reader_(Image<C>(buffers.inputs, storage_, input_grid(p)), p.in_channels, forward_windows(p), p.groups == 1,
                kDepth, kDepth) {
    blocks_ = ceil_div(p.pixels(), kDepth);
    ranges_ = std::clamp<int64_t>(std::min(blocks_ / kMinBlocks, kMaxSums / sum_elements()), 1, kTasks);
    parts_ = std::min(units(), std::max<int64_t>(1, kTasks / ranges_));
  }

  size_t scratch_bytes(int workers) {
    carve(nullptr, workers);
    return scratch_bytes_;
  }

  void run(int workers, char* scratch, ParallelFor* parallel) {
    carve(scratch, workers);
    std::fill(zeros_, zeros_ + reader_.zero_elements(), C(0));
    parallel->run(ranges_ * parts_,
                  [&](int64_t task, int worker) { accumulate(task / parts_, task % parts_, worker); });
    parallel->run(units(), [&](int64_t unit, int) { finish(unit); });
  }

 private:
  struct Worker {
    typename WindowReader<C>::Scratch reader;
    C* inputs;  // [kDepth][outer_rows]
    C* dz;      // [column panels][kDepth][panel]
  };

  // A unit is a group's and tap's `outer_rows` rows (input channels) of the gradient, in all column panels.
  int64_t tap_rows() const { return reader_.depth() * p_.group_in(); }
  int64_t row_panels() const { return ceil_div(tap_rows(), k_.outer_rows); }
  int64_t column_panels() const { return ceil_div(p_.group_out(), k_.panel); }
  int64_t units() const { return p_.groups * reader_.taps() * row_panels(); }
  int64_t tile_elements() const { return k_.outer_rows * k_.panel; }
  int64_t unit_elements() const { return column_panels() * tile_elements(); }
  int64_t sum_elements() const { return units() * unit_elements(); }

  void carve(char* base, int workers) {
    Arena arena(base);
    sums_ = arena.take<C>(ranges_ * sum_elements());
    zeros_ = arena.take<C>(reader_.zero_elements());
    for (int w = 0; w < workers; ++w)
      workers_.push_back({reader_.carve(&arena, zeros_), arena.take<C>(kDepth * k_.outer_rows),
                          arena.take<C>(kDepth * k_.panel * column_panels())});
    scratch_bytes_ = arena.used();
  }

  // One part of the units over one range of the positions.
  void accumulate(int64_t range, int64_t part, int worker) const {
    const Worker& w = workers_[worker];
    const int64_t begin = part * units() / parts_, end = (part + 1) * units() / parts_;
    C* sums = sums_ + range * sum_elements();
    std::fill(sums + begin * unit_elements(), sums + end * unit_elements(), C(0));
    for (int64_t block = range * blocks_ / ranges_; block < (range + 1) * blocks_ / ranges_; ++block) {
      const int64_t first = block * kDepth, count = std::min(kDepth, p_.pixels() - first);
      reader_.stage(first, count, w.reader);
      reader_.point(first, count, w.reader);
      int64_t packed_group = -1;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t group = unit / (reader_.taps() * row_panels());
        if (group != packed_group) pack_dz(group, first, count, w.dz);
        packed_group = group;
        multiply(unit, count, w, sums + unit * unit_elements());
      }
    }
  }

  void pack_dz(int64_t group, int64_t first, int64_t count, C* packed) const {
    for (int64_t panel = 0; panel < column_panels(); ++panel, packed += kDepth * k_.panel) {
      const int64_t column = panel * k_.panel, cols = std::min(k_.panel, p_.group_out() - column);
      if (cols < k_.panel) std::fill(packed, packed + count * k_.panel, C(0));
      dz_.copy(first, count, group * p_.group_out() + column, cols, {packed, k_.panel});
    }
  }

  void multiply(int64_t unit, int64_t count, const Worker& w, C* tiles) const {
    const int64_t row = unit % row_panels() * k_.outer_rows, tap = unit / row_panels() % reader_.taps();
    const int64_t group = unit / (reader_.taps() * row_panels());
    k_.pack_rows(w.reader.rows + tap * kDepth, group * p_.group_in() + row, count,
                 std::min(k_.outer_rows, tap_rows() - row), w.inputs);
    for (int64_t panel = 0; panel < column_panels(); ++panel)
      k_.outer(w.inputs, w.dz + panel * kDepth * k_.panel, count, tiles + panel * tile_elements());
  }

  // Adds the ranges' sums of a unit and stores its tiles.
  void finish(int64_t unit) const {
    C* tiles = sums_ + unit * unit_elements();
    for (int64_t range = 1; range < ranges_; ++range)
      for (int64_t i = 0; i < unit_elements(); ++i) tiles[i] += tiles[range * sum_elements() + i];
    const int64_t row = unit % row_panels() * k_.outer_rows, tap = unit / row_panels() % reader_.taps();
    const int64_t group = unit / (reader_.taps() * row_panels());
    const int64_t rows = std::min(k_.outer_rows, tap_rows() - row);
    for (int64_t panel = 0; panel < column_panels(); ++panel) {
      const int64_t column = panel * k_.panel, cols = std::min(k_.panel, p_.group_out() - column);
      const int64_t element = (tap * tap_rows() + row) * p_.out_channels + group * p_.group_out() + column;
      storage_.kernels.store(tiles + panel * tile_elements(), k_.panel, rows, cols,
                             d_filters_ + element * storage_.element_bytes, p_.out_channels, 1, false);
    }
  }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  Image<C> dz_;
  char* d_filters_;
  WindowReader<C> reader_;
  int64_t blocks_, ranges_, parts_;
  C *sums_, *zeros_;  // sums: [ranges][units][column panels][outer_rows][panel]
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
