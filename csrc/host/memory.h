// Memory in large pages where the system has them. Each saves 512 page faults where memory is new, and walks through
// page tables, which a virtual machine doubles, where it is not.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace fusedconvbn::host {

constexpr size_t kHugePage = size_t{2} << 20;

inline void advise_huge_pages(uintptr_t begin, uintptr_t end) {
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: no harm if refused
}

// For memory of any allocator, before it is written to: whole large pages of it become such, or stay as they are where
// it was in use before. They hold nothing but `data`, so the process takes no more memory than it asked for.
inline void prefer_huge_pages(void* data, size_t bytes) {
  if (bytes < 2 * kHugePage) return;  // may hold no whole one
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  advise_huge_pages((address + kHugePage - 1) / kHugePage * kHugePage, (address + bytes) / kHugePage * kHugePage);
}

// For a part of an arena whose other parts will be used, too: also the large pages that it shares with its neighbours.
inline void prefer_huge_pages_around(void* data, size_t bytes) {
  if (bytes < kHugePage / 2) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  advise_huge_pages(address / kHugePage * kHugePage, (address + bytes + kHugePage - 1) / kHugePage * kHugePage);
}

// At least `bytes`, and a page, a large one from a quarter of it on; 64-byte aligned. To be freed with std::free. Null
// if there is no memory left.
struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
};

inline Memory allocate(size_t bytes) {
  constexpr size_t kPage = size_t{64} << 10;
  if (bytes > SIZE_MAX - kHugePage) return {};
  const size_t page = bytes >= kHugePage / 4 ? kHugePage : kPage,
               size = std::max(page, (bytes + page - 1) / page * page);
  void* data = std::aligned_alloc(page, size);
  if (data == nullptr) return {};
  if (page == kHugePage) advise_huge_pages(reinterpret_cast<uintptr_t>(data), reinterpret_cast<uintptr_t>(data) + size);
  return {data, size};
}

}  // namespace fusedconvbn::host
