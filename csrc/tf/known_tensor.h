// The witness of a tensor's content for host::PackedFilters: a reference to it.
//
// An op sees tensors, not variables. Nobody writes to memory that somebody else refers to, so what is at the address
// of a tensor that is referred to is that tensor. That holds for all tensors but two kinds: those of TensorFlow 1's
// reference variables, which the attribute keep_filters excludes (ops.py), and those in memory of others, like a NumPy
// array's, which may_keep() excludes.
#pragma once

#include "tensorflow/core/common_runtime/dma_helper.h"
#include "tensorflow/core/framework/tensor.h"

namespace fusedconvbn::tf {

struct KnownTensor {
  tensorflow::Tensor tensor;

  bool confirms(const KnownTensor&) const { return true; }
  bool is_last() const { return tensor.RefCountIsOne(); }

  // Whether TensorFlow owns the tensor's memory: the owner of any other may write to it at any time. Not of slices:
  // they hold the whole, and each other's references would pass for somebody's.
  static bool may_keep(tensorflow::Tensor tensor) {
    tensorflow::TensorBuffer* const buffer = tensorflow::DMAHelper::buffer(&tensor);
    return buffer != nullptr && buffer->root_buffer() == buffer && buffer->OwnsMemory();
  }
};

}  // namespace fusedconvbn::tf
