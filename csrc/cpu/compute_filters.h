// Filters in the compute type: where they lie, or converted into scratch.
#pragma once

#include <cstdint>

#include "arena.h"
#include "compute_type.h"

namespace fusedconvbn {

template <class C>
class ComputeFilters {
 public:
  ComputeFilters(const Storage<C>& storage, const void* filters, int64_t elements, Arena* arena)
      : storage_(storage), filters_(filters), elements_(elements) {
    if (!storage.is_compute_type) converted_ = arena->take<C>(elements);
  }

  // Before data() is read.
  void convert() const {
    if (converted_) storage_.kernels.load(filters_, elements_, 1, 1, elements_, converted_, elements_);
  }
  const C* data() const { return converted_ ? converted_ : static_cast<const C*>(filters_); }

 private:
  Storage<C> storage_;
  const void* filters_;
  int64_t elements_;
  C* converted_ = nullptr;
};

}  // namespace fusedconvbn
