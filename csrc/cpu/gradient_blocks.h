// What backward reads of each output pixel, block by block, and the first pass over it: the sums of ChannelGradients.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "channel_gradients.h"
#include "compute_type.h"
#include "image.h"

namespace fusedconvbn {

inline Preactivation preactivation(const ConvBnParams& p) {
  if (needs_output(p)) return Preactivation::kOutput;
  return needs_residual(p) ? Preactivation::kConvAndResidual : Preactivation::kConv;
}

template <class C>
class GradientBlocks {
 public:
  static constexpr int64_t kRows = 256;    // pixels of a block whose sums are kept apart
  static constexpr int64_t kColumns = 64;  // of a block in scratch: 64 KiB in float32

  static int64_t blocks(const ConvBnParams& p) { return ceil_div(p.pixels(), kRows); }

  // `sum_blocks`: blocks(p), or however many reduce_block() will see. in_place: the caller has 16-bit numbers worked on
  // where they lie, if they lie in rows; then it sets no z of its own.
  GradientBlocks(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers, const Image<C>& z,
                 int64_t sum_blocks, int workers, Arena* arena, bool in_place = false)
      : p_(p),
        k_(compute_kernels<C>(set)),
        dy_(image(set, buffers.output_gradient)),
        z_(z),
        extra_(image(set, needs_output(p)     ? buffers.output
                          : needs_residual(p) ? buffers.residual
                                              : nullptr)),
        d_residual_(image(set, buffers.d_residual)),
        in_place_(in_place && dy_.in_place() && z_.in_place()),
        rounded_(has_rounded_conv_out(p) && dy_.direct()),
        channels_(p, buffers, sum_blocks, arena) {
    for (int w = 0; w < workers; ++w) scratch_.push_back(arena->take<C>(in_place_ ? 0 : 4 * kRows * kColumns));
  }

  const ChannelGradients<C>& channels() const { return channels_; }
  bool any_size() const { return dy_.direct() || in_place_; }  // of what read() takes

  // The first pass.
  void reduce(ParallelFor* parallel) const {
    channels_.prepare();
    for_each(parallel, [this](GradientBlock<C> g, int64_t first, int64_t channel, int) {
      reduce_block(g, first / kRows, channel);
    });
    channels_.finish(parallel);
  }

  // Its part for one block; what reduce() is made of.
  void reduce_block(GradientBlock<C> g, int64_t block, int64_t channel) const {
    channels_.start_sums(block, channel, &g);
    kernel(in_place_ ? dy_.in_place_kernels().reduce : rounded_ ? k_.reduce_rounded : k_.reduce)(g);
  }

  // Calls f for each block of pixels and chunk of channels, with everything read that u and du need.
  template <class F>
  void for_each(ParallelFor* parallel, F f) const {
    const int64_t width = any_size() ? p_.out_channels : kColumns, chunks = ceil_div(p_.out_channels, width);
    parallel->run(blocks(p_) * chunks, [&](int64_t task, int worker) {
      const int64_t first = task / chunks * kRows, channel = task % chunks * width;
      const int64_t rows = std::min(kRows, p_.pixels() - first), cols = std::min(width, p_.out_channels - channel);
      f(read(first, rows, channel, cols, worker), first, channel, worker);
    });
  }

  // A block of at most kRows pixels and kColumns channels, or of any size where images are read in place. Without an
  // image of z the caller sets it.
  GradientBlock<C> read(int64_t first, int64_t rows, int64_t channel, int64_t cols, int worker) const {
    GradientBlock<C> g{};
    const auto read = [&](const Image<C>& image, int slot, const void** data, int64_t* ld) {
      if (!image.present()) return;
      if (in_place_ || (rounded_ && &image == &z_)) {
        *data = image.address(first, channel), *ld = image.ld();
      } else {
        const Block<C> block = image.read(first, rows, channel, cols, buffer(worker, slot));
        *data = block.data, *ld = block.ld;
      }
    };
    read(dy_, 0, &g.dy, &g.ld_dy);
    read(z_, 1, &g.z, &g.ld_z);
    read(extra_, 2, &g.extra, &g.ld_extra);
    g.rows = rows, g.cols = cols;
    channels_.set_affine(channel, &g);
    return g;
  }

  // dz of a block from read() into `d_conv`; and the gradient of the residual, for the one caller that owns the block.
  void apply(GradientBlock<C> g, int64_t first, int64_t channel, const Block<C>& d_conv, int worker,
             bool owned = true) const {
    if (in_place_)
      return apply_in_place(dy_.in_place_kernels().apply, g, first, channel, d_conv.data, d_conv.ld, owned);
    const bool writes = owned && d_residual_.present();
    const Block<C> d_residual = d_residual_.target(first, channel, {buffer(worker, 3), g.cols});
    channels_.set_constants(channel, &g);
    g.d_conv = d_conv.data, g.ld_d_conv = d_conv.ld;
    if (writes) g.d_residual = d_residual.data, g.ld_d_residual = d_residual.ld;
    kernel(rounded_ ? k_.apply_rounded : k_.apply)(g);
    if (writes) d_residual_.write(first, g.rows, channel, g.cols, d_residual);
  }

  // The same where 16-bit numbers lie in rows, into whatever `table` makes.
  template <class Table>
  void apply_in_place(const Table& table, GradientBlock<C> g, int64_t first, int64_t channel, void* d_conv,
                      int64_t ld_d_conv, bool owned = true) const {
    channels_.set_constants(channel, &g);
    g.d_conv = d_conv, g.ld_d_conv = ld_d_conv;
    if (owned && d_residual_.present()) {
      g.d_residual = d_residual_.address(first, channel), g.ld_d_residual = d_residual_.ld();
      g.stream = d_residual_.streams(channel, g.cols);
    }
    kernel(table)(g);
  }

 private:
  Image<C> image(const KernelSet& set, const void* data) const {
    return Image<C>(data, storage_of<C>(set, p_.dtype), output_grid(p_));
  }

  template <class Table>
  auto kernel(const Table& table) const {
    return table[static_cast<int>(p_.activation)][static_cast<int>(preactivation(p_))];
  }

  C* buffer(int worker, int slot) const { return scratch_[worker] + slot * kRows * kColumns; }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  Image<C> dy_, z_, extra_, d_residual_;
  bool in_place_;  // 16-bit numbers that are worked on where they lie
  bool rounded_;   // z is, though the others are of the compute type
  ChannelGradients<C> channels_;
  std::vector<C*> scratch_;  // a worker's 4 blocks [kRows][kColumns]
};

}  // namespace fusedconvbn
