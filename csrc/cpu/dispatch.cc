#include "dispatch.h"

#include <algorithm>

#include "../reference.h"
#include "../shape.h"
#include "estimates.h"
#include "kernels.h"
#include "second_moments.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

bool any_problem(const ConvBnParams&) { return true; }
bool always(const ConvBnParams&, Isa) { return true; }
bool never(const ConvBnParams&, Isa) { return false; }

// Panels of fewer channels would be mostly padding.
bool fills_panels(const ConvBnParams& p) {
  constexpr int64_t kMinChannels = 16;
  return std::min(p.in_channels, p.out_channels) >= kMinChannels;
}

template <Stage S, int M>
bool suits_winograd(const ConvBnParams& p, Isa isa) {
  if (p.algorithm != Algorithm::kAuto) return p.algorithm == (M == 2 ? Algorithm::kWinograd2 : Algorithm::kWinograd4);
  return fills_panels(p) && fastest_winograd(winograd_costs(S, p, isa), p.strict) == M;
}
template <Stage S>
bool suits_winograd2(const ConvBnParams& p, Isa isa) {
  return suits_winograd<S, 2>(p, isa);
}
template <Stage S>
bool suits_winograd4(const ConvBnParams& p, Isa isa) {
  return suits_winograd<S, 4>(p, isa);
}
template <Stage S>
bool by_winograd(const ConvBnParams& p, Isa isa) {
  return winograd_applies(p) && (suits_winograd2<S>(p, isa) || suits_winograd4<S>(p, isa));
}

// Products on AMX: lines that fit a strip, and little padding between them.
bool amx_applies(const ConvBnParams& p) {
  constexpr int64_t kMaxWidth = 4096, kMaxPadding = 32, kMaxHeight = 64;
  return p.dtype == DType::kBFloat16 && p.groups == 1 && p.out_width <= kMaxWidth &&
         (p.filter_height - 1) * p.dilation_height <= kMaxHeight &&
         std::max({(p.filter_width - 1) * p.dilation_width, p.pad_left, p.pad_right}) <= kMaxPadding;
}

// The second moments serve 1x1 filters whose data needs no conversion.
bool forward_moments_applies(const ConvBnParams& p) {
  return p.training && is_pointwise(p) && p.out_channels >= 2 * p.in_channels && p.data_format == DataFormat::kNHWC &&
         (p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64) &&
         (p.activation == Activation::kNone || derivative_from_output(p.activation));
}
bool backward_moments_applies(const ConvBnParams& p) {
  return forward_moments_applies(p) && p.saved == Saved::kMoments &&
         (p.activation == Activation::kNone || needs_output(p) || p.has_output);
}

bool forward_float_moments_applies(const ConvBnParams& p) {
  return p.dtype == DType::kFloat32 && forward_moments_applies(p);
}

// With AVX2, half of AVX-512's products a cycle, those of backward count for more beside passes over z: few passes over
// a z that leaves L3.
bool outputs_are_many(const ConvBnParams& p) {
  constexpr int64_t kFarBytes = 12 << 20;
  const bool far = p.pixels() * p.out_channels * 4 >= kFarBytes;
  return p.out_channels >= (far ? 4 : 6) * p.in_channels;
}

// Where memory limits the layer: few inputs, much output, and so many pixels that S W, C products an element of the
// filters, costs less than a pass over z.
bool suits_moments(const ConvBnParams& p, Isa isa) {
  constexpr int64_t kMinBytes = 512 << 10, kPixelsFor = 3;  // of so many products
  if (p.algorithm != Algorithm::kAuto || p.strict || (isa == Isa::kAvx2 && !outputs_are_many(p))) return false;
  return (p.in_channels <= 64 || (p.in_channels <= 128 && p.out_channels >= 4 * p.in_channels)) &&
         p.pixels() * p.out_channels * 4 >= kMinBytes && kPixelsFor * p.pixels() >= p.in_channels * p.in_channels;
}
// Where AMX has nothing faster.
bool suits_moments_beside_thirds(const ConvBnParams& p, Isa isa) {
  return suits_moments(p, isa) && moments_outdo_thirds(p);
}

bool thirds_are_faster(Stage stage, const ConvBnParams& p, const ThirdsCosts& costs) {
  return fills_panels(p) && costs.thirds * margin_of_thirds(stage, p) < costs.direct;
}
bool suits_moments_thirds(const ConvBnParams& p, Isa isa) {
  return suits_moments_beside_thirds(p, isa) && thirds_are_faster(Stage::kForward, p, moments_costs(p));
}

