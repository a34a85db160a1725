// All of backward for a 1x1 convolution whose forward saved the second moments of its inputs (second_moments.h).
//
// With x the inputs less their mean m, S = sum x x', du = dy activation'(u) and G = sum x du', all sums over pixels:
//   d_beta = sum du, d_gamma = inv diag(W' G), since z - mean(z) = W' x; x is less the rounded m, which G makes up for
//   dz = slope du + curve W' x + offset  (the constants of channel_gradients.h)
//   d_filters = G slope + S W curve + m (sum dz)', and sum dz is known without summing
//   d_inputs = W dz = W slope du + W curve W' x + W offset
// The slope is known beforehand, so one pass over dy, y and the inputs makes du once for both G and the first term of
// d_inputs. What is left then reads the inputs and that term alone, a fraction of the outputs: K >= 2C. Neither z nor
// its gradient is ever in memory, and nothing adds up to a difference of large sums.
#include <algorithm>
#include <cstring>
#include <vector>

#include "channel_gradients.h"
#include "compute_type.h"
#include "convolve.h"
#include "products.h"
#include "second_moments.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

template <class C>
class BackwardByMoments {
 public:
  BackwardByMoments(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& b,
                    const void* saved, char* scratch)
      : p_(p),
        b_(b),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        saved_{static_cast<C*>(const_cast<void*>(saved)), p.in_channels},
        reader_(Image<C>(b.inputs, storage_, input_grid(p)), p.in_channels, forward_windows(p), false, kBlockRows,
                kBlockRows),
        d_inputs_(b.d_inputs, storage_, strided_grid(p)),
        arena_(scratch),
        channels_(p, b, 0, &arena_),
        product_(set, static_cast<const C*>(b.filters), p.in_channels, p.out_channels),
        correlation_(fittest_product(k_, p.in_channels, p.out_channels)),
        ld_du_(padded_columns<C>(p.out_channels)),
        ld_x_(padded_columns<C>(p.in_channels)) {
    ranges_ = std::clamp<int64_t>(std::min(blocks() / kMinBlocks, kMaxSums / sum_elements()), 1, kMaxRanges);
    carve(device.threads);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void run(ParallelFor* parallel) const {
    channels_.prepare();
    if (b_.d_inputs) prepare_inputs_gradient(parallel);
    parallel->run(ranges_, [&](int64_t range, int worker) { run_range(range, workers_[worker]); });
    parallel->run(p_.in_channels, [&](int64_t row, int) {
      add_ranges(ranges_, sum_elements(), p_.out_channels, sums_ + row * ld_du_);
    });
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [&](int64_t chunk, int) { finish(chunk * kChannelChunk); });
    if (b_.d_filters) filters_gradient(parallel);
    if (b_.d_inputs) complete_inputs_gradient(parallel);
  }

 private:
  static constexpr int64_t kMinBlocks = 4, kMaxRanges = 16;
  static constexpr int64_t kMaxSums = 4 << 20;  // elements of all ranges' sums, beyond one range's

  struct Worker {
    typename WindowReader<C>::Scratch reader;
    C *du, *x;                    // [kBlockRows][ld]
    const C **du_rows, **x_rows;  // [kBlockRows]
    C* sum_du;                    // [K]: of a block
    C *tile, *part;               // [kBlockRows][gemm_columns]
  };

  // The pixels of the inputs that a strided convolution reads.
  static Grid strided_grid(const ConvBnParams& p) {
    Grid grid = input_grid(p);
    grid.height = p.out_height, grid.width = p.out_width;
    grid.line_stride *= p.stride_height, grid.pixel_stride *= p.stride_width;
    return grid;
  }

  int64_t blocks() const { return ceil_div(p_.pixels(), kBlockRows); }
  int64_t sum_elements() const { return ceil_div(p_.in_channels, correlation_.rows) * correlation_.rows * ld_du_; }
  int64_t panels() const { return ceil_div(p_.in_channels, k_.gemm_columns); }
  static const C* values(const void* array) { return static_cast<const C*>(array); }
  static void set(void* array, int64_t c, double value) { static_cast<C*>(array)[c] = static_cast<C>(value); }

