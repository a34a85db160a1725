// The reduce stage: the gradients of everything but inputs and filters, and the gradient of z.
//
// Two passes over (dy, z). With du = dy activation'(u), n pixels, inv = inv_std and sums over a channel:
//   d_beta = sum du, d_gamma = inv sum du (z - mean)
//   training:  dz = gamma inv (du - d_beta / n - (z - mean) inv d_gamma / n) + what the returned statistics add
//   inference: dz = gamma inv du
// which is dz = slope du + curve (z - mean) + offset, a few constants a channel.
//
// The saved mean is rounded: sum (z - mean) is not quite 0, sum dz would not be either, and under a large mean of the
// inputs that is an error of d_filters, many times larger. So that sum is taken too, and the mean corrected by it.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "image.h"
#include "stages.h"
#include "statistics.h"

namespace fusedconvbn {
namespace {

// Pixels of a block whose sums are kept apart, in the compute type; the blocks are added in their order, in double.
constexpr int64_t kSumRows = 256;
constexpr int64_t kColumns = 64;  // of a block in scratch: 64 KiB in float32

Preactivation preactivation(const ConvBnParams& p) {
  if (needs_output(p)) return Preactivation::kOutput;
  return needs_residual(p) ? Preactivation::kConvAndResidual : Preactivation::kConv;
}

template <class C>
class Reduce {
 public:
  Reduce(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& buffers,
         const void* conv_out, void* conv_grad, char* scratch)
      : p_(p),
        b_(buffers),
        k_(compute_kernels<C>(set)),
        dy_(image(set, buffers.output_gradient)),
        z_(p.training && p.saved == Saved::kConv ? image(set, conv_out) : conv_grad_image<C>(set, p, conv_out)),
        extra_(image(set, needs_output(p)     ? buffers.output
                          : needs_residual(p) ? buffers.residual
                                              : nullptr)),
        d_residual_(image(set, buffers.d_residual)),
        d_conv_(conv_grad_image<C>(set, p, conv_grad)) {
    Arena arena(scratch);
    for (C** array : {&inv_std_, &scale_, &slope_, &curve_, &offset_}) *array = arena.take<C>(p.out_channels);
    for (C** sums : {&sum_du_, &sum_du_z_, &sum_z_}) *sums = arena.take<C>(blocks() * p.out_channels);
    for (int w = 0; w < device.threads; ++w) {
      C* first = arena.take<C>(4 * kSumRows * kColumns);
      scratch_.push_back(first);
    }
    scratch_bytes_ = arena.used();
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  void run(ParallelFor* parallel) {
    prepare();
    for_blocks(parallel, [this](GradientBlock<C> g, int64_t first, int64_t channel, int) {
      const int64_t at = first / kSumRows * p_.out_channels + channel;
      g.sum_du = sum_du_ + at, g.sum_du_z = sum_du_z_ + at, g.sum_z = sum_z_ + at;
      for (C* sums : {g.sum_du, g.sum_du_z, g.sum_z}) std::fill(sums, sums + g.cols, C(0));
      kernel(k_.reduce)(g);
    });
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [&](int64_t chunk, int) { finish(chunk * kChannelChunk); });
    if (b_.d_inputs || b_.d_filters || b_.d_residual) apply(parallel);
  }

 private:
  Image<C> image(const KernelSet& set, const void* data) const {
    return Image<C>(data, storage_of<C>(set, p_.dtype), output_grid(p_));
  }
  int64_t blocks() const { return ceil_div(p_.pixels(), kSumRows); }
  static const C* values(const void* array) { return static_cast<const C*>(array); }
  const C* mean() const { return values(p_.training ? b_.batch_mean : b_.moving_mean); }

  template <class Table>
  auto kernel(const Table& table) const {
    return table[static_cast<int>(p_.activation)][static_cast<int>(preactivation(p_))];
  }

  void prepare() {
    for (int64_t c = 0; c < p_.out_channels; ++c) {
      const double inv_std = p_.training ? static_cast<double>(values(b_.inv_std)[c])
                                         : inverse_deviation(values(b_.moving_variance)[c], p_.epsilon);
      inv_std_[c] = static_cast<C>(inv_std);
      scale_[c] = values(b_.gamma)[c] * inv_std_[c];
    }
  }

