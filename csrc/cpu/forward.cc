// The forward stage.
#include "forward.h"

#include "amx_convolve.h"
#include "depthwise.h"
#include "few_channels.h"
#include "pairs_convolve.h"
#include "stages.h"
#include "thirds_convolve.h"
#include "winograd.h"

namespace fusedconvbn {
namespace {

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
  // Where z is not saved as it is, it lies in the output until that takes its place.
  const void* z = asked_for(call.params) == Saved::kConv ? call.forward->conv_out : call.forward->output;
  return Image<C>(z, storage_of<C>(set, call.params.dtype), output_grid(call.params));
}

// Passes a Forward that only measures to `measure`.
template <template <class> class Conv, class Measure>
size_t measure(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, Measure measure) {
  return with_compute_type(p.dtype, [&](auto c) {
    using C = decltype(c);
    return measure(Forward<C, Conv>(set, p, device, {}, conv_grad_image<C>(set, p, nullptr), nullptr));
  });
}

template <template <class> class Conv>
size_t scratch_of(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return measure<Conv>(set, p, device, [](const auto& forward) { return forward.scratch_bytes(); });
}

template <template <class> class Conv>
size_t packed_of(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return measure<Conv>(set, p, device, [](const auto& forward) { return forward.packed_bytes(); });
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

// Where the filters may have been packed before.
template <class C, template <class> class Conv>
void run_or_pack(const KernelSet& set, const StageCall& call) {
  if (!call.packed) return run_as<C, Conv>(set, call);
  Forward<C, Conv>(set, call.params, call.device, *call.forward, conv_out_image<C>(set, call), call.scratch)
      .pack(call.packed, call.parallel);
}

template <template <class> class Conv>
Status run_packing(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) { run_or_pack<decltype(c), Conv>(set, call); });
  return Status{};
}

}  // namespace

FCB_DEFINE_PACKING_STAGE(forward_direct, Convolution)
FCB_DEFINE_PACKING_STAGE(forward_winograd2, Winograd2)
FCB_DEFINE_PACKING_STAGE(forward_winograd4, Winograd4)
FCB_DEFINE_PACKING_STAGE(forward_few_channels, FewChannelsConvolution)
FCB_DEFINE_STAGE(forward_depthwise, DepthwiseConvolution)

// Of one compute type.
#define FCB_FLOAT_STAGE(name, Algorithm)                                                                   \
  size_t name##_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {           \
    return Forward<float, Algorithm>(set, p, device, {}, conv_grad_image<float>(set, p, nullptr), nullptr) \
        .scratch_bytes();                                                                                  \
  }                                                                                                        \
  size_t name##_packed(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {            \
    return Forward<float, Algorithm>(set, p, device, {}, conv_grad_image<float>(set, p, nullptr), nullptr) \
        .packed_bytes();                                                                                   \
  }                                                                                                        \
  Status run_##name(const KernelSet& set, const StageCall& call) {                                         \
    run_or_pack<float, Algorithm>(set, call);                                                              \
    return Status{};                                                                                       \
  }
FCB_FLOAT_STAGE(forward_direct_amx, AmxConvolution)
FCB_FLOAT_STAGE(forward_thirds, ThirdsConvolution)
FCB_FLOAT_STAGE(forward_pairs, PairsConvolution)
#undef FCB_FLOAT_STAGE

}  // namespace fusedconvbn
