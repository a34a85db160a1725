// The tensors of one call.
#pragma once

#include <array>

#include "attributes.h"
#include "memory.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace fusedconvbn::tf {

// The op's tensors as the core's pointers, each checked by its name. The first error stays; after one, nothing that
// was handed out may be used.
class Tensors {
 public:
  explicit Tensors(tensorflow::OpKernelContext* context) : context_(context) {}

  const absl::Status& status() const { return status_; }
  void check(const absl::Status& status) { status_.Update(status); }

  // Null if the op has no such input.
  const tensorflow::Tensor* find(const char* name) {
    tensorflow::OpInputList list;
    check(context_->input_list(name, &list));
    return status_.ok() && list.size() > 0 ? &list[0] : nullptr;
  }

  const void* input(const char* name, const tensorflow::TensorShape& shape) {
    const tensorflow::Tensor* tensor = find(name);
    if (tensor == nullptr) return nullptr;
    if (tensor->shape() != shape)
      check(invalid(absl::StrCat(name, " must be of shape ", shape.DebugString(), ". Received: shape ",
                                 tensor->shape().DebugString())));
    return pointer(*tensor);
  }

  void* output(const char* name, const tensorflow::TensorShape& shape) {
    tensorflow::Tensor* tensor = nullptr;
    if (status_.ok()) check(context_->allocate_output(name, shape, &tensor));
    if (tensor == nullptr) return nullptr;
    prefer_huge_pages(tensor->data(), tensor->TotalBytes());
    return pointer(*tensor);
  }

  // As output(), in the memory of this input if there is one that nobody else refers to: lines that were just read are
  // in cache, those of new memory are not (ResNet-50 at batch 1: -2 %). Large results go past the caches, and past
  // lines that are there they take longer (batch 16: +1 to +3 %).
  void* output_over(const char* input, const char* name, const tensorflow::TensorShape& shape) {
    constexpr int64_t kMaxBytes = 4 << 20;
    const tensorflow::Tensor* over = find(input);
    if (over == nullptr || over->TotalBytes() > kMaxBytes) return output(name, shape);
    int from = 0, to = 0, end = 0;
    check(context_->op_kernel().InputRange(input, &from, &end));
    check(context_->op_kernel().OutputRange(name, &to, &end));
    tensorflow::Tensor* tensor = nullptr;
    if (status_.ok()) check(context_->forward_input_or_allocate_output({from}, to, shape, &tensor));
    return tensor == nullptr ? nullptr : pointer(*tensor);
  }

  // An output that is there for nobody.
  void* empty_output(const char* name) { return output(name, tensorflow::TensorShape({0, 0, 0, 0})), nullptr; }

  bool flag(const char* name) {
    const tensorflow::Tensor* tensor = find(name);
    if (tensor == nullptr) return false;
    if (tensor->dims() == 0) return tensor->scalar<bool>()();
    check(invalid(absl::StrCat(name, " must be a scalar. Received: shape ", tensor->shape().DebugString())));
    return false;
  }

  std::array<int64_t, 4> sizes(const char* name) {
    std::array<int64_t, 4> result{};
    const tensorflow::Tensor* tensor = find(name);
    if (tensor != nullptr && tensor->dims() == 4)
      for (int i = 0; i < 4; ++i) result[i] = tensor->dim_size(i);
    else if (tensor != nullptr)
      check(
          invalid(absl::StrCat(name, " must be a tensor of rank 4. Received: shape ", tensor->shape().DebugString())));
    return result;
  }

 private:
  // A tensor without elements has no memory, but to the core null means "not there".
  static void* pointer(const tensorflow::Tensor& tensor) {
    alignas(64) static char nothing[64];
    return tensor.NumElements() > 0 ? tensor.data() : nothing;
  }

  tensorflow::OpKernelContext* context_;
  absl::Status status_;
};

}  // namespace fusedconvbn::tf
