// The forward pass of a convolution by any algorithm, and what of it training and inference have in common.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "compute_type.h"
#include "convolve.h"
#include "statistics.h"

namespace fusedconvbn {

// Conv: Convolution, Winograd2, Winograd4, FewChannelsConvolution or DepthwiseConvolution.
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
        rounded_(
            saved_image<C>(set, p, Saved::kBFloat16, asked_for(p) == Saved::kBFloat16 ? buffers.conv_out : nullptr)),
        output_(buffers.output, storage_, output_grid(p), p.training ? kLeftInCache : kLeftInInference),
        residual_(buffers.residual, storage_, output_grid(p)),
        convolution_(k_, storage_, Image<C>(buffers.inputs, storage_, input_grid(p)), forward_windows(p),
                     {p.groups, p.group_in(), p.group_out(), !keeps_filters(p), keeps_filters(p)}) {
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
  size_t packed_bytes() const { return static_cast<size_t>(convolution_.packed_elements()) * sizeof(C); }

  void pack(void* packed, ParallelFor* parallel) const {
    convolution_.pack(filters(), convolution_scratch_, static_cast<C*>(packed), parallel);
  }

  void infer(ParallelFor* parallel) const {
    keep_moving_statistics();
    convolve_and_normalize(parallel);
  }

  // Training with statistics that are known before the convolution: mean and sum of squared deviations, [K] each.
  void train_with(const double* mean, const double* squares, ParallelFor* parallel) const {
    for (int64_t c = 0; c < p_.out_channels; ++c) learn(c, mean[c], squares[c]);
    convolve_and_normalize(parallel);
  }

  // Without pixels there is nothing to learn: the moving statistics stay.
  void train(ParallelFor* parallel) const {
    if (p_.pixels() == 0) return keep_moving_statistics();
    const auto measure = [this](const Tile<C>& t) {
      const int64_t at = t.block * p_.out_channels + t.channel;
      k_.moments(t.data, t.ld, t.rows, t.cols, moments_.from(at));
    };
    convolve(parallel, {[this](const Tile<C>& t) { save(t); }, measure, sums_to_conv_out()});
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [&](int64_t chunk, int) { learn(chunk * kChannelChunk); });
    normalize_all(parallel);
  }

  void recompute(ParallelFor* parallel) const {
    convolve(parallel, {[this](const Tile<C>& t) {
                          if (p_.training) round(t);
                          conv_out_.write(t.first, t.rows, t.channel, t.cols, {t.data, t.ld});
                        },
                        nullptr, storage_.is_compute_type ? sums_to_conv_out() : nullptr});
  }

 private:
  static bool keeps_filters(const ConvBnParams& p) { return p.keeps_filters && !p.training; }

  using RowByRow = std::function<GemmOutput<C>(const Tile<C>&)>;

  RowByRow sums_to_conv_out() const {
    if (!conv_out_.direct()) return nullptr;
    return [this](const Tile<C>& t) { return sums_to(k_, conv_out_, t); };
  }

  void convolve_and_normalize(ParallelFor* parallel) const {
    TileEpilogue<C> epilogue{[this](const Tile<C>& t) { normalize({t.data, t.ld}, t); }, nullptr};
    if (output_.direct()) {
      epilogue.row_by_row = [this](const Tile<C>& t) {
        GemmOutput<C> to{t.data, false, k_.emit[static_cast<int>(p_.activation)], affine_block({t.data, t.ld}, t)};
        set_clamp(&to);
        return to;
      };
    }
    if (output_.takes_tiles())
      epilogue.in_place = [this](const Tile<C>& t) {
        GemmOutput<C> to{t.data, false, in_place_of_tile(), in_place_block(t.data, t.ld, t)};
        set_clamp(&to);
        to.activation = static_cast<int>(p_.activation), to.rows = storage_.row_type;
        return to;
      };
    if (residual_.present() && residual_.rows()) epilogue.reads = rows_of(residual_);
    const bool many = p_.group_out() > p_.group_in() && output_.memory() != residual_.memory();
    if (k_.fetches_results && many && output_.rows() && !output_.streams(0, std::min(k_.gemm_columns, p_.group_out())))
      epilogue.writes = rows_of(output_);
    convolve(parallel, epilogue);
  }

  static RowsAhead rows_of(const Image<C>& image) { return {image.memory(), image.ld() * image.element_bytes()}; }

  void set_clamp(GemmOutput<C>* to) const {
    constexpr C kInfinity = std::numeric_limits<C>::infinity();
    const bool none = p_.activation == Activation::kNone, six = p_.activation == Activation::kRelu6;
    to->clamps = (none || six || p_.activation == Activation::kRelu) && (!residual_.present() || k_.clamps_residual);
    to->low = none ? -kInfinity : C(0), to->high = six ? C(6) : kInfinity;
  }

  // Of a block in scratch.
  int64_t columns() const { return std::max(kChannelChunk, k_.gemm_columns); }

  FilterLayout filters() const {
    FilterLayout filters{b_.filters, {}, p_.group_out(), p_.out_channels, 1, b_.packed_filters};
    for (int64_t t = 0; t < p_.taps(); ++t) filters.tap_offset.push_back(t * p_.group_in() * p_.out_channels);
    return filters;
  }

  void convolve(ParallelFor* parallel, const TileEpilogue<C>& epilogue) const {
    convolution_.run(filters(), convolution_scratch_, parallel, epilogue);
  }

