// All of backward for images of few channels, in training: the sums first, then block by block the gradient of z in
// cache, and from it both gradients. It never reaches memory, which these layers wait for: their outputs are large.
//
// Lines of the inputs' gradient belong to one task; where an image makes several, the outputs that add to two of them
// are computed twice, and count for the filters once. What the filters get is summed over fixed ranges of tasks.
#include <algorithm>
#include <vector>

#include "column_gradient.h"
#include "convolve.h"
#include "gradient_blocks.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

constexpr int64_t kRanges = 16;  // enough for as many threads

template <class C>
class FewChannelsBackward {
 public:
  FewChannelsBackward(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& b,
                      char* scratch)
      : p_(p),
        b_(b),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        arena_(scratch),
        gradients_(set, p, b, saved_image<C>(set, p, p.saved, b.conv_out), GradientBlocks<C>::blocks(p), device.threads,
                   &arena_, true),
        columns_(set, p, b, p.has_residual ? 1 : kRanges / std::max<int64_t>(1, p.batch)),  // du is written by one task
        reader_(Image<C>(b.inputs, storage_, input_grid(p)), p.in_channels, forward_windows(p), true, kBlock, kBlock),
        ranges_(std::min(kRanges, items())) {
    columns_.carve(&arena_, device.threads);
    zeros_ = arena_.take<C>(reader_.zero_elements());
    sums_ = arena_.take<C>(ranges_ * sum_elements());
    for (int w = 0; w < device.threads; ++w)
      workers_.push_back(
          {reader_.carve(&arena_, zeros_), arena_.take<C>(kBlock * ld_windows()), arena_.take<C>(kBlock * ld_dz())});
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void run(ParallelFor* parallel) const {
    gradients_.reduce(parallel);
    if (!b_.d_inputs && !b_.d_filters && !b_.d_residual) return;
    std::fill(zeros_, zeros_ + reader_.zero_elements(), C(0));
    // Nobody reads what the products make of columns that dz lacks, but what lies there must not be subnormal: slow.
    if (ld_dz() > p_.out_channels)
      for (const Worker& w : workers_) std::fill(w.dz, w.dz + kBlock * ld_dz(), C(0));
    if (b_.d_inputs) columns_.pack_filters();
    parallel->run(ranges_, [&](int64_t range, int worker) {
      C* sums = sums_ + range * sum_elements();
      std::fill(sums, sums + sum_elements(), C(0));
      const Span mine = part(range, ranges_, items());
      for (int64_t item = mine.begin; item < mine.end; ++item)
        run_chunk(item / columns_.chunks(), item % columns_.chunks(), sums, worker);
    });
    if (b_.d_filters) parallel->run(units(), [&](int64_t unit, int) { merge(unit * k_.outer_rows); });
  }

 private:
  static constexpr int64_t kBlock = ColumnGradient<C>::kPositions;

  struct Worker {
    typename WindowReader<C>::Scratch inputs;
    C* windows;  // [kBlock][ld_windows()]
    C* dz;       // [kBlock][ld_dz()]
  };

  int64_t items() const { return std::max<int64_t>(1, p_.batch * columns_.chunks()); }
  int64_t window() const { return p_.taps() * p_.in_channels; }
  int64_t units() const { return ceil_div(window(), k_.outer_rows); }
  int64_t ld_windows() const { return units() * k_.outer_rows; }
  int64_t ld_dz() const { return ceil_div(p_.out_channels, k_.panel) * k_.panel; }
  int64_t sum_elements() const { return ld_windows() * ld_dz(); }

  // One chunk of an image; of the output lines it needs, those of its own part count for the filters.
  void run_chunk(int64_t image, int64_t chunk, C* sums, int worker) const {
    const Span own = part(chunk, columns_.chunks(), p_.out_height);
    Span needed = own;
    typename ColumnGradient<C>::Lines lines{};
    if (b_.d_inputs) {
      lines = columns_.begin(image, chunk, worker);
      needed = columns_.output_lines(chunk);
    }
    const int64_t cuts[] = {std::min(needed.begin, own.begin), own.begin, own.end, std::max(needed.end, own.end)};
    for (int i = 0; i < 3; ++i)
      for (int64_t at = cuts[i] * p_.out_width, end = cuts[i + 1] * p_.out_width; at < end; at += kBlock)
        run_block(image, at, std::min(kBlock, end - at), i == 1 ? sums : nullptr, worker, &lines);
    if (b_.d_inputs) columns_.end(worker, &lines);
  }

  // `sums` is null where the block counts elsewhere.
  void run_block(int64_t image, int64_t at, int64_t count, C* sums, int worker,
                 typename ColumnGradient<C>::Lines* lines) const {
    const Worker& w = workers_[worker];
    const int64_t first = image * p_.out_height * p_.out_width + at;
    for (int64_t channel = 0; channel < p_.out_channels; channel += gradients_.kColumns) {
      const int64_t cols = std::min(gradients_.kColumns, p_.out_channels - channel);
      gradients_.apply(gradients_.read(first, count, channel, cols, worker), first, channel, {w.dz + channel, ld_dz()},
                       worker, sums != nullptr);
    }
    if (b_.d_filters && sums) add_to_filters(first, count, w, sums);
    if (b_.d_inputs) columns_.add(at, count, w.dz, ld_dz(), worker, lines);
  }

  void add_to_filters(int64_t first, int64_t count, const Worker& w, C* sums) const {
    reader_.stage(first, count, w.inputs);
    reader_.point(first, count, w.inputs);
    k_.copy_windows({w.inputs.rows, kBlock, count, reader_.taps(), reader_.depth() * p_.in_channels, 0}, w.windows,
                    ld_windows());
    for (int64_t row = 0; row < window(); row += k_.outer_rows)
      for (int64_t column = 0; column < p_.out_channels; column += k_.panel)
        k_.product[1].add(w.windows + row, ld_windows(), w.dz + column, ld_dz(), count, sums + row * ld_dz() + column,
                          ld_dz(), nullptr);
  }

  // Adds the ranges' sums of some rows, and stores them.
  void merge(int64_t row) const {
    const int64_t rows = std::min(k_.outer_rows, window() - row);
    C* to = sums_ + row * ld_dz();
    for (int64_t range = 1; range < ranges_; ++range)
      for (int64_t e = 0; e < rows * ld_dz(); ++e) to[e] += to[range * sum_elements() + e];
    storage_.kernels.store(to, ld_dz(), rows, p_.out_channels,
                           static_cast<char*>(b_.d_filters) + row * p_.out_channels * storage_.element_bytes,
                           p_.out_channels, 1, false);
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  Arena arena_;
  GradientBlocks<C> gradients_;
  ColumnGradient<C> columns_;
  WindowReader<C> reader_;
  int64_t ranges_;
  C* zeros_;
  C* sums_;  // [ranges][ld_windows()][ld_dz()]
  std::vector<Worker> workers_;
};

}  // namespace

size_t backward_few_channels_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(
      p.dtype, [&](auto c) { return FewChannelsBackward<decltype(c)>(set, p, device, {}, nullptr).scratch_bytes(); });
}

Status run_backward_few_channels(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) {
    FewChannelsBackward<decltype(c)>(set, call.params, call.device, *call.backward, call.scratch).run(call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
