// What this machine offers.
#include <cstdlib>
#include <string>

#include "dispatch.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(FUSEDCONVBN_NO_AMX)
#define FCB_HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedconvbn {
namespace {

#if defined(FCB_HAS_AMX)
bool cpu_has_amx_bfloat16() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  unsigned a, b, c, features, more;
  return __get_cpuid_count(7, 0, &a, &b, &c, &features) && __get_cpuid_count(7, 1, &more, &b, &c, &a) &&
         (features & kAmxBf16) && (features & kAmxTile) && (more & kAvx512Bf16);
}

// Linux saves the 8 KiB of tiles only for processes that ask for it. The answer holds for all threads, for good.
bool system_permits_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool amx_is_usable() { return cpu_has_amx_bfloat16() && system_permits_tiles(); }
#else
bool amx_is_usable() { return false; }
#endif

Isa best_vector_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#if !defined(FUSEDCONVBN_NO_AVX512_BF16)
  // Intel's cores multiply pairs at half the rate of floats, AMD's at twice.
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd")) return Isa::kAvx512Bf16;
#endif
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

// The permission, which has a price (larger stacks of signal handlers), is asked for once, and only if it may be used.
Isa best_isa(bool tiles) {
  static const Isa vectors = best_vector_isa();
  if (!tiles || vectors < Isa::kAvx512) return vectors;
  static const bool usable = amx_is_usable();
  return usable ? Isa::kAmx : vectors;
}

}  // namespace

Status detect_device(int threads, DeviceInfo* device) {
  const char* limit = std::getenv("FUSEDCONVBN_ISA");
  const bool limited = limit != nullptr && *limit != 0;
  const Isa best = best_isa(!limited || std::string(limit) == name_of(Isa::kAmx));
  device->isa = best;
  device->threads = threads;
  if (!limited) return Status{};
  std::string names;
  for (Isa isa : kIsas) {
    names += std::string(names.empty() ? "" : ", ") + name_of(isa);
    if (std::string(limit) != name_of(isa)) continue;
    if (isa > best)
      return Status::error(std::string("FUSEDCONVBN_ISA: this machine offers at most ") + name_of(best) +
                           ". Received: " + limit);
    device->isa = isa;
    return Status{};
  }
  return Status::error("FUSEDCONVBN_ISA must be one of " + names + ". Received: " + limit);
}

}  // namespace fusedconvbn
