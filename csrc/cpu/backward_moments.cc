// All of backward for a 1x1 convolution whose forward saved the second moments of its inputs (second_moments.h).
//
// With x the inputs less their mean m, S = sum x x', du = dy activation'(u) and G = sum x du', all sums over pixels:
//   d_beta = sum du, d_gamma = inv diag(W' G), since z - mean(z) = W' x; x is less the rounded m, which G makes up for
//   dz = slope du + curve W' x + offset  (the constants of channel_gradients.h)
//   d_filters = G slope + S W curve + m (sum dz)', and sum dz is known without summing
//   d_inputs = W dz = [du x 1] [W slope; W curve W'; W offset]'
// Pass 1 reads dy, y and the inputs for G. Pass 2 reads them again for d_inputs: one product a block. Neither z nor its
// gradient is ever in memory, and nothing adds up to a difference of large sums.
#include <algorithm>
#include <cstring>
#include <vector>

#include "channel_gradients.h"
#include "compute_type.h"
#include "convolve.h"
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
        ld_du_(padded_columns(k_, p.out_channels)),
        ld_x_(padded_columns(k_, p.in_channels)),
        ld_joined_(padded_columns(k_, depth())) {
    ranges_ = std::clamp<int64_t>(std::min(blocks() / kMinBlocks, kMaxSums / sum_elements()), 1, kMaxRanges);
    carve(device.threads);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void run(ParallelFor* parallel) const {
    channels_.prepare();
    parallel->run(ranges_, [&](int64_t range, int worker) { correlate(range, workers_[worker]); });
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [&](int64_t chunk, int) { finish(chunk * kChannelChunk); });
    if (b_.d_filters) filters_gradient(parallel);
    if (b_.d_inputs) inputs_gradient(parallel);
  }

 private:
  static constexpr int64_t kMinBlocks = 4, kMaxRanges = 16;
  static constexpr int64_t kMaxSums = 4 << 20;  // elements of all ranges' sums, beyond one range's

  struct Worker {
    typename WindowReader<C>::Scratch reader;
    C *du, *x;       // [kBlockRows][ld]
    C* sum_du;       // [K]: of a block
    C* joined;       // [kBlockRows][ld_joined]: du, x and 1
    const C** rows;  // [kBlockRows]: of joined
    C* tile;         // [kBlockRows][panel]
  };

  // The pixels of the inputs that a strided convolution reads.
  static Grid strided_grid(const ConvBnParams& p) {
    Grid grid = input_grid(p);
    grid.height = p.out_height, grid.width = p.out_width;
    grid.line_stride *= p.stride_height, grid.pixel_stride *= p.stride_width;
    return grid;
  }

  int64_t depth() const { return p_.out_channels + p_.in_channels + 1; }
  int64_t blocks() const { return ceil_div(p_.pixels(), kBlockRows); }
  int64_t sum_elements() const { return ceil_div(p_.in_channels, k_.outer_rows) * k_.outer_rows * ld_du_; }
  int64_t panels() const { return ceil_div(p_.in_channels, k_.panel); }
  static const C* values(const void* array) { return static_cast<const C*>(array); }
  static void set(void* array, int64_t c, double value) { static_cast<C*>(array)[c] = static_cast<C>(value); }

  void carve(int workers) {
    Arena& arena = arena_;
    sums_ = arena.take<C>(ranges_ * sum_elements());
    sum_du_ = arena.take<double>(ranges_ * p_.out_channels);
    packed_ = arena.take<C>(panels() * depth() * k_.panel);
    scaled_ = arena.take<C>((p_.in_channels + 1) * ld_du_);
    scaled_rows_ = arena.take<const C*>(p_.in_channels + 1);
    product_scratch_ = product_.carve(&arena, workers);
    for (int w = 0; w < workers; ++w)
      workers_.push_back({reader_.carve(&arena, nullptr), arena.take<C>(kBlockRows * ld_du_),
                          arena.take<C>(kBlockRows * ld_x_), arena.take<C>(p_.out_channels),
                          arena.take<C>(kBlockRows * ld_joined_), arena.take<const C*>(kBlockRows),
                          arena.take<C>(kBlockRows * k_.panel)});
  }

  // du of a block, from dy and y; x of a block.
  MaskBlock<C> masked(int64_t first, int64_t count, C* du, int64_t ld) const {
    const int64_t at = first * p_.out_channels;
    const C* y = b_.output ? values(b_.output) + at : nullptr;
    return {values(b_.output_gradient) + at,
            p_.out_channels,
            y,
            p_.out_channels,
            count,
            p_.out_channels,
            du,
            ld,
            nullptr,
            p_.out_channels,
            nullptr};
  }
  void center(int64_t first, int64_t count, const Worker& w, C* x, int64_t ld) const {
    reader_.point(first, count, w.reader);
    k_.center_rows({w.reader.rows, kBlockRows, count, 1, p_.in_channels, 0}, saved_.mean(), x, ld);
  }

  // G and the sums of du over one range of blocks, and d_residual = du.
  void correlate(int64_t range, const Worker& w) const {
    C* sums = sums_ + range * sum_elements();
    double* sum_du = sum_du_ + range * p_.out_channels;
    std::fill(sums, sums + sum_elements(), C(0));
    std::fill(sum_du, sum_du + p_.out_channels, 0.0);
    std::fill(w.du, w.du + kBlockRows * ld_du_, C(0));  // the columns beyond K and C stay 0
    std::fill(w.x, w.x + kBlockRows * ld_x_, C(0));
    for (int64_t block = range * blocks() / ranges_; block < (range + 1) * blocks() / ranges_; ++block) {
      const int64_t first = block * kBlockRows, count = std::min(kBlockRows, p_.pixels() - first);
      MaskBlock<C> m = masked(first, count, w.du, ld_du_);
      if (b_.d_residual) m.d_residual = static_cast<C*>(b_.d_residual) + first * p_.out_channels;
      m.sum = w.sum_du;
      std::fill(w.sum_du, w.sum_du + p_.out_channels, C(0));
      k_.mask[static_cast<int>(p_.activation)](m);
      for (int64_t c = 0; c < p_.out_channels; ++c) sum_du[c] += w.sum_du[c];
      center(first, count, w, w.x, ld_x_);
      for (int64_t column = 0; column < p_.out_channels; column += k_.panel)
        for (int64_t row = 0; row < p_.in_channels; row += k_.outer_rows)
          k_.product(w.x + row, ld_x_, w.du + column, ld_du_, count, sums + row * ld_du_ + column, ld_du_, nullptr);
    }
  }

  // For a chunk of channels: G of all ranges, the gradients of the vectors, the constants of dz.
  void finish(int64_t begin) const {
    const int64_t end = std::min(begin + kChannelChunk, p_.out_channels);
    double w_g[kChannelChunk] = {}, d_beta[kChannelChunk] = {};
    for (int64_t range = 0; range < ranges_; ++range)
      for (int64_t k = begin; k < end; ++k) d_beta[k - begin] += sum_du_[range * p_.out_channels + k];
    for (int64_t c = 0; c < p_.in_channels; ++c) {
      C* g = sums_ + c * ld_du_;
      for (int64_t range = 1; range < ranges_; ++range)
        for (int64_t k = begin; k < end; ++k) g[k] += g[range * sum_elements() + k];
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

  void inputs_gradient(ParallelFor* parallel) const {
    scale_filters();
    parallel->run(panels(), [&](int64_t panel, int) { pack(panel * k_.panel, packed_ + panel * depth() * k_.panel); });
    if (p_.stride_height * p_.stride_width > 1) clear_inputs_gradient(parallel);
    parallel->run(blocks(), [&](int64_t block, int worker) { multiply(block * kBlockRows, workers_[worker]); });
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

  // [W slope; W curve W'; W offset]' for a panel of input channels.
  void pack(int64_t column, C* packed) const {
    const int64_t cols = std::min(k_.panel, p_.in_channels - column), rows = p_.out_channels;
    if (cols < k_.panel) std::fill(packed, packed + rows * k_.panel, C(0));
    storage_.kernels.load(values(b_.filters) + column * rows, 1, rows, rows, cols, packed, k_.panel);
    k_.gemm({scaled_rows_, p_.in_channels + 1, p_.in_channels + 1, 1, rows, 0}, packed, k_.panel,
            {packed + rows * k_.panel});
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t c = 0; c < k_.panel; ++c) packed[k * k_.panel + c] *= channels_.slope()[k];
  }

  void clear_inputs_gradient(ParallelFor* parallel) const {
    const int64_t line = p_.in_width * p_.in_channels;
    parallel->run(p_.batch * p_.in_height,
                  [&](int64_t h, int) { std::fill_n(static_cast<C*>(b_.d_inputs) + h * line, line, C(0)); });
  }

  // d_inputs of one block.
  void multiply(int64_t first, const Worker& w) const {
    const int64_t count = std::min(kBlockRows, p_.pixels() - first);
    MaskBlock<C> m = masked(first, count, w.joined, ld_joined_);
    if (b_.d_residual) m.dy = values(b_.d_residual) + first * p_.out_channels;  // du already
    k_.mask[static_cast<int>(b_.d_residual ? Activation::kNone : p_.activation)](m);
    center(first, count, w, w.joined + p_.out_channels, ld_joined_);
    for (int64_t r = 0; r < count; ++r) {
      w.joined[r * ld_joined_ + depth() - 1] = 1;
      w.rows[r] = w.joined + r * ld_joined_;
    }
    for (int64_t panel = 0; panel < panels(); ++panel) {
      k_.gemm({w.rows, kBlockRows, count, 1, depth(), 0}, packed_ + panel * depth() * k_.panel, k_.panel, {w.tile});
      const int64_t column = panel * k_.panel;
      d_inputs_.write(first, count, column, std::min(k_.panel, p_.in_channels - column), {w.tile, k_.panel});
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
  int64_t ld_du_, ld_x_, ld_joined_, ranges_;
  C* sums_;         // [ranges][rows][ld_du]: G
  double* sum_du_;  // [ranges][K]
  C* packed_;       // [panels][depth][panel]
  C* scaled_;       // [C + 1][ld_du]
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
