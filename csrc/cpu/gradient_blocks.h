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

  GradientBlocks(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers, const Image<C>& z,
                 int workers, Arena* arena)
      : p_(p),
        k_(compute_kernels<C>(set)),
        dy_(image(set, buffers.output_gradient)),
        z_(z),
        extra_(image(set, needs_output(p)     ? buffers.output
                          : needs_residual(p) ? buffers.residual
                                              : nullptr)),
        d_residual_(image(set, buffers.d_residual)),
        channels_(p, buffers, blocks(), arena) {
    for (int w = 0; w < workers; ++w) scratch_.push_back(arena->take<C>(4 * kRows * kColumns));
  }

  const ChannelGradients<C>& channels() const { return channels_; }
  bool has_d_residual() const { return d_residual_.present(); }

  // The first pass.
  void reduce(ParallelFor* parallel) const {
    channels_.prepare();
    for_each(parallel, [this](GradientBlock<C> g, int64_t first, int64_t channel, int) {
      channels_.start_sums(first / kRows, channel, &g);
      kernel(k_.reduce)(g);
    });
    channels_.finish(parallel);
  }

  // Calls f for each block of pixels and chunk of channels, with everything read that u and du need.
  template <class F>
  void for_each(ParallelFor* parallel, F f) const {
    const int64_t width = dy_.direct() ? p_.out_channels : kColumns, chunks = ceil_div(p_.out_channels, width);
    parallel->run(blocks() * chunks, [&](int64_t task, int worker) {
      const int64_t first = task / chunks * kRows, channel = task % chunks * width;
      const int64_t rows = std::min(kRows, p_.pixels() - first), cols = std::min(width, p_.out_channels - channel);
      f(read(first, rows, channel, cols, worker), first, channel, worker);
    });
  }

  // dz of a block from read() into `d_conv`, and the gradient of the residual where it is wanted.
  void apply(GradientBlock<C> g, int64_t first, int64_t channel, const Block<C>& d_conv, int worker) const {
    const Block<C> d_residual = d_residual_.target(first, channel, {buffer(worker, 3), g.cols});
    channels_.set_constants(channel, &g);
    g.d_conv = d_conv.data, g.ld_d_conv = d_conv.ld;
    if (has_d_residual()) g.d_residual = d_residual.data, g.ld_d_residual = d_residual.ld;
    kernel(k_.apply)(g);
    if (has_d_residual()) d_residual_.write(first, g.rows, channel, g.cols, d_residual);
  }

 private:
  Image<C> image(const KernelSet& set, const void* data) const {
    return Image<C>(data, storage_of<C>(set, p_.dtype), output_grid(p_));
  }
  int64_t blocks() const { return ceil_div(p_.pixels(), kRows); }

  template <class Table>
  auto kernel(const Table& table) const {
    return table[static_cast<int>(p_.activation)][static_cast<int>(preactivation(p_))];
  }

  C* buffer(int worker, int slot) const { return scratch_[worker] + slot * kRows * kColumns; }

  GradientBlock<C> read(int64_t first, int64_t rows, int64_t channel, int64_t cols, int worker) const {
    const auto block = [&](const Image<C>& image, int slot) {
      return image.present() ? image.read(first, rows, channel, cols, buffer(worker, slot)) : Block<C>{nullptr, 0};
    };
    const Block<C> dy = block(dy_, 0), z = block(z_, 1), extra = block(extra_, 2);
    GradientBlock<C> g{};
    g.dy = dy.data, g.ld_dy = dy.ld, g.z = z.data, g.ld_z = z.ld, g.extra = extra.data, g.ld_extra = extra.ld;
    g.rows = rows, g.cols = cols;
    channels_.set_affine(channel, &g);
    return g;
  }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  Image<C> dy_, z_, extra_, d_residual_;
  ChannelGradients<C> channels_;
  std::vector<C*> scratch_;  // a worker's 4 blocks [kRows][kColumns]
};

}  // namespace fusedconvbn