// The same for bfloat16 on AMX, where du is dy or 0 and need not be rounded. Of few pixels d_inputs would be little
// beside its two terms, of which one is rounded.
bool forward_moments_amx_applies(const ConvBnParams& p) {
  constexpr int64_t kMinPixels = 16;
  const bool keeps_or_drops =
      p.activation == Activation::kNone || p.activation == Activation::kRelu || p.activation == Activation::kRelu6;
  return amx_applies(p) && p.training && p.pixels() >= kMinPixels && is_pointwise(p) && p.stride_height == 1 &&
         p.stride_width == 1 && p.out_channels >= 2 * p.in_channels && p.data_format == DataFormat::kNHWC &&
         keeps_or_drops;
}
bool backward_moments_amx_applies(const ConvBnParams& p) {
  return forward_moments_amx_applies(p) && p.saved == Saved::kMoments &&
         (p.activation == Activation::kNone || needs_output(p) || p.has_output);
}

bool one_group(const ConvBnParams& p) { return p.groups == 1; }
// Where the direct algorithm would fill a part of a vector, and a window's lines of phases are short.
bool suits_columns(const ConvBnParams& p, Isa) {
  constexpr int64_t kMaxStep = 8;
  for (int64_t step : {p.stride_height, p.stride_width, p.dilation_height, p.dilation_width})
    if (step > kMaxStep) return false;
  return p.in_channels < 16;
}

// Where the direct algorithm's rows are short, and lines long enough to fill its tiles.
bool few_source_channels(const ConvBnParams& p) {
  return p.algorithm != Algorithm::kWinograd2 && p.algorithm != Algorithm::kWinograd4 && p.in_channels <= 4 &&
         p.out_width >= 12;
}

// The same, and enough outputs: a vector of them is all that the direct algorithm needs for its tiles. With a panel of
// them its tiles are faster in training and beside a residual, unless windows are large.
bool suits_forward_few_channels(const ConvBnParams& p, Isa isa) {
  constexpr int64_t kPanel = 64, kLargeWindow = 64;  // elements
  const int64_t min_outputs = isa == Isa::kAvx2 ? 9 : 17;
  const bool direct_is_faster =
      (p.training || p.has_residual) && p.out_channels >= kPanel && p.taps() * p.in_channels < kLargeWindow;
  return few_source_channels(p) && p.out_channels >= min_outputs && !direct_is_faster;
}

bool backward_few_channels_applies(const ConvBnParams& p) { return one_group(p) && has_conv_out(p) && p.pixels() > 0; }
// And the gradient of z, which stages hand on in memory, exceeds L2; or a residual's gradient, which they would write
// in a pass of their own, is worth it.
bool suits_backward_few_channels(const ConvBnParams& p, Isa) {
  constexpr int64_t kMinOutput = 512 << 10, kMinResidual = 32 << 10;  // elements; 2 MiB, 128 KiB
  return few_source_channels(p) && p.pixels() * p.out_channels >= (p.has_residual ? kMinResidual : kMinOutput);
}

// It reads z where there is one, else recomputes it, unrounded.
bool backward_depthwise_applies(const ConvBnParams& p) {
  const bool rounds = p.training && (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16);
  return depthwise_applies(p) && (has_conv_out(p) || !rounds);
}

// Where an output pixel belongs to one input pixel, and nothing needs conversion.
bool backward_pointwise_applies(const ConvBnParams& p) {
  return has_conv_out(p) && is_pointwise(p) && p.stride_height == 1 && p.stride_width == 1 &&
         p.data_format == DataFormat::kNHWC && (p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64);
}
// Where its sums and the filters are few beside the blocks in L2, and dy and z many.
bool suits_backward_pointwise(const ConvBnParams& p, Isa) {
  constexpr int64_t kMaxFilters = 32 << 10, kMinOutput = 64 << 10;  // elements; dy and z of 512 KiB
  return p.in_channels * p.out_channels <= kMaxFilters && p.pixels() * p.out_channels >= kMinOutput;
}

// With frozen statistics the gradient of z is not rounded: the stages do that.
bool amx_backward_applies(const ConvBnParams& p) {
  return amx_applies(p) && has_conv_out(p) && p.data_format == DataFormat::kNHWC && p.pixels() > 0;
}
bool suits_amx(const ConvBnParams& p, Isa) {
  return p.algorithm != Algorithm::kWinograd2 && p.algorithm != Algorithm::kWinograd4;
}

// It rounds the gradient of z.
bool suits_amx_backward(const ConvBnParams& p, Isa isa) { return suits_amx(p, isa) && !p.strict; }

