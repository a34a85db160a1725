// The tensors of one call.
#pragma once

#include <array>
#include <optional>

#include "attributes.h"
#include "memory.h"
#include "output_memory.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace fusedconvbn::tf {

// Where a kernel has the input or the output of that name. Found once: to look a name up takes a call longer than to
// use what is found, where other kernels have driven the tables out of the caches.
struct Port {
  const char* name;
  int index;  // -1: the kernel has none
};

// Of a list, which holds one tensor at the most, its first.
inline Port port_at(const char* name, const absl::Status& found, int begin, int end) {
  return {name, found.ok() && begin < end ? begin : -1};
}

inline Port input_port(const tensorflow::OpKernel& kernel, const char* name) {
  int begin = 0, end = 0;
  const absl::Status found = kernel.InputRange(name, &begin, &end);
  return port_at(name, found, begin, end);
}

inline Port output_port(const tensorflow::OpKernel& kernel, const char* name) {
  int begin = 0, end = 0;
  const absl::Status found = kernel.OutputRange(name, &begin, &end);
  return port_at(name, found, begin, end);
}

// The op's tensors as the core's pointers, each checked. The first error stays; after one, nothing that was handed out
// may be used.
class Tensors {
 public:
  explicit Tensors(tensorflow::OpKernelContext* context) : context_(context) {}

  const absl::Status& status() const { return status_; }
  void check(const absl::Status& status) { status_.Update(status); }

  // Null if the op has no such input.
  const tensorflow::Tensor* find(const Port& port) { return port.index < 0 ? nullptr : &context_->input(port.index); }

  const void* input(const Port& port, const tensorflow::TensorShape& shape) {
    const tensorflow::Tensor* tensor = find(port);
    if (tensor == nullptr) return nullptr;
    if (tensor->shape() != shape)
      check(invalid(absl::StrCat(port.name, " must be of shape ", shape.DebugString(), ". Received: shape ",
                                 tensor->shape().DebugString())));
    return pointer(*tensor);
  }

  void* output(const Port& port, const tensorflow::TensorShape& shape) {
    tensorflow::Tensor* tensor = nullptr;
    if (status_.ok()) check(context_->allocate_output(port.index, shape, &tensor));
    if (tensor == nullptr) return nullptr;
    prefer_huge_pages(tensor->data(), tensor->TotalBytes());
    return pointer(*tensor);
  }

  // As output(), in memory that was in use: in that of this input, which was just read, if there is one that nobody
  // else refers to (ResNet-50 at batch 1: -2 %), else in what results have given back. Large results go past the
  // caches, and past lines that are there, as an input's are, they take longer (batch 16: +1 to +3 %).
  void* output_in_used_memory(const Port& over, const Port& port, const tensorflow::TensorShape& shape) {
    const tensorflow::DataType dtype = context_->expected_output_dtype(port.index);
    const size_t bytes = shape.num_elements() * tensorflow::DataTypeSize(dtype);
    if (!status_.ok()) return nullptr;
    tensorflow::Tensor* tensor = nullptr;
    if (bytes <= OutputMemory::kMaxCached && over.index >= 0 &&
        context_->forward_input_to_output_with_shape(over.index, port.index, shape, &tensor))
      return pointer(*tensor);
    if (bytes < OutputMemory::kMinBytes || !any_memory_will_do(port)) return output(port, shape);
    const std::optional<tensorflow::Tensor> kept = OutputMemory::of(bytes)->take(dtype, shape);
    if (!kept) return output(port, shape);
    context_->set_output(port.index, *kept);
    return pointer(*kept);
  }

  // Null if nothing in the graph reads it: then there need be no tensor.
  void* output_if_read(const Port& port, const tensorflow::TensorShape& shape) {
    return context_->output_required(port.index) ? output(port, shape) : nullptr;
  }

  // Without elements.
  void* empty_output(const Port& port) { return output_if_read(port, tensorflow::TensorShape({0, 0, 0, 0})), nullptr; }

  bool flag(const Port& port) {
    const tensorflow::Tensor* tensor = find(port);
    if (tensor == nullptr) return false;
    if (tensor->dims() == 0) return tensor->scalar<bool>()();
    check(invalid(absl::StrCat(port.name, " must be a scalar. Received: shape ", tensor->shape().DebugString())));
    return false;
  }

  std::array<int64_t, 4> sizes(const Port& port) {
    std::array<int64_t, 4> result{};
    const tensorflow::Tensor* tensor = find(port);
    if (tensor != nullptr && tensor->dims() == 4)
      for (int i = 0; i < 4; ++i) result[i] = tensor->dim_size(i);
    else if (tensor != nullptr)
      check(invalid(
          absl::StrCat(port.name, " must be a tensor of rank 4. Received: shape ", tensor->shape().DebugString())));
    return result;
  }

 private:
  // No device or network is to read it, and nobody asked which allocations there are.
  bool any_memory_will_do(const Port& port) const {
    const tensorflow::AllocatorAttributes wanted = context_->output_alloc_attr(port.index);
    return wanted.value == 0 && wanted.scope_id <= 0 && !context_->track_allocations();
  }

  // A tensor without elements has no memory, but to the core null means "not there".
  static void* pointer(const tensorflow::Tensor& tensor) {
    alignas(64) static char nothing[64];
    return tensor.NumElements() > 0 ? tensor.data() : nothing;
  }

  tensorflow::OpKernelContext* context_;
  absl::Status status_;
};

}  // namespace fusedconvbn::tf