  void carve(int workers) {
    Arena& arena = arena_;
    sums_ = arena.take<C>(ranges_ * sum_elements());
    sum_du_ = arena.take<double>(ranges_ * p_.out_channels);
    transposed_ = arena.take<C>(panels() * p_.out_channels * k_.gemm_columns);
    square_ = arena.take<C>(panels() * (p_.in_channels + 1) * k_.gemm_columns);
    scaled_ = arena.take<C>((p_.in_channels + 1) * ld_du_);
    zeros_ = arena.take<C>(k_.gemm_columns), ones_ = arena.take<C>(k_.gemm_columns);
    scaled_rows_ = arena.take<const C*>(p_.in_channels + 1);
    product_scratch_ = product_.carve(&arena, workers);
    for (int w = 0; w < workers; ++w)
      workers_.push_back({reader_.carve(&arena, nullptr), arena.take<C>(kBlockRows * ld_du_),
                          arena.take<C>(kBlockRows * ld_x_), arena.take<const C*>(kBlockRows),
                          arena.take<const C*>(kBlockRows), arena.take<C>(p_.out_channels),
                          arena.take<C>(kBlockRows * k_.gemm_columns), arena.take<C>(kBlockRows * k_.gemm_columns)});
  }

  // x of a block.
  void center(int64_t first, int64_t count, const Worker& w) const {
    reader_.point(first, count, w.reader);
    k_.center_rows({w.reader.rows, kBlockRows, count, 1, p_.in_channels, 0}, saved_.mean(), w.x, ld_x_);
  }

  // For one range of blocks G and the sums of du; for each block d_residual = du, and of d_inputs what du adds.
  void run_range(int64_t range, const Worker& w) const {
    C* sums = sums_ + range * sum_elements();
    std::fill(sums, sums + sum_elements(), C(0));
    std::fill_n(sum_du_ + range * p_.out_channels, p_.out_channels, 0.0);
    clear_padding(w.du, kBlockRows, p_.out_channels);
    clear_padding(w.x, kBlockRows, p_.in_channels);
    for (int64_t r = 0; r < kBlockRows; ++r) w.du_rows[r] = w.du + r * ld_du_;
    const int64_t end = (range + 1) * blocks() / ranges_;
    for (int64_t block = range * blocks() / ranges_; block < end; ++block) {
      const int64_t first = block * kBlockRows, count = std::min(kBlockRows, p_.pixels() - first);
      mask(first, count, w, sum_du_ + range * p_.out_channels);
      center(first, count, w);
      const int64_t next = block + 1 < end ? std::min(kBlockRows, p_.pixels() - first - count) : 0;
      if (b_.d_inputs) multiply(first, count, next, w);
      correlate(count, first + count, next, w, sums);
    }
  }

  // du of a block, and its sums.
  void mask(int64_t first, int64_t count, const Worker& w, double* sum_du) const {
    const int64_t at = first * p_.out_channels, ld = p_.out_channels;
    const C* y = b_.output ? values(b_.output) + at : nullptr;
    C* d_residual = b_.d_residual ? static_cast<C*>(b_.d_residual) + at : nullptr;
    const MaskBlock<C> m{
        values(b_.output_gradient) + at, ld, y, ld, count, p_.out_channels, w.du, ld_du_, d_residual, ld, w.sum_du};
    std::fill(w.sum_du, w.sum_du + p_.out_channels, C(0));
    k_.mask[static_cast<int>(p_.activation)](m);
    for (int64_t c = 0; c < p_.out_channels; ++c) sum_du[c] += w.sum_du[c];
  }

  // G += x du'. Asks for the next block's dy, and for its y.
  void correlate(int64_t count, int64_t next, int64_t next_rows, const Worker& w, C* sums) const {
    LinesAhead<C> lines;
    lines.add(values(b_.output_gradient) + next * p_.out_channels, b_.d_inputs ? 0 : next_rows * p_.out_channels);
    if (b_.output) lines.add(values(b_.output) + next * p_.out_channels, next_rows * p_.out_channels);
    add_product(correlation_, {w.x, ld_x_, p_.in_channels, w.du, ld_du_, p_.out_channels, count, sums, ld_du_}, &lines);
  }

