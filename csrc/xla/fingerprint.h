// The witness of filters for host::PackedFilters where there is nothing but an address: a hash of what is there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../conv_bn.h"
#include "absl/hash/hash.h"
#include "absl/strings/string_view.h"

namespace fusedconvbn::xla {

// 64 bits, seeded anew in every process: that filters change and keep it is as likely as an error of memory. It takes
// as long as reading them; to pack them takes three times that.
class Fingerprint {
 public:
  Fingerprint(const void* data, size_t bytes, ParallelFor* parallel) {
    constexpr size_t kPart = size_t{256} << 10;
    std::vector<uint64_t> parts((bytes + kPart - 1) / kPart);
    parallel->run(static_cast<int64_t>(parts.size()), [&](int64_t part, int) {
      const size_t begin = static_cast<size_t>(part) * kPart;
      parts[part] =
          absl::HashOf(absl::string_view(static_cast<const char*>(data) + begin, std::min(kPart, bytes - begin)));
    });
    value_ = absl::HashOf(parts);
  }

  bool confirms(const Fingerprint& other) const { return value_ == other.value_; }
  static bool is_last() { return false; }  // nobody tells

 private:
  uint64_t value_;
};

}  // namespace fusedconvbn::xla
