// The forward stage.
#include <algorithm>
#include <cstring>
#include <vector>

#include "amx_convolve.h"
#include "compute_type.h"
#include "convolve.h"
#include "stages.h"
#include "statistics.h"
#include "winograd.h"

namespace fusedconvbn {
namespace {

// Conv: Convolution or WinogradConvolution.
template <class C, template <class> class Conv>
class Forward {
 public:
  // With empty buffers and a null scratch it only measures.
  Forward(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const ForwardBuffers& buffers,
          const Image<C>& conv_out, char* scratch)
      : p_(p),
        b_(buffers),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        conv_out_(conv_out),
        output_(buffers.output, storage_, output_grid(p)),
        residual_(buffers.residual, storage_, output_grid(p)),
        convolution_(k_, storage_, Image<C>(buffers.inputs, storage_, input_grid(p)), forward_windows(p), channels(p)) {
    Arena arena(scratch);
    scale_ = arena.take<C>(p.out_channels);
    if (p.training) moments_ = BlockMoments<C>::carve(&arena, convolution_.blocks(), p.out_channels);
    for (int w = 0; w < device.threads; ++w) {
      z_.push_back(arena.take<C>(kBlockRows * columns()));
      extra_.push_back(arena.take<C>(kBlockRows * columns()));
    }
    convolution_scratch_ = convolution_.carve(&arena, device.threads);
    scratch_bytes_ = arena.used();
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  void infer(ParallelFor* parallel) const {
    keep_moving_statistics();
    convolve(parallel, {[this](const Tile<C>& t) { normalize({t.data, t.ld}, t); }, nullptr});
  }

  // Without pixels there is nothing to learn: the moving statistics stay.
  void train(ParallelFor* parallel) const {
    if (p_.pixels() == 0) return keep_moving_statistics();
    const auto measure = [this](const Tile<C>& t) {
      const int64_t at = t.block * p_.out_channels + t.channel;
      k_.moments(t.data, t.ld, t.rows, t.cols, moments_.mean + at, moments_.squares + at);
    };
    convolve(parallel, {[this](const Tile<C>& t) { save(t); }, measure});
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [&](int64_t chunk, int) { learn(chunk * kChannelChunk); });
    normalize_all(parallel);
  }

  void recompute(ParallelFor* parallel) const {
    convolve(
        parallel,
        {[this](const Tile<C>& t) { conv_out_.write(t.first, t.rows, t.channel, t.cols, {t.data, t.ld}); }, nullptr});
  }

 private:
  static Channels channels(const ConvBnParams& p) {
    if (is_depthwise(p)) return {true, 1, p.groups, p.groups};
    return {false, p.groups, p.group_in(), p.group_out()};
  }

  int64_t columns() const { return std::max(kChannelChunk, k_.panel); }  // of a block in scratch

  void convolve(ParallelFor* parallel, const TileEpilogue<C>& epilogue) const {
    FilterLayout filters{b_.filters, {}, p_.group_out(), p_.out_channels, 1};
    for (int64_t t = 0; t < p_.taps(); ++t) filters.tap_offset.push_back(t * p_.group_in() * p_.out_channels);
    convolution_.run(filters, convolution_scratch_, parallel, epilogue);
  }

  void keep_moving_statistics() const {
    const size_t bytes = static_cast<size_t>(p_.out_channels) * sizeof(C);
    std::memcpy(b_.batch_mean, b_.moving_mean, bytes);
    std::memcpy(b_.new_moving_mean, b_.moving_mean, bytes);
    std::memcpy(b_.new_moving_variance, b_.moving_variance, bytes);
    for (int64_t c = 0; c < p_.out_channels; ++c) set_scale(c, static_cast<const C*>(b_.moving_variance)[c]);
  }

  void set_scale(int64_t c, double variance) const {
    const C inv_std = static_cast<C>(inverse_deviation(variance, p_.epsilon));  // as the gradient will read it
    static_cast<C*>(b_.inv_std)[c] = inv_std;
    scale_[c] = static_cast<const C*>(b_.gamma)[c] * inv_std;
  }

  // The statistics of one chunk of channels.
  void learn(int64_t begin) const {
    double mean[kChannelChunk], squares[kChannelChunk];
    const int64_t end = std::min(begin + kChannelChunk, p_.out_channels);
    merge_moments(
        moments_, convolution_.blocks(), [this](int64_t block) { return convolution_.block_pixels(block); },
        p_.out_channels, begin, end, mean, squares);
    for (int64_t c = begin; c < end; ++c) {
      const double variance = squares[c - begin] / static_cast<double>(p_.pixels());
      static_cast<C*>(b_.batch_mean)[c] = static_cast<C>(mean[c - begin]);
      set_scale(c, variance);
      move(b_.moving_mean, b_.new_moving_mean, c, mean[c - begin]);
      move(b_.moving_variance, b_.new_moving_variance, c, variance * moving_variance_factor(p_));
    }
  }

  void move(const void* from, void* to, int64_t c, double value) const {
    const double old = static_cast<const C*>(from)[c];
    static_cast<C*>(to)[c] = static_cast<C>(p_.momentum * old + (1 - p_.momentum) * value);
  }

  // Stores z, and leaves in the tile what was stored: the statistics are of that.
  void save(const Tile<C>& t) const {
    if (conv_out_.in_place())
      return conv_out_.in_place_kernels().round(t.data, t.ld, t.rows, t.cols, conv_out_.address(t.first, t.channel),
                                                conv_out_.ld(), conv_out_.streams(t.channel, t.cols));
    conv_out_.write(t.first, t.rows, t.channel, t.cols, {t.data, t.ld});
    if (conv_out_.rounds()) conv_out_.copy(t.first, t.rows, t.channel, t.cols, {t.data, t.ld});
  }