  // W slope du, to where d_inputs will be. Asks for the next block's dy.
  void multiply(int64_t first, int64_t count, int64_t next_rows, const Worker& w) const {
    const C* next = values(b_.output_gradient) + (first + count) * p_.out_channels;
    for (int64_t index = 0; index < panels(); ++index) {
      const ColumnPanel panel = column_panel(k_, p_.in_channels, index);
      GatheredRows<C> in{w.du_rows, kBlockRows, count, 1, p_.out_channels, 0};
      share_lines<C>(next, nullptr, next_rows * p_.out_channels, {index, panels()},
                     ceil_div(count * panel.width, k_.outer_rows * k_.panel) * p_.out_channels, &in);
      const Tile<C> tile{w.tile, panel.width, first, count, panel.column, panel.cols, 0, 0};
      const bool direct = d_inputs_.direct();
      k_.gemm(in, {transposed_ + panel.column * p_.out_channels, panel.width},
              direct ? sums_to(k_, d_inputs_, tile) : GemmOutput<C>{w.tile});
      if (!direct) d_inputs_.write(first, count, panel.column, panel.cols, {w.tile, panel.width});
    }
    k_.end_streaming();
  }

  // For a chunk of channels: G of the centered inputs, the gradients of the vectors, the constants of dz.
  void finish(int64_t begin) const {
    const int64_t end = std::min(begin + kChannelChunk, p_.out_channels);
    double w_g[kChannelChunk] = {}, d_beta[kChannelChunk] = {};
    for (int64_t range = 0; range < ranges_; ++range)
      for (int64_t k = begin; k < end; ++k) d_beta[k - begin] += sum_du_[range * p_.out_channels + k];
    for (int64_t c = 0; c < p_.in_channels; ++c) {
      C* g = sums_ + c * ld_du_;
      for (int64_t k = begin; k < end; ++k) {
        g[k] = static_cast<C>(g[k] - saved_.mean_rest()[c] * d_beta[k - begin]);
        w_g[k - begin] += static_cast<double>(values(b_.filters)[c * p_.out_channels + k]) * g[k];
      }
    }
    for (int64_t k = begin; k < end; ++k)
      channels_.finish(k, d_beta[k - begin], w_g[k - begin] * values(b_.inv_std)[k], 0);
  }

