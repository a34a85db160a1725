// All of backward for a 1x1 convolution of stride 1, in two passes over memory.
//
// The first reads (dy, z) and reduces, as the reduce stage does. The second, block by block of pixels, makes the
// gradient of z in cache and uses it there for both gradients:
//   d_inputs = dz W',  d_filters' = sum over pixels of dz' x
// The transpose of d_filters: dz has few channels, so they are the rows of a register tile, and the inputs are its
// columns where they lie. While it is multiplied, the next block's inputs are asked for.
//
// Tasks, ranges of blocks and parts of the input channels, follow from the problem alone.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "convolve.h"
#include "gradient_blocks.h"
#include "second_moments.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

template <class C>
class PointwiseBackward {
 public:
  // With empty buffers and a null scratch it only measures.
  PointwiseBackward(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& b,
                    const void* conv_out, Arena* arena)
      : p_(p),
        b_(b),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        d_inputs_(b.d_inputs, storage_, input_grid(p)),
        blocks_(set, p, b, Image<C>(conv_out, storage_, output_grid(p)), GradientBlocks<C>::blocks(p), device.threads,
                arena),
        ld_dz_(padded_columns(k_, p.out_channels)) {
    ranges_ = std::clamp<int64_t>(std::min(blocks() / kMinBlocks, kMaxSums / sum_elements()), 1, kTasks);
    parts_ = std::clamp<int64_t>(ceil_div(kTasks, ranges_), 1, ceil_div(p.in_channels, kPartChannels));
    packed_ = arena->take<C>(panels() * p.out_channels * k_.panel);
    sums_ = arena->take<C>(ranges_ * sum_elements());
    transposed_ = arena->take<C>(ceil_div(p.out_channels, k_.panel) * p.in_channels * k_.panel);
    for (int w = 0; w < device.threads; ++w)
      workers_.push_back({arena->take<C>(kBlockRows * ld_dz_), arena->take<const C*>(kBlockRows),
                          arena->take<const C*>(kBlockRows), arena->take<const C*>(kBlockRows),
                          arena->take<C>(kBlockRows * k_.panel), arena->take<C>(kBlockRows * k_.panel)});
  }

  void run(ParallelFor* parallel) const {
    blocks_.reduce(parallel);
    if (!b_.d_inputs && !b_.d_filters && !b_.d_residual) return;
    if (b_.d_inputs) parallel->run(panels(), [this](int64_t panel, int) { pack(panel); });
    parallel->run(ranges_ * parts_, [this](int64_t task, int worker) {
      run_task(task / parts_, {task % parts_ * panels() / parts_, (task % parts_ + 1) * panels() / parts_},
               workers_[worker], worker);
    });
    if (b_.d_filters)
      parallel->run(ceil_div(p_.out_channels, k_.panel), [this](int64_t panel, int) { finish(panel * k_.panel); });
  }

 private:
  static constexpr int64_t kTasks = 16;          // enough for as many threads
  static constexpr int64_t kMinBlocks = 4;       // of a range
  static constexpr int64_t kPartChannels = 384;  // each part makes the gradient of z again
  static constexpr int64_t kMaxSums = 1 << 20;   // elements of all ranges' sums, beyond one range's

  struct Panels {  // of input channels
    int64_t begin, end;
  };
  struct Worker {
    C* dz;                         // [kBlockRows][ld_dz]
    const C **rows, **to, **next;  // [kBlockRows]: of dz or of the inputs; see look_ahead()
    C *tile, *last;                // [kBlockRows][panel]; last: the inputs of a panel that is not full
  };

  int64_t blocks() const { return ceil_div(p_.pixels(), kBlockRows); }
  int64_t panels() const { return ceil_div(p_.in_channels, k_.panel); }
  int64_t ld_sums() const { return panels() * k_.panel; }
  int64_t sum_elements() const { return ceil_div(p_.out_channels, k_.outer_rows) * k_.outer_rows * ld_sums(); }
  int64_t cols(int64_t panel) const { return std::min(k_.panel, p_.in_channels - panel * k_.panel); }
  static const C* values(const void* array) { return static_cast<const C*>(array); }

  // W' for a panel of input channels: [K][panel].
  void pack(int64_t panel) const {
    const int64_t depth = p_.out_channels;
    k_.transpose(values(b_.filters) + panel * k_.panel * depth, depth, cols(panel), depth,
                 packed_ + panel * depth * k_.panel, k_.panel);
  }

  void run_task(int64_t range, const Panels& panels, const Worker& w, int worker) const {
    C* sums = sums_ + range * sum_elements();
    for (int64_t row = 0; row < sum_elements(); row += ld_sums())
      std::fill(sums + row + panels.begin * k_.panel, sums + row + panels.end * k_.panel, C(0));
    std::fill(w.dz, w.dz + kBlockRows * ld_dz_, C(0));  // the columns beyond K stay so
    for (int64_t block = range * blocks() / ranges_; block < (range + 1) * blocks() / ranges_; ++block) {
      const int64_t first = block * kBlockRows, count = std::min(kBlockRows, p_.pixels() - first);
      const GradientBlock<C> g = blocks_.read(first, count, 0, p_.out_channels, worker);
      blocks_.apply(g, first, 0, {w.dz, ld_dz_}, worker, panels.begin == 0);
      if (b_.d_filters) {
        Soon soon = look_ahead(first, count, panels, w);
        add_products(first, count, panels, w, sums, &soon);
      }
      if (b_.d_inputs) write_inputs(first, count, panels, w);
    }
  }

