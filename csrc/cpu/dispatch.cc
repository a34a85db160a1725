#include "dispatch.h"

#include "../reference.h"
#include "kernels.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

bool any_problem(const ConvBnParams&) { return true; }
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

// One row a stage and instruction set. is_depthwise problems take the depthwise kernels of the same row's set.
#define FCB_ROW(stage, Stage_, isa, Isa_)                                                        \
  {#stage "_direct_" #isa, Stage::Stage_, Isa::k##Isa_, any_problem,                             \
   scratch_with<&kKernels##Isa_, stage##_scratch>, run_with<&kKernels##Isa_, run_##stage>}
#define FCB_ROWS(isa, Isa_)                                                          \
  FCB_ROW(forward, kForward, isa, Isa_), FCB_ROW(reduce, kReduce, isa, Isa_), \
      FCB_ROW(dgrad, kDgrad, isa, Isa_), FCB_ROW(wgrad, kWgrad, isa, Isa_)

const std::vector<Kernel>& kernel_table() {
  static const std::vector<Kernel> table = {
#if defined(__x86_64__)
      FCB_ROWS(avx512, Avx512),
      FCB_ROWS(avx2, Avx2),
#endif
      FCB_ROWS(generic, Generic),
      {"forward_reference", Stage::kForward, Isa::kGeneric, any_problem, no_scratch, run_forward_reference},
      {"backward_reference", Stage::kBackward, Isa::kGeneric, any_problem, no_scratch, run_backward_reference},
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
  }
  return "";
}

}  // namespace fusedconvbn