  // G slope + S W curve + m sum dz; of sum dz all but what the moving mean adds cancels.
  void filters_gradient(ParallelFor* parallel) const {
    product_.run(
        saved_, product_scratch_, parallel,
        [this](int64_t column, int64_t count, int64_t first, int64_t rows, const double* s_w, const double*, int) {
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = column; k < column + count; ++k) {
              const int64_t c = first + r;
              const double sum_dz = (1 - p_.momentum) * values(b_.moving_mean_gradient)[k];
              set(b_.d_filters, c * p_.out_channels + k,
                  static_cast<double>(channels_.slope()[k]) * sums_[c * ld_du_ + k] +
                      channels_.curve()[k] * s_w[r * product_.panel() + k - column] + saved_.mean()[c] * sum_dz);
            }
        });
  }

  // The filters transposed, for a panel of input channels, times the slope if that is wanted.
  void transpose(int64_t index, const C* slope) const {
    const ColumnPanel panel = column_panel(k_, p_.in_channels, index);
    C* to = transposed_ + panel.column * p_.out_channels;
    k_.transpose(values(b_.filters) + panel.column * p_.out_channels, p_.out_channels, panel.cols, p_.out_channels, to,
                 panel.width);
    if (!slope) return;
    for (int64_t k = 0; k < p_.out_channels; ++k)
      for (int64_t c = 0; c < panel.width; ++c) to[k * panel.width + c] *= slope[k];
  }

  void prepare_inputs_gradient(ParallelFor* parallel) const {
    parallel->run(panels(), [&](int64_t panel, int) { transpose(panel, channels_.scale()); });
    if (p_.stride_height * p_.stride_width > 1) clear_inputs_gradient(parallel);
  }

  // W curve W' x + W offset added to what run_range() left.
  void complete_inputs_gradient(ParallelFor* parallel) const {
    scale_filters();
    std::fill_n(zeros_, k_.gemm_columns, C(0));
    std::fill_n(ones_, k_.gemm_columns, C(1));
    for (const Worker& w : workers_)
      for (int64_t r = 0; r < kBlockRows; ++r) w.x_rows[r] = w.x + r * ld_x_;
    parallel->run(panels(), [&](int64_t panel, int) { pack_square(panel); });
    parallel->run(blocks(), [&](int64_t block, int worker) { add_square(block * kBlockRows, workers_[worker]); });
  }

  // W curve, and offset as one more row.
  void scale_filters() const {
    for (int64_t c = 0; c <= p_.in_channels; ++c) {
      scaled_rows_[c] = scaled_ + c * ld_du_;
      for (int64_t k = 0; k < p_.out_channels; ++k)
        scaled_[c * ld_du_ + k] = c < p_.in_channels
                                      ? values(b_.filters)[c * p_.out_channels + k] * channels_.curve()[k]
                                      : channels_.offset()[k];
    }
  }

  // [W curve W' W offset]' for a panel of input channels.
  void pack_square(int64_t index) const {
    const ColumnPanel panel = column_panel(k_, p_.in_channels, index);
    transpose(index, nullptr);
    k_.gemm({scaled_rows_, p_.in_channels + 1, p_.in_channels + 1, 1, p_.out_channels, 0},
            {transposed_ + panel.column * p_.out_channels, panel.width},
            {square_ + panel.column * (p_.in_channels + 1)});
  }

  void clear_inputs_gradient(ParallelFor* parallel) const {
    const int64_t line = p_.in_width * p_.in_channels;
    parallel->run(p_.batch * p_.in_height,
                  [&](int64_t h, int) { std::fill_n(static_cast<C*>(b_.d_inputs) + h * line, line, C(0)); });
  }

  // Of one block.
  void add_square(int64_t first, const Worker& w) const {
    const int64_t count = std::min(kBlockRows, p_.pixels() - first);
    center(first, count, w);
    for (int64_t index = 0; index < panels(); ++index) {
      const ColumnPanel panel = column_panel(k_, p_.in_channels, index);
      const C* square = square_ + panel.column * (p_.in_channels + 1);
      const Block<C> part = d_inputs_.read(first, count, panel.column, panel.cols, w.part);
      AffineBlock<C> add{};  // to the part that is there, in its place
      add.residual = add.y = part.data, add.ld_residual = add.ld_y = part.ld;
      add.cols = panel.cols, add.mean = zeros_, add.scale = ones_, add.beta = square + p_.in_channels * panel.width;
      k_.gemm({w.x_rows, kBlockRows, count, 1, p_.in_channels, 0}, {square, panel.width},
              {w.tile, false, k_.emit[static_cast<int>(Activation::kNone)], add});
      d_inputs_.write(first, count, panel.column, panel.cols, part);
    }
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  SavedMoments<C> saved_;
  WindowReader<C> reader_;
  Image<C> d_inputs_;
  Arena arena_;
  ChannelGradients<C> channels_;
  MomentsTimesFilters<C> product_;
  const ProductKernel<C>& correlation_;
  int64_t ld_du_, ld_x_, ranges_;
  C* sums_;           // [ranges][rows][ld_du]: G
  double* sum_du_;    // [ranges][K]
  C* transposed_;     // [panels][K][width]
  C* square_;         // [panels][C + 1][width]
  C* scaled_;         // [C + 1][ld_du]
  C *zeros_, *ones_;  // [gemm_columns]
  const C** scaled_rows_;
  typename MomentsTimesFilters<C>::Scratch product_scratch_;
  std::vector<Worker> workers_;
};

// Without pixels nothing was learned, and only the moving statistics passed through.
void no_gradients(const ConvBnParams& p, const BackwardBuffers& b, size_t element_bytes) {
  const size_t vector = static_cast<size_t>(p.out_channels) * element_bytes;
  for (void* zero : {b.d_gamma, b.d_beta}) std::memset(zero, 0, vector);
  std::memcpy(b.d_moving_mean, b.moving_mean_gradient, vector);
  std::memcpy(b.d_moving_variance, b.moving_variance_gradient, vector);
  if (b.d_filters) std::memset(b.d_filters, 0, vector * static_cast<size_t>(p.in_channels));
  const size_t inputs = static_cast<size_t>(p.batch * p.in_height * p.in_width * p.in_channels);
  if (b.d_inputs) std::memset(b.d_inputs, 0, inputs * element_bytes);
}

}  // namespace

size_t backward_moments_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    return BackwardByMoments<decltype(c)>(set, p, device, {}, nullptr, nullptr).scratch_bytes();
  });
}

Status run_backward_moments(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) {
    using C = decltype(c);
    if (call.params.pixels() == 0) return no_gradients(call.params, *call.backward, sizeof(C));
    BackwardByMoments<C>(set, call.params, call.device, *call.backward, call.conv_out, call.scratch).run(call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