template <Stage S>
bool thirds_apply(const ConvBnParams& p) {
  return thirds_apply(S, p);
}
// Products of bfloat16 pairs: neighbours in memory. Of the gradient by the inputs these are the gradient of z, which is
// rounded for that; not with frozen statistics.
bool forward_pairs_apply(const ConvBnParams& p) {
  return p.dtype == DType::kBFloat16 && p.data_format == DataFormat::kNHWC && p.group_in() % 2 == 0;
}
bool dgrad_pairs_apply(const ConvBnParams& p) {
  return p.dtype == DType::kBFloat16 && p.training && p.group_out() % 2 == 0;
}
// Where they fill vectors, and Winograd's algorithm, in float32, does not save more.
template <Stage S>
bool suits_pairs(const ConvBnParams& p, Isa isa) {
  constexpr int64_t kMinChannels = 8;
  constexpr double kGain = 1.8;  // of the direct algorithm's speed
  if (p.algorithm == Algorithm::kWinograd2 || p.algorithm == Algorithm::kWinograd4) return false;
  if (std::min(p.group_in(), p.group_out()) < kMinChannels) return false;
  if (p.algorithm == Algorithm::kDirect || !by_winograd<S>(p, isa)) return true;
  const WinogradCosts costs = winograd_costs(S, p, isa);
  return costs.direct / kGain < std::min(costs.two, costs.four);
}
bool suits_dgrad_pairs(const ConvBnParams& p, Isa isa) {
  return !p.strict && !suits_columns(p, isa) && suits_pairs<Stage::kDgrad>(p, isa);
}

// Where nothing but the direct algorithm competes, and is slower.
template <Stage S>
bool suits_thirds(const ConvBnParams& p, Isa isa) {
  return p.algorithm == Algorithm::kAuto && !by_winograd<S>(p, isa) && thirds_are_faster(S, p, thirds_costs(S, p));
}
bool suits_forward_thirds(const ConvBnParams& p, Isa isa) {
  const bool by_moments = forward_moments_applies(p) && suits_moments_beside_thirds(p, isa);
  return !by_moments && suits_thirds<Stage::kForward>(p, isa);
}

size_t no_scratch(const ConvBnParams&, const DeviceInfo&) { return 0; }

Status run_forward_reference(const StageCall& call) { return reference_forward(call.params, *call.forward); }
Status run_backward_reference(const StageCall& call) { return reference_backward(call.params, *call.backward); }

using ScratchOf = size_t (*)(const KernelSet&, const ConvBnParams&, const DeviceInfo&);
using RunOf = Status (*)(const KernelSet&, const StageCall&);

// A stage bound to an instruction set's kernels.
template <const KernelSet* Set, ScratchOf Scratch>
size_t scratch_with(const ConvBnParams& p, const DeviceInfo& device) {
  return Scratch(*Set, p, device);
}
template <const KernelSet* Set, RunOf Run>
Status run_with(const StageCall& call) {
  return Run(*Set, call);
}

Kernel packing(Kernel row, size_t (*packed_bytes)(const ConvBnParams&, const DeviceInfo&)) {
  row.packed_bytes = packed_bytes;
  return row;
}

Kernel outdoing_thirds(Kernel row) {
  row.outdoes_thirds = one_row_outdoes_thirds;
  return row;
}

Kernel saving_moments(Kernel row) {
  row.saves = Saved::kMoments;
  row.recomputes = false;
  return row;
}

}  // namespace

// One row an algorithm of a stage and instruction set, in order of preference.
#define FCB_ROW(name, stage, supports, suits, isa, Isa_)                                                        \
  Kernel {                                                                                                      \
    #name "_" #isa, Stage::stage, Isa::k##Isa_, supports, suits, scratch_with<&kKernels##Isa_, name##_scratch>, \
        run_with<&kKernels##Isa_, run_##name>                                                                   \
  }
