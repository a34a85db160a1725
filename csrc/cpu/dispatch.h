// The dispatch table: which kernels exist, for which stage, in order of preference.
#pragma once

#include <cstddef>
#include <vector>

#include "../conv_bn.h"

namespace fusedconvbn {

// A plan is a list of stages. Forward has one. Backward has kReduce, kDgrad and kWgrad, before them kRecompute where z
// was not saved (a row of kForward does it); or kBackward alone, in a row that suits (or is forced).
enum class Stage { kForward, kRecompute, kReduce, kDgrad, kWgrad, kBackward };

// What a stage reads and writes. Exactly one of forward and backward is set.
struct StageCall {
  const ConvBnParams& params;
  const DeviceInfo& device;
  const ForwardBuffers* forward = nullptr;
  const BackwardBuffers* backward = nullptr;
  const void* conv_out = nullptr;  // backward: what forward saved, or z recomputed: as, and at, conv_grad
  void* conv_grad = nullptr;       // backward: gradient of z, compute type [N,OH,OW,K] whatever the data format
  void* packed = nullptr;          // forward: where to write the packed filters; the stage does nothing else then
  char* scratch = nullptr;         // the stage's own workspace
  ParallelFor* parallel = nullptr;
};

struct Kernel {
  const char* name;  // stage_algorithm_isa
  Stage stage;
  Isa isa;
  bool (*supports)(const ConvBnParams&);    // can compute it
  bool (*suits)(const ConvBnParams&, Isa);  // is to be chosen for it where nobody forces a row; of its estimated_isa()
  size_t (*scratch_bytes)(const ConvBnParams&, const DeviceInfo&);
  Status (*run)(const StageCall&);
  Saved saves = Saved::kConv;  // of kForward, in training: what params.save asks for, or kMoments
  bool recomputes = true;      // of kForward: serves kRecompute too
  // Forward: of the filters as run() packs them; null: it does not, or not to keep. They depend on the filters' shape,
  // groups and dtype alone.
  size_t (*packed_bytes)(const ConvBnParams&, const DeviceInfo&) = nullptr;
  // Of kBackward: is to be chosen even where stages multiply in thirds, on AMX. null: never.
  bool (*outdoes_thirds)(const ConvBnParams&) = nullptr;
};

// Every kernel of the library; within a stage the preferred one first, the reference last.
const std::vector<Kernel>& kernel_table();

const char* name_of(Stage stage);
const char* name_of(Isa isa);

// Whether a device of one instruction set has the rows of another.
inline bool has_rows(Isa device, Isa rows) {
  return rows <= device && (rows != Isa::kAvx512Bf16 || device == Isa::kAvx512Bf16);
}

// Whose prices a row's estimates are made of: AVX-512's are others where a device has products of pairs.
inline Isa estimated_isa(Isa device, Isa row) {
  return row == Isa::kAvx512 && device == Isa::kAvx512Bf16 ? device : row;
}

}  // namespace fusedconvbn
