// What this machine offers.
#include <cstdlib>
#include <string>

#include "dispatch.h"

#if defined(__x86_64__)
#include <unistd.h>
#endif

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

// sysconf returns 0 or -1 where the cache size is unknown.
int64_t cache_bytes(int name, int64_t otherwise) {
#if defined(__x86_64__) && defined(_SC_LEVEL1_DCACHE_SIZE)
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : otherwise;
#else
  (void)name;
  return otherwise;
#endif
}

}  // namespace

Status detect_device(int threads, DeviceInfo* device) {
  static const Isa best = best_isa();
  device->isa = best;
  device->threads = threads;
#if defined(__x86_64__) && defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t l1 = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
  static const int64_t l2 = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
  device->l1_bytes = l1;
  device->l2_bytes = l2;
#endif
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
