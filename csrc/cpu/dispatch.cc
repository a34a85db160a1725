#include "dispatch.h"

#include <algorithm>

#include "../reference.h"
#include "../shape.h"
#include "kernels.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

bool any_problem(const ConvBnParams&) { return true; }
bool no_problem(const ConvBnParams&) { return false; }

// Where the transforms cost less than the products they save: F(2x2) has 2.25 times fewer.
bool suits_winograd(const ConvBnParams& p, int64_t height, int64_t width) {
  constexpr int64_t kMinChannels = 32, kMinPixels = 192;
  if (p.algorithm != Algorithm::kAuto) return p.algorithm == Algorithm::kWinograd2;
  return p.in_channels >= kMinChannels && p.out_channels >= kMinChannels && p.batch * height * width >= kMinPixels;
}
bool forward_winograd2(const ConvBnParams& p) { return suits_winograd(p, p.out_height, p.out_width); }
bool dgrad_winograd2(const ConvBnParams& p) { return suits_winograd(p, p.in_height, p.in_width); }

// Products on AMX: lines that fit a strip, and little padding between them.
bool amx_applies(const ConvBnParams& p) {
  constexpr int64_t kMaxWidth = 4096, kMaxPadding = 32, kMaxHeight = 64;
  return p.dtype == DType::kBFloat16 && p.groups == 1 && p.out_width <= kMaxWidth &&
         (p.filter_height - 1) * p.dilation_height <= kMaxHeight &&
         std::max({(p.filter_width - 1) * p.dilation_width, p.pad_left, p.pad_right}) <= kMaxPadding;
}
// With frozen statistics the gradient of z is not rounded: the stages do that.
bool amx_backward_applies(const ConvBnParams& p) {
  return amx_applies(p) && p.training && p.data_format == DataFormat::kNHWC && p.pixels() > 0;
}
bool suits_amx(const ConvBnParams& p) { return p.algorithm != Algorithm::kWinograd2; }

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

}  // namespace

// One row an algorithm of a stage and instruction set, in order of preference.
#define FCB_ROW(name, stage, supports, suits, isa, Isa_) \
  {#name "_" #isa,                                       \
   Stage::stage,                                         \
   Isa::k##Isa_,                                         \
   supports,                                             \
   suits,                                                \
   scratch_with<&kKernels##Isa_, name##_scratch>,        \
   run_with<&kKernels##Isa_, run_##name>}
#define FCB_ROWS(isa, Isa_)                                                              \
  FCB_ROW(forward_winograd2, kForward, winograd2_applies, forward_winograd2, isa, Isa_), \
      FCB_ROW(forward_direct, kForward, any_problem, any_problem, isa, Isa_),            \
      FCB_ROW(reduce_direct, kReduce, any_problem, any_problem, isa, Isa_),              \
      FCB_ROW(dgrad_winograd2, kDgrad, winograd2_applies, dgrad_winograd2, isa, Isa_),   \
      FCB_ROW(dgrad_direct, kDgrad, any_problem, any_problem, isa, Isa_),                \
      FCB_ROW(wgrad_direct, kWgrad, any_problem, any_problem, isa, Isa_)

// Their kernels are those of AMX: the name says it once.
#define FCB_AMX_ROW(name, stage, applies)      \
  {#name,                                      \
   Stage::stage,                               \
   Isa::kAmx,                                  \
   applies,                                    \
   suits_amx,                                  \
   scratch_with<&kKernelsAmx, name##_scratch>, \
   run_with<&kKernelsAmx, run_##name>}

const std::vector<Kernel>& kernel_table() {
  static const std::vector<Kernel> table = {
#if defined(__x86_64__) && !defined(FUSEDCONVBN_NO_AMX)
      FCB_AMX_ROW(forward_direct_amx, kForward, amx_applies),
      FCB_AMX_ROW(backward_direct_amx, kBackward, amx_backward_applies),
#endif
#if defined(__x86_64__)
      FCB_ROWS(avx512, Avx512),
      FCB_ROWS(avx2, Avx2),
#endif
      FCB_ROWS(generic, Generic),
      {"forward_reference", Stage::kForward, Isa::kGeneric, any_problem, any_problem, no_scratch,
       run_forward_reference},
      {"backward_reference", Stage::kBackward, Isa::kGeneric, any_problem, no_problem, no_scratch,
       run_backward_reference},
  };
  return table;
}

const char* name_of(Stage stage) {
  switch (stage) {
    case Stage::kForward: return "forward";
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
    case Isa::kAmx: return "amx";
  }
  return "";
}

}  // namespace fusedconvbn