  // Calls f for each block of pixels and chunk of channels, with everything read that u and du need.
  template <class F>
  void for_blocks(ParallelFor* parallel, F f) const {
    const int64_t width = dy_.direct() ? p_.out_channels : kColumns, chunks = ceil_div(p_.out_channels, width);
    parallel->run(blocks() * chunks, [&](int64_t task, int worker) {
      const int64_t first = task / chunks * kSumRows, channel = task % chunks * width;
      const int64_t rows = std::min(kSumRows, p_.pixels() - first), cols = std::min(width, p_.out_channels - channel);
      const auto read = [&](const Image<C>& image, int slot) {
        return image.present() ? image.read(first, rows, channel, cols, buffer(worker, slot)) : Block<C>{nullptr, 0};
      };
      const Block<C> dy = read(dy_, 0), z = read(z_, 1), extra = read(extra_, 2);
      GradientBlock<C> g{};
      g.dy = dy.data, g.ld_dy = dy.ld, g.z = z.data, g.ld_z = z.ld, g.extra = extra.data, g.ld_extra = extra.ld;
      g.rows = rows, g.cols = cols;
      g.mean = mean() + channel, g.scale = scale_ + channel, g.beta = values(b_.beta) + channel;
      f(g, first, channel, worker);
    });
  }

  C* buffer(int worker, int slot) const { return scratch_[worker] + slot * kSumRows * kColumns; }

  // The gradients of a chunk of channels and the constants of dz.
  void finish(int64_t begin) {
    const int64_t end = std::min(begin + kChannelChunk, p_.out_channels);
    for (int64_t c = begin; c < end; ++c) {
      const double d_beta = sum(sum_du_, c),
                   mean_error = learns() ? sum(sum_z_, c) / static_cast<double>(p_.pixels()) : 0;
      finish(c, d_beta, (sum(sum_du_z_, c) - mean_error * d_beta) * inv_std_[c], mean_error);
    }
  }

  // Whether the statistics are the batch's.
  bool learns() const { return p_.training && p_.pixels() > 0; }

  double sum(const C* blocks_sums, int64_t c) const {
    double total = 0;
    for (int64_t block = 0; block < blocks(); ++block) total += blocks_sums[block * p_.out_channels + c];
    return total;
  }

  void finish(int64_t c, double d_beta, double d_gamma, double mean_error) {
    set(b_.d_beta, c, d_beta);
    set(b_.d_gamma, c, d_gamma);
    const double g_mean = values(b_.moving_mean_gradient)[c], g_variance = values(b_.moving_variance_gradient)[c];
    const double inv_std = inv_std_[c], slope = values(b_.gamma)[c] * inv_std;
    double curve = 0, offset = 0;
    if (learns()) {
      const double n = static_cast<double>(p_.pixels()), learned = (1 - p_.momentum) / n;
      curve = 2 * learned * moving_variance_factor(p_) * g_variance - slope * inv_std * d_gamma / n;
      offset = learned * g_mean - slope * d_beta / n - curve * mean_error;
      set(b_.d_moving_mean, c, p_.momentum * g_mean);
      set(b_.d_moving_variance, c, p_.momentum * g_variance);
    } else {
      set(b_.d_moving_mean, c, g_mean - slope * d_beta);
      set(b_.d_moving_variance, c, g_variance - 0.5 * slope * inv_std * d_gamma);
    }
    slope_[c] = static_cast<C>(slope);
    curve_[c] = static_cast<C>(curve);
    offset_[c] = static_cast<C>(offset);
  }

  static void set(void* array, int64_t c, double value) { static_cast<C*>(array)[c] = static_cast<C>(value); }

  void apply(ParallelFor* parallel) const {
    for_blocks(parallel, [this](GradientBlock<C> g, int64_t first, int64_t channel, int worker) {
      const Block<C> d_conv = d_conv_.target(first, channel, {});
      const Block<C> d_residual = d_residual_.target(first, channel, {buffer(worker, 3), g.cols});
      g.slope = slope_ + channel;
      if (learns()) g.curve = curve_ + channel, g.offset = offset_ + channel;
      g.d_conv = d_conv.data, g.ld_d_conv = d_conv.ld;
      if (d_residual_.present()) g.d_residual = d_residual.data, g.ld_d_residual = d_residual.ld;
      kernel(k_.apply)(g);
      if (d_residual_.present()) d_residual_.write(first, g.rows, channel, g.cols, d_residual);
    });
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  const ComputeKernels<C>& k_;
  Image<C> dy_, z_, extra_, d_residual_, d_conv_;
  C *inv_std_, *scale_, *slope_, *curve_, *offset_;  // [K]
  C *sum_du_, *sum_du_z_, *sum_z_;                   // [blocks][K]
  std::vector<C*> scratch_;                          // a worker's 4 blocks [kSumRows][kColumns]
  size_t scratch_bytes_;
};

}  // namespace

size_t reduce_direct_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    return Reduce<decltype(c)>(set, p, device, {}, nullptr, nullptr, nullptr).scratch_bytes();
  });
}

Status run_reduce_direct(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) {
    Reduce<decltype(c)>(set, call.params, call.device, *call.backward, call.conv_out, call.conv_grad, call.scratch)
        .run(call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
