// The reduce stage: the gradients of everything but inputs and filters, and the gradient of z, in two passes over
// (dy, z). channel_gradients.h has the formulas.
#include "gradient_blocks.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

template <class C>
GradientBlocks<C> gradient_blocks(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device,
                                  const BackwardBuffers& buffers, const void* conv_out, Arena* arena) {
  const Image<C> z = has_conv_out(p) ? saved_image<C>(set, p, p.saved, conv_out) : conv_grad_image<C>(set, p, conv_out);
  return GradientBlocks<C>(set, p, buffers, z, GradientBlocks<C>::blocks(p), device.threads, arena, true);
}

template <class C>
void run(const KernelSet& set, const StageCall& call) {
  const BackwardBuffers& b = *call.backward;
  Arena arena(call.scratch);
  const auto blocks = gradient_blocks<C>(set, call.params, call.device, b, call.conv_out, &arena);
  blocks.reduce(call.parallel);
  if (!b.d_inputs && !b.d_filters && !b.d_residual) return;
  const Image<C> d_conv = conv_grad_image<C>(set, call.params, call.conv_grad);
  blocks.for_each(call.parallel, [&](const GradientBlock<C>& g, int64_t first, int64_t channel, int worker) {
    blocks.apply(g, first, channel, d_conv.target(first, channel, {}), worker);
  });
}

}  // namespace

size_t reduce_direct_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    Arena arena;
    gradient_blocks<decltype(c)>(set, p, device, {}, nullptr, &arena);
    return arena.used();
  });
}

Status run_reduce_direct(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) { run<decltype(c)>(set, call); });
  return Status{};
}

}  // namespace fusedconvbn