  // The statistics are those of z rounded to the data type, and so is the z that goes with them.
  void round(const Tile<C>& t) const {
    if (storage_.is_compute_type) return;
    void* rounded = z_[t.worker];
    storage_.kernels.store(t.data, t.ld, t.rows, t.cols, rounded, t.cols, 1, false);
    storage_.kernels.load(rounded, t.cols, 1, t.rows, t.cols, t.data, t.ld);
  }

  void keep_moving_statistics() const {
    k_.inverse_deviations(static_cast<const C*>(b_.moving_variance), p_.epsilon, p_.out_channels, scale_);
    copy(scale_, b_.inv_std);
    copy(b_.moving_mean, b_.batch_mean);
    copy(b_.moving_mean, b_.new_moving_mean);
    copy(b_.moving_variance, b_.new_moving_variance);
    for (int64_t c = 0; c < p_.out_channels; ++c) scale_[c] *= static_cast<const C*>(b_.gamma)[c];
  }

  void copy(const void* from, void* to) const {
    if (to) std::memcpy(to, from, static_cast<size_t>(p_.out_channels) * sizeof(C));
  }

  const C* mean() const { return static_cast<const C*>(p_.training ? b_.batch_mean : b_.moving_mean); }

  // The statistics of one chunk of channels.
  void learn(int64_t begin) const {
    double mean[kChannelChunk], squares[kChannelChunk];
    const int64_t end = std::min(begin + kChannelChunk, p_.out_channels);
    merge_moments(
        moments_, convolution_.blocks(), [this](int64_t block) { return convolution_.block_pixels(block); },
        p_.out_channels, begin, end, mean, squares);
    for (int64_t c = begin; c < end; ++c) learn(c, mean[c - begin], squares[c - begin]);
  }

  void learn(int64_t c, double mean, double squares) const {
    const double variance = squares / static_cast<double>(p_.pixels());
    static_cast<C*>(b_.batch_mean)[c] = static_cast<C>(mean);
    static_cast<C*>(b_.inv_std)[c] = static_cast<C>(inverse_deviation(variance, p_.epsilon));
    scale_[c] = static_cast<const C*>(b_.gamma)[c] * static_cast<const C*>(b_.inv_std)[c];
    move(b_.moving_mean, b_.new_moving_mean, c, mean);
    move(b_.moving_variance, b_.new_moving_variance, c, variance * moving_variance_factor(p_));
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
        output_.in_place_kernels().affine[static_cast<int>(p_.activation)](
            in_place_block(conv_out_.address(first, 0), conv_out_.ld(), tile));
      else
        normalize(conv_out_.read(first, rows, channel, cols, z_[worker]), tile);
    });
  }

  // output = activation((z - mean) * scale + beta + residual), computed in the tile where it cannot be in place.
  void normalize(const Block<C>& z, const Tile<C>& t) const {
    if (output_.in_place()) {
      const AffineBlock<C> block = in_place_block(z.data, z.ld, t);
      in_place_of_tile()(block);
      if (block.stream) k_.end_streaming();
      return;
    }
    const AffineBlock<C> block = affine_block(z, t);
    k_.affine[static_cast<int>(p_.activation)](block);
    output_.write(t.first, t.rows, t.channel, t.cols, {static_cast<C*>(block.y), block.ld_y});
  }

  AffineBlock<C> affine_block(const Block<C>& z, const Tile<C>& t) const {
    Block<C> extra{nullptr, 0};
    if (residual_.present()) extra = residual_.read(t.first, t.rows, t.channel, t.cols, extra_[t.worker]);
    const Block<C> y = output_.target(t.first, t.channel, {t.data, t.ld});
    const C* beta = static_cast<const C*>(b_.beta) + t.channel;
    const bool stream = z.data != y.data && output_.streams(t.channel, t.cols);  // what was just read is in cache
    AffineBlock<C> block{z.data, z.ld,   extra.data,         extra.ld,           y.data, y.ld,
                         t.rows, t.cols, mean() + t.channel, scale_ + t.channel, beta,   stream};
    if (rounded_.present()) {
      block.rounded = reinterpret_cast<uint16_t*>(rounded_.address(t.first, t.channel));
      block.ld_rounded = rounded_.ld();
    }
    return block;
  }

  // The same where 16-bit numbers lie in rows.
  AffineBlock<C> in_place_block(const void* z, int64_t ld_z, const Tile<C>& t) const {
    const void* residual = residual_.present() ? residual_.address(t.first, t.channel) : nullptr;
    return {z,
            ld_z,
            residual,
            residual_.ld(),
            output_.address(t.first, t.channel),
            output_.ld(),
            t.rows,
            t.cols,
            mean() + t.channel,
            scale_ + t.channel,
            static_cast<const C*>(b_.beta) + t.channel,
            output_.streams(t.channel, t.cols)};
  }
  auto in_place_of_tile() const { return output_.in_place_kernels().affine_of_tile[static_cast<int>(p_.activation)]; }

  const ConvBnParams& p_;
  ForwardBuffers b_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  Image<C> conv_out_, rounded_, output_, residual_;
  Conv<C> convolution_;
  C* scale_;
  BlockMoments<C> moments_{};
  std::vector<C*> z_, extra_;  // a worker's [kBlockRows][columns()]
  typename Conv<C>::Scratch convolution_scratch_;
  size_t scratch_bytes_;
};

}  // namespace fusedconvbn
