// Ranges of integers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fusedconvbn {

inline int64_t floor_div(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }

struct Span {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

// Part `index` of `count` nearly equal ones of [0, size).
inline Span part(int64_t index, int64_t count, int64_t size) {
  return {index * size / count, (index + 1) * size / count};
}

}  // namespace fusedconvbn
