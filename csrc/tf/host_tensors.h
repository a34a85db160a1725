// The tensors of a call on the CPU: results in large pages, and where they can in memory that was in use.
#pragma once

#include <optional>

#include "../host/memory.h"
#include "output_memory.h"
#include "tensors.h"

namespace fusedconvbn::tf {

class HostTensors : public Tensors {
 public:
  using Tensors::Tensors;

  void* output(const Port& port, const tensorflow::TensorShape& shape) override {
    void* const data = Tensors::output(port, shape);
    if (data != nullptr) host::prefer_huge_pages(data, bytes_of(port, shape));
    return data;
  }

  // In that of the input, which was just read (ResNet-50 at batch 1: -2 %), else in what results have given back. Large
  // results go past the caches, and past lines that are there, as an input's are, they take longer (batch 16: +1 to
  // +3 %).
  void* output_over(const Port& over, const Port& port, const tensorflow::TensorShape& shape) override {
    const size_t bytes = bytes_of(port, shape);
    if (void* const used = bytes <= OutputMemory::kMaxCached ? take_over(over, port, shape) : nullptr) return used;
    if (!status().ok() || bytes < OutputMemory::kMinBytes || !any_memory_will_do(port)) return output(port, shape);
    const std::optional<tensorflow::Tensor> kept =
        OutputMemory::of(bytes)->take(context_->expected_output_dtype(port.index), shape);
    if (!kept) return output(port, shape);
    context_->set_output(port.index, *kept);
    return pointer(*kept);
  }

 private:
  size_t bytes_of(const Port& port, const tensorflow::TensorShape& shape) const {
    return shape.num_elements() * tensorflow::DataTypeSize(context_->expected_output_dtype(port.index));
  }

  // No device or network is to read it, and nobody asked which allocations there are.
  bool any_memory_will_do(const Port& port) const {
    const tensorflow::AllocatorAttributes wanted = context_->output_alloc_attr(port.index);
    return wanted.value == 0 && wanted.scope_id <= 0 && !context_->track_allocations();
  }
};

}  // namespace fusedconvbn::tf