  // What will be needed soon: where this block's gradient goes, unless past the caches, and the next block's inputs.
  struct Soon {
    Ahead<C> d_inputs{}, inputs{};
    Ahead<C>* pending() {
      return d_inputs.row < d_inputs.count ? &d_inputs : inputs.row < inputs.count ? &inputs : nullptr;
    }
  };

  Soon look_ahead(int64_t first, int64_t count, const Panels& panels, const Worker& w) const {
    Soon soon;
    const int64_t channel = panels.begin * k_.panel, next = first + count, c = p_.in_channels;
    const int64_t cols = std::min(panels.end * k_.panel, c) - channel;
    const auto lines = [&](const void* image, int64_t pixel, int64_t pixels, const C** rows) {
      for (int64_t r = 0; r < pixels; ++r) rows[r] = values(image) + (pixel + r) * c;
      return ahead_of(rows, channel, pixels, cols);
    };
    if (b_.d_inputs && !d_inputs_.streams(channel, cols)) soon.d_inputs = lines(b_.d_inputs, first, count, w.to);
    soon.inputs = lines(b_.inputs, next, std::min(kBlockRows, p_.pixels() - next), w.next);
    const int64_t steps = (panels.end - panels.begin) * ceil_div(p_.out_channels, k_.outer_rows);
    soon.d_inputs.steps = soon.inputs.steps = std::max<int64_t>(1, steps / (soon.d_inputs.lines + soon.inputs.lines));
    return soon;
  }

  void add_products(int64_t first, int64_t count, const Panels& panels, const Worker& w, C* sums, Soon* soon) const {
    const C* inputs = values(b_.inputs) + first * p_.in_channels;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const C* x = inputs + panel * k_.panel;
      int64_t ld = p_.in_channels;
      if (cols(panel) < k_.panel) x = last_panel(inputs, count, panel, w), ld = k_.panel;
      for (int64_t row = 0; row < p_.out_channels; row += k_.outer_rows)
        k_.product(w.dz + row, ld_dz_, x, ld, count, sums + row * ld_sums() + panel * k_.panel, ld_sums(),
                   soon->pending());
    }
  }

  // The inputs of a panel with zeros for the channels that it lacks.
  const C* last_panel(const C* inputs, int64_t count, int64_t panel, const Worker& w) const {
    for (int64_t r = 0; r < count; ++r) w.rows[r] = inputs + r * p_.in_channels;
    k_.pack_columns(w.rows, panel * k_.panel, count, cols(panel), w.last, kBlockRows * k_.panel);
    return w.last;
  }

  void write_inputs(int64_t first, int64_t count, const Panels& panels, const Worker& w) const {
    for (int64_t r = 0; r < count; ++r) w.rows[r] = w.dz + r * ld_dz_;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      k_.gemm({w.rows, kBlockRows, count, 1, p_.out_channels, 0}, packed_ + panel * p_.out_channels * k_.panel,
              k_.panel, {w.tile});
      d_inputs_.write(first, count, panel * k_.panel, cols(panel), {w.tile, k_.panel});
    }
  }

  // Adds the ranges' sums for a panel of output channels, and stores them transposed.
  void finish(int64_t column) const {
    const int64_t count = std::min(k_.panel, p_.out_channels - column);
    C *sums = sums_ + column * ld_sums(), *packed = transposed_ + column * p_.in_channels;
    for (int64_t range = 1; range < ranges_; ++range)
      for (int64_t i = 0; i < count * ld_sums(); ++i) sums[i] += sums[range * sum_elements() + i];
    k_.transpose(sums, ld_sums(), count, p_.in_channels, packed, k_.panel);
    storage_.kernels.store(packed, k_.panel, p_.in_channels, count, static_cast<C*>(b_.d_filters) + column,
                           p_.out_channels, 1, false);
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  Image<C> d_inputs_;
  GradientBlocks<C> blocks_;
  int64_t ld_dz_, ranges_, parts_;
  C* packed_;      // [panels][K][panel]
  C* sums_;        // [ranges][K][ld_sums]: the transpose of d_filters
  C* transposed_;  // [panels of K][C][panel]
  std::vector<Worker> workers_;
};

}  // namespace

size_t backward_pointwise_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    Arena arena;
    PointwiseBackward<decltype(c)>(set, p, device, {}, nullptr, &arena);
    return arena.used();
  });
}

Status run_backward_pointwise(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) {
    Arena arena(call.scratch);
    PointwiseBackward<decltype(c)>(set, call.params, call.device, *call.backward, call.conv_out, &arena)
        .run(call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
