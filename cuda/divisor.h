// Division of numbers below 2^31 by one that is known when a kernel is launched: a product and a shift in place of some
// twenty instructions. With l = ceil(log2 d) and m = ceil(2^(31 + l) / d), m d - 2^(31 + l) < d <= 2^l, so that
// n m / 2^(31 + l) exceeds n / d by less than 1 / d.
#pragma once

#include <cstdint>

#include "../csrc/inline.h"

namespace fusedconvbn::cuda {

struct Divisor {
  uint32_t divisor, multiplier = 0;
  int shift = 31;

  // Of zero: never to be used.
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    if (d <= 0) return;
    while (shift < 62 && (int64_t{1} << (shift - 31)) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  FCB_INLINE_MEMBER int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> shift);
  }
  FCB_INLINE_MEMBER int rest(int n, int quotient) const { return n - quotient * static_cast<int>(divisor); }
};

}  // namespace fusedconvbn::cuda
