// All of backward for a 1x1 convolution of stride 1 whose forward saved z.
//
// There an output pixel belongs to one input pixel. Once the sums over (dy, z) are known, the gradient of z of a block
// of pixels is made in L2, and from it both gradients at once: it never reaches memory. Each pass reads (dy, z) once,
// the second the inputs as well, while the products of the block before hide that.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "convolve.h"
#include "gradient_blocks.h"
#include "products.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

template <class C>
class BackwardPointwise {
 public:
  BackwardPointwise(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& b,
                    const void* conv_out, char* scratch)
      : p_(p),
        b_(b),
        k_(compute_kernels<C>(set)),
        z_(saved_image<C>(set, p, p.saved, conv_out)),
        d_inputs_(b.d_inputs, storage_of<C>(set, p.dtype), input_grid(p)),
        arena_(scratch),
        blocks_(set, p, b, z_, GradientBlocks<C>::blocks(p), device.threads, &arena_),
        product_(fittest_product(k_, p.in_channels, p.out_channels)),
        ld_x_(padded_columns<C>(p.in_channels)),
        ld_dz_(padded_columns<C>(p.out_channels)) {
    ranges_ = std::clamp<int64_t>(std::min(blocks() / kMinBlocks, kMaxSums / sum_elements()), 1, kMaxRanges);
    sums_ = arena_.take<C>(ranges_ * sum_elements());
    packed_ = arena_.take<C>(panels() * k_.gemm_columns * p.out_channels);
    for (int w = 0; w < device.threads; ++w)
      workers_.push_back({arena_.take<C>(kBlockRows * ld_x_), arena_.take<C>(kBlockRows * ld_dz_),
                          arena_.take<const C*>(kBlockRows), arena_.take<C>(kBlockRows * k_.gemm_columns)});
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void run(ParallelFor* parallel) const {
    blocks_.reduce(parallel);
    if (!b_.d_inputs && !b_.d_filters && !b_.d_residual) return;
    if (b_.d_inputs) parallel->run(panels(), [&](int64_t panel, int) { pack(panel); });
    parallel->run(ranges_, [&](int64_t range, int worker) { run_range(range, worker); });
    if (b_.d_filters) parallel->run(p_.in_channels, [&](int64_t row, int) { finish(row); });
  }

 private:
  static constexpr int64_t kMinBlocks = 4, kMaxRanges = 16;
  static constexpr int64_t kMaxSums = 1 << 20;  // elements of all ranges: adding them reads them once more

  struct Worker {
    C *x, *dz;       // [kBlockRows][ld]
    const C** rows;  // [kBlockRows]: of dz
    C* tile;         // [kBlockRows][gemm_columns]
  };
  struct Rows {
    int64_t first, count, end;  // end: of the range
  };

  int64_t blocks() const { return ceil_div(p_.pixels(), kBlockRows); }
  int64_t sum_elements() const { return ceil_div(p_.in_channels, product_.rows) * product_.rows * ld_dz_; }
  int64_t panels() const { return ceil_div(p_.in_channels, k_.gemm_columns); }
  static const C* values(const void* array) { return static_cast<const C*>(array); }

  // The filters transposed, for a panel of input channels.
  void pack(int64_t index) const {
    const ColumnPanel panel = column_panel(k_, p_.in_channels, index);
    k_.transpose(values(b_.filters) + panel.column * p_.out_channels, p_.out_channels, panel.cols, p_.out_channels,
                 packed_ + panel.column * p_.out_channels, panel.width);
  }

  void run_range(int64_t range, int worker) const {
    const Worker& w = workers_[worker];
    C* sums = sums_ + range * sum_elements();
    std::fill(sums, sums + sum_elements(), C(0));
    clear_padding(w.x, kBlockRows, p_.in_channels);
    clear_padding(w.dz, kBlockRows, p_.out_channels);
    for (int64_t r = 0; r < kBlockRows; ++r) w.rows[r] = w.dz + r * ld_dz_;
    const int64_t end = std::min((range + 1) * blocks() / ranges_ * kBlockRows, p_.pixels());
    for (int64_t first = range * blocks() / ranges_ * kBlockRows, count; first < end; first += count) {
      count = std::min(kBlockRows, end - first);
      blocks_.apply(blocks_.read(first, count, 0, p_.out_channels, worker), first, 0, {w.dz, ld_dz_}, worker);
      if (b_.d_inputs) inputs_gradient({first, count, end}, w, worker);
      if (b_.d_filters) filters_gradient({first, count, end}, w, sums);
    }
  }

  // Asks for the next dy, and for z too where products are several.
  void inputs_gradient(const Rows& block, const Worker& w, int worker) const {
    const int64_t next = block.first + block.count, at = next * p_.out_channels;
    const int64_t elements = std::min(kBlockRows, block.end - next) * p_.out_channels;
    for (int64_t index = 0; index < panels(); ++index) {
      const ColumnPanel panel = column_panel(k_, p_.in_channels, index);
      GatheredRows<C> in{w.rows, kBlockRows, block.count, 1, p_.out_channels, 0};
      share_lines(values(b_.output_gradient) + at, panels() > 1 ? values(z_.address(next, 0)) : nullptr, elements,
                  {index, panels()}, steps(block.count, panel.width, p_.out_channels), &in);
      k_.gemm(in, {packed_ + panel.column * p_.out_channels, panel.width},
              sums_to(k_, d_inputs_,
                      Tile<C>{w.tile, panel.width, block.first, block.count, panel.column, panel.cols, 0, worker}));
    }
    k_.end_streaming();
  }

  // Of a product: 24 multiplications of vectors each, with AVX-512.
  int64_t steps(int64_t rows, int64_t columns, int64_t depth) const {
    return ceil_div(rows * columns, k_.outer_rows * k_.panel) * depth;
  }

  // Asks for the next inputs, and whatever else the next dz is made from.
  void filters_gradient(const Rows& block, const Worker& w, C* sums) const {
    const C* x = values(b_.inputs) + block.first * p_.in_channels;
    for (int64_t r = 0; r < block.count; ++r)
      std::copy(x + r * p_.in_channels, x + (r + 1) * p_.in_channels, w.x + r * ld_x_);
    const int64_t next = block.first + block.count, rows = std::min(kBlockRows, block.end - next);
    LinesAhead<C> lines;
    lines.add(values(b_.inputs) + next * p_.in_channels, rows * p_.in_channels);
    const void* extra = needs_output(p_) ? b_.output : needs_residual(p_) ? b_.residual : nullptr;
    if (extra) lines.add(values(extra) + next * p_.out_channels, rows * p_.out_channels);
    if (panels() == 1 || !b_.d_inputs)
      lines.add(values(z_.address(next, 0)), rows * p_.out_channels / (has_rounded_conv_out(p_) ? 2 : 1));
    add_product(product_, {w.x, ld_x_, p_.in_channels, w.dz, ld_dz_, p_.out_channels, block.count, sums, ld_dz_},
                &lines);
  }

  // A row of the gradient by the filters, of all ranges.
  void finish(int64_t row) const {
    C* sums = sums_ + row * ld_dz_;
    add_ranges(ranges_, sum_elements(), p_.out_channels, sums);
    std::copy(sums, sums + p_.out_channels, static_cast<C*>(b_.d_filters) + row * p_.out_channels);
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  const ComputeKernels<C>& k_;
  Image<C> z_, d_inputs_;
  Arena arena_;
  GradientBlocks<C> blocks_;
  const ProductKernel<C>& product_;
  int64_t ld_x_, ld_dz_, ranges_;
  C* sums_;    // [ranges][rows][ld_dz]
  C* packed_;  // [panels][K][width]
  std::vector<Worker> workers_;
};

}  // namespace

size_t backward_pointwise_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    return BackwardPointwise<decltype(c)>(set, p, device, {}, nullptr, nullptr).scratch_bytes();
  });
}

Status run_backward_pointwise(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) {
    BackwardPointwise<decltype(c)>(set, call.params, call.device, *call.backward, call.conv_out, call.scratch)
        .run(call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
