// The tensors of one call.
#pragma once

#include <array>

#include "attributes.h"
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
  virtual ~Tensors() = default;

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

  virtual void* output(const Port& port, const tensorflow::TensorShape& shape) {
    tensorflow::Tensor* tensor = nullptr;
    if (status_.ok()) check(context_->allocate_output(port.index, shape, &tensor));
    return tensor == nullptr ? nullptr : pointer(*tensor);
  }

  // As output(), in the memory of this input, if there is one that nobody else refers to.
  virtual void* output_over(const Port& over, const Port& port, const tensorflow::TensorShape& shape) {
    void* const used = take_over(over, port, shape);
    return used != nullptr ? used : output(port, shape);
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

 protected:
  // Null if nobody else must refer to the input, and somebody does.
  void* take_over(const Port& over, const Port& port, const tensorflow::TensorShape& shape) {
    tensorflow::Tensor* tensor = nullptr;
    const bool taken = status_.ok() && over.index >= 0 &&
                       context_->forward_input_to_output_with_shape(over.index, port.index, shape, &tensor);
    return taken ? pointer(*tensor) : nullptr;
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