// Of forward, with packed filters that may be kept.
#define FCB_PACKING_ROW(name, supports, suits, isa, Isa_) \
  packing(FCB_ROW(name, kForward, supports, suits, isa, Isa_), scratch_with<&kKernels##Isa_, name##_packed>)
#define FCB_ROWS(isa, Isa_)                                                                                      \
  saving_moments(FCB_ROW(forward_moments, kForward, forward_moments_applies, suits_moments, isa, Isa_)),         \
      FCB_ROW(backward_moments, kBackward, backward_moments_applies, always, isa, Isa_),                         \
      FCB_PACKING_ROW(forward_winograd4, winograd_applies, suits_winograd4<Stage::kForward>, isa, Isa_),         \
      FCB_PACKING_ROW(forward_winograd2, winograd_applies, suits_winograd2<Stage::kForward>, isa, Isa_),         \
      FCB_ROW(forward_depthwise, kForward, depthwise_applies, always, isa, Isa_),                                \
      FCB_PACKING_ROW(forward_few_channels, one_group, suits_forward_few_channels, isa, Isa_),                   \
      FCB_PACKING_ROW(forward_direct, any_problem, always, isa, Isa_),                                           \
      FCB_ROW(reduce_direct, kReduce, any_problem, always, isa, Isa_),                                           \
      FCB_ROW(dgrad_winograd4, kDgrad, winograd_applies, suits_winograd4<Stage::kDgrad>, isa, Isa_),             \
      FCB_ROW(dgrad_winograd2, kDgrad, winograd_applies, suits_winograd2<Stage::kDgrad>, isa, Isa_),             \
      FCB_ROW(dgrad_columns, kDgrad, one_group, suits_columns, isa, Isa_),                                       \
      FCB_ROW(dgrad_direct, kDgrad, any_problem, always, isa, Isa_),                                             \
      FCB_ROW(wgrad_winograd4, kWgrad, winograd_applies, suits_winograd4<Stage::kWgrad>, isa, Isa_),             \
      FCB_ROW(wgrad_winograd2, kWgrad, winograd_applies, suits_winograd2<Stage::kWgrad>, isa, Isa_),             \
      FCB_ROW(wgrad_direct, kWgrad, any_problem, always, isa, Isa_),                                             \
      FCB_ROW(backward_few_channels, kBackward, backward_few_channels_applies, suits_backward_few_channels, isa, \
              Isa_),                                                                                             \
      FCB_ROW(backward_depthwise, kBackward, backward_depthwise_applies, always, isa, Isa_),                     \
      outdoing_thirds(                                                                                           \
          FCB_ROW(backward_pointwise, kBackward, backward_pointwise_applies, suits_backward_pointwise, isa, Isa_))

// Their kernels are those of AMX: the name says it once.
#define FCB_AMX_ROW(name, stage, applies, suits)                                                \
  Kernel {                                                                                      \
    #name, Stage::stage, Isa::kAmx, applies, suits, scratch_with<&kKernelsAmx, name##_scratch>, \
        run_with<&kKernelsAmx, run_##name>                                                      \
  }

const std::vector<Kernel>& kernel_table() {
  static const std::vector<Kernel> table = {
#if defined(__x86_64__) && !defined(FUSEDCONVBN_NO_AMX)
      saving_moments(FCB_AMX_ROW(forward_moments_amx, kForward, forward_moments_amx_applies, suits_moments)),
      FCB_AMX_ROW(backward_moments_amx, kBackward, backward_moments_amx_applies, always),
      packing(FCB_AMX_ROW(forward_direct_amx, kForward, amx_applies, suits_amx),
              scratch_with<&kKernelsAmx, forward_direct_amx_packed>),
      FCB_AMX_ROW(backward_direct_amx, kBackward, amx_backward_applies, suits_amx_backward),
      saving_moments(
          FCB_ROW(forward_moments_thirds, kForward, forward_float_moments_applies, suits_moments_thirds, amx, Amx)),
      FCB_PACKING_ROW(forward_thirds, thirds_apply<Stage::kForward>, suits_forward_thirds, amx, Amx),
      FCB_ROW(dgrad_thirds, kDgrad, thirds_apply<Stage::kDgrad>, suits_thirds<Stage::kDgrad>, amx, Amx),
      FCB_ROW(wgrad_thirds, kWgrad, thirds_apply<Stage::kWgrad>, suits_thirds<Stage::kWgrad>, amx, Amx),
#endif
#if defined(__x86_64__)
#if !defined(FUSEDCONVBN_NO_AVX512_BF16)
      packing({"forward_pairs_avx512_bf16", Stage::kForward, Isa::kAvx512Bf16, forward_pairs_apply,
               suits_pairs<Stage::kForward>, scratch_with<&kKernelsAvx512, forward_pairs_scratch>,
               run_with<&kKernelsAvx512, run_forward_pairs>},
              scratch_with<&kKernelsAvx512, forward_pairs_packed>),
      {"dgrad_pairs_avx512_bf16", Stage::kDgrad, Isa::kAvx512Bf16, dgrad_pairs_apply, suits_dgrad_pairs,
       scratch_with<&kKernelsAvx512, dgrad_pairs_scratch>, run_with<&kKernelsAvx512, run_dgrad_pairs>},
#endif
      FCB_ROWS(avx512, Avx512),
      FCB_ROWS(avx2, Avx2),
#endif
      FCB_ROWS(generic, Generic),
      {"forward_reference", Stage::kForward, Isa::kGeneric, any_problem, always, no_scratch, run_forward_reference,
       Saved::kConv, false},
      {"backward_reference", Stage::kBackward, Isa::kGeneric, any_problem, never, no_scratch, run_backward_reference},
  };
  return table;
}

const char* name_of(Stage stage) {
  switch (stage) {
    case Stage::kForward: return "forward";
    case Stage::kRecompute: return "recompute";
    case Stage::kReduce: return "reduce";
    case Stage::kDgrad: return "dgrad";
    case Stage::kWgrad: return "wgrad";
    case Stage::kBackward: return "backward";
  }
  return "";
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return "generic";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmx: return "amx";
  }
  return "";
}

}  // namespace fusedconvbn