  // The blocks written last are still in cache and come first.
  void normalize_all(ParallelFor* parallel) const {
    const int64_t width = conv_out_.direct() || conv_out_.in_place() ? p_.out_channels : columns();
    const int64_t chunks = ceil_div(p_.out_channels, width), blocks = ceil_div(p_.pixels(), kBlockRows);
    parallel->run(blocks * chunks, [&](int64_t task, int worker) {
      const int64_t first = (blocks - 1 - task / chunks) * kBlockRows, channel = task % chunks * width;
      const int64_t rows = std::min(kBlockRows, p_.pixels() - first);
      const int64_t cols = std::min(width, p_.out_channels - channel);
      const Tile<C> tile{z_[worker], cols, first, rows, channel, cols, 0, worker};
      if (conv_out_.in_place())
        normalize_in_place(output_.in_place_kernels().affine, conv_out_.address(first, 0), conv_out_.ld(), tile);
      else
        normalize(conv_out_.read(first, rows, channel, cols, z_[worker]), tile);
    });
  }

  // output = activation((z - mean) * scale + beta + residual), computed in the tile where it cannot be in place.
  void normalize(const Block<C>& z, const Tile<C>& t) const {
    if (output_.in_place()) return normalize_in_place(output_.in_place_kernels().affine_of_tile, z.data, z.ld, t);
    Block<C> extra{nullptr, 0};
    if (residual_.present()) extra = residual_.read(t.first, t.rows, t.channel, t.cols, extra_[t.worker]);
    const Block<C> y = output_.target(t.first, t.channel, {t.data, t.ld});
    k_.affine[static_cast<int>(p_.activation)]({z.data, z.ld, extra.data, extra.ld, y.data, y.ld, t.rows, t.cols,
                                                static_cast<const C*>(b_.batch_mean) + t.channel, scale_ + t.channel,
                                                static_cast<const C*>(b_.beta) + t.channel,
                                                output_.streams(t.channel, t.cols)});
    output_.write(t.first, t.rows, t.channel, t.cols, y);
  }

  // The same where 16-bit numbers lie in rows.
  template <class Table>
  void normalize_in_place(const Table& table, const void* z, int64_t ld_z, const Tile<C>& t) const {
    const void* residual = residual_.present() ? residual_.address(t.first, t.channel) : nullptr;
    table[static_cast<int>(p_.activation)](
        {z, ld_z, residual, residual_.ld(), output_.address(t.first, t.channel), output_.ld(), t.rows, t.cols,
         static_cast<const C*>(b_.batch_mean) + t.channel, scale_ + t.channel,
         static_cast<const C*>(b_.beta) + t.channel, output_.streams(t.channel, t.cols)});
  }

  const ConvBnParams& p_;
  ForwardBuffers b_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  Image<C> conv_out_, output_, residual_;
  Conv<C> convolution_;
  C* scale_;
  BlockMoments<C> moments_{};
  std::vector<C*> z_, extra_;  // a worker's [kBlockRows][columns()]
  typename Conv<C>::Scratch convolution_scratch_;
  size_t scratch_bytes_;
};

// In a backward plan the stage recomputes z.
ForwardBuffers forward_buffers(const StageCall& call) {
  if (call.forward) return *call.forward;
  ForwardBuffers buffers;
  buffers.inputs = call.backward->inputs;
  buffers.filters = call.backward->filters;
  return buffers;
}

template <class C>
Image<C> conv_out_image(const KernelSet& set, const StageCall& call) {
  if (call.backward) return conv_grad_image<C>(set, call.params, call.conv_out);
  return Image<C>(call.forward->conv_out, storage_of<C>(set, call.params.dtype), output_grid(call.params));
}

template <template <class> class Conv>
size_t scratch_of(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    return Forward<decltype(c), Conv>(set, p, device, {}, conv_grad_image<decltype(c)>(set, p, nullptr), nullptr)
        .scratch_bytes();
  });
}

template <class C, template <class> class Conv>
void run_as(const KernelSet& set, const StageCall& call) {
  const Forward<C, Conv> forward(set, call.params, call.device, forward_buffers(call), conv_out_image<C>(set, call),
                                 call.scratch);
  if (call.backward)
    forward.recompute(call.parallel);
  else if (call.params.training)
    forward.train(call.parallel);
  else
    forward.infer(call.parallel);
}

template <template <class> class Conv>
Status run_with(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) { run_as<decltype(c), Conv>(set, call); });
  return Status{};
}

}  // namespace

size_t forward_direct_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return scratch_of<Convolution>(set, p, device);
}
size_t forward_winograd2_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return scratch_of<WinogradConvolution>(set, p, device);
}
Status run_forward_direct(const KernelSet& set, const StageCall& call) { return run_with<Convolution>(set, call); }
Status run_forward_winograd2(const KernelSet& set, const StageCall& call) {
  return run_with<WinogradConvolution>(set, call);
}

size_t forward_direct_amx_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return Forward<float, AmxConvolution>(set, p, device, {}, conv_grad_image<float>(set, p, nullptr), nullptr)
      .scratch_bytes();
}
Status run_forward_direct_amx(const KernelSet& set, const StageCall& call) {
  run_as<float, AmxConvolution>(set, call);
  return Status{};
}

}  // namespace fusedconvbn
