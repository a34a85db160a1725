// Memory for what outlives a call, in pages: large ones where the system has them, for the sake of the TLB.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace fusedconvbn::tf {

// At least `bytes`, and a page; 64-byte aligned. To be freed with std::free. Null if there is no memory left.
struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
};

inline Memory allocate(size_t bytes) {
  constexpr size_t kPage = size_t{64} << 10, kHugePage = size_t{2} << 20;
  if (bytes > SIZE_MAX - kHugePage) return {};
  const size_t page = bytes >= kHugePage ? kHugePage : kPage, size = std::max(page, (bytes + page - 1) / page * page);
  void* data = std::aligned_alloc(page, size);
  if (data == nullptr) return {};
  if (page == kHugePage) madvise(data, size, MADV_HUGEPAGE);  // a hint: no harm if refused
  return {data, size};
}

}  // namespace fusedconvbn::tf
