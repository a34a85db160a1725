// Packed filters that are kept between the calls of inference.
//
// An op sees tensors, not variables, and an update in place keeps the address: so a pointer is no key. Neither is the
// content: to compare or to hash it costs what packing costs (docs/architecture.md). A reference to the very tensor is
// a key where nobody writes to memory that somebody else refers to. That holds for all tensors but two kinds: those of
// TensorFlow 1's reference variables, which the attribute keep_filters excludes (ops.py), and those in memory of
// others, like a NumPy array's, which may_keep() excludes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "../conv_bn.h"
#include "absl/functional/function_ref.h"
#include "tensorflow/core/framework/tensor.h"

namespace fusedconvbn::tf {

class PackedFilters {
 public:
  using Packed = std::shared_ptr<const void>;

  // One for the process, never destroyed: kernels may run while it ends.
  static PackedFilters* global();

  // Whether FUSEDCONVBN_PACKED_MEGABYTES, which global() reads once, is a number of megabytes.
  static Status check_limit();

  // Whether TensorFlow owns the memory of `filters`: the owner of any other may write to it at any time. Not of slices:
  // they hold the whole, and each other's references would pass for somebody's.
  static bool may_keep(const tensorflow::Tensor& filters);

  // `filters` as `plan` reads them, or null. They are packed at the second call: what is used once is not worth it.
  // pack(memory) returns whether it succeeded.
  Packed get(const tensorflow::Tensor& filters, const Plan& plan, absl::FunctionRef<bool(void*)> pack);

  // Before an update, which would have to copy what is referred to here.
  void forget(const tensorflow::Tensor& filters);

 private:
  // Row, shape with the number of groups, dtype, and bytes, which tell the forms of a row apart: what decides the
  // packed form of given memory.
  using Form = std::pair<const Kernel*, std::array<int64_t, 7>>;
  struct Copy {
    Packed packed;  // null after the first call
    size_t bytes;   // of it
    int64_t last_use;
  };
  // One reference, however many forms: so a single one left means that nobody else has any.
  struct Entry {
    tensorflow::Tensor filters;
    std::map<Form, Copy> copies;
  };
  using Entries = std::unordered_map<const void*, Entry>;  // by the memory, which lives as long as the reference

  PackedFilters();
  static Form form_of(const Plan& plan);
  Copy* find(const tensorflow::Tensor& filters, const Form& form);
  bool reserve(size_t bytes);
  bool drop_oldest();
  Packed keep(const tensorflow::Tensor& filters, const Form& form, const Packed& packed, size_t bytes);
  Entries::iterator drop(Entries::iterator entry);
  void drop_unreachable();

  const size_t max_bytes_;
  std::mutex mutex_;
  Entries entries_;
  size_t bytes_ = 0;  // of all that is packed or being packed
  int64_t now_ = 0;   // calls of get()
};

}  // namespace fusedconvbn::tf
