// The parts of a kernel set that serve one compute type: float, or double for float64 data.
#pragma once

#include "../conv_bn.h"
#include "kernels.h"

namespace fusedconvbn {

template <class C>
const ComputeKernels<C>& compute_kernels(const KernelSet& set);
template <>
inline const ComputeKernels<float>& compute_kernels<float>(const KernelSet& set) {
  return set.f32;
}
template <>
inline const ComputeKernels<double>& compute_kernels<double>(const KernelSet& set) {
  return set.f64;
}

template <class C>
struct Storage {
  StorageKernels<C> kernels;
  int64_t element_bytes;
  bool is_compute_type;
  RowType row_type = RowType::kCompute;
};

template <class C>
Storage<C> storage_of(const KernelSet& set, DType dtype);
template <>
inline Storage<float> storage_of<float>(const KernelSet& set, DType dtype) {
  if (dtype == DType::kFloat16) return {set.float16, 2, false, RowType::kFloat16};
  if (dtype == DType::kBFloat16) return {set.bfloat16, 2, false, RowType::kBFloat16};
  return {set.float32, 4, true};
}
template <>
inline Storage<double> storage_of<double>(const KernelSet& set, DType) {
  return {set.float64, 8, true};
}

// Calls f(float{}) or f(double{}), whichever the data type is computed in.
template <class F>
auto with_compute_type(DType dtype, F f) {
  return dtype == DType::kFloat64 ? f(double{}) : f(float{});
}

}  // namespace fusedconvbn
