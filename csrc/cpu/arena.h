// Carves a workspace into arrays. With a null base it only measures, so that one function both sizes and lays out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedconvbn {

class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    constexpr size_t kLine = 64;  // bytes; no two arrays share a cache line
    char* start = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<T*>(start);
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fusedconvbn
