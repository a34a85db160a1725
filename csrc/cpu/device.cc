// What this machine offers.
#include <cstdlib>
#include <string>

#include "dispatch.h"

namespace fusedconvbn {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

}  // namespace

Status detect_device(int threads, DeviceInfo* device) {
  static const Isa best = best_isa();
  device->isa = best;
  device->threads = threads;
  const char* limit = std::getenv("FUSEDCONVBN_ISA");
  if (limit == nullptr || *limit == 0) return Status{};
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(limit) != name_of(isa)) continue;
    if (isa > best)
      return Status::error(std::string("FUSEDCONVBN_ISA: this machine offers at most ") + name_of(best) +
                           ". Received: " + limit);
    device->isa = isa;
    return Status{};
  }
  return Status::error(std::string("FUSEDCONVBN_ISA must be generic, avx2 or avx512. Received: ") + limit);
}

}  // namespace fusedconvbn
