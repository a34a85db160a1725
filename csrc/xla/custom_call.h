// The custom calls by which an XLA program runs our kernels: what the compiler writes, and the handlers read.
//
//   operands    the op's inputs, all of them, in its order
//   results     on a GPU the workspace, as bytes; the op's outputs, all of them, in its order; those without elements
//               are not wanted
//   attributes  the problem: kIntegers and kNumbers
//
// `training` of the attributes is what the program was compiled for: with a switch that only run time tells, true, as
// that needs all results. On the CPU the operand tells it. On a GPU, where the host cannot read the operand, it holds:
// the program has a call for each, and chooses.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

#include "../conv_bn.h"

namespace fusedconvbn::xla {

inline constexpr char kForward[] = "fusedconvbn_forward", kBackward[] = "fusedconvbn_backward";
inline constexpr char kCudaForward[] = "fusedconvbn_cuda_forward", kCudaBackward[] = "fusedconvbn_cuda_backward";
inline constexpr char kIntegers[] = "integers", kNumbers[] = "numbers";

// Calls visit(field) for every field of ConvBnParams that is no floating-point number, in an order of no meaning.
template <class Params, class Visit>
void visit_integers(Params& p, Visit visit) {
  visit(p.dtype), visit(p.data_format);
  visit(p.batch), visit(p.in_height), visit(p.in_width), visit(p.in_channels);
  visit(p.filter_height), visit(p.filter_width), visit(p.out_channels), visit(p.groups);
  visit(p.stride_height), visit(p.stride_width), visit(p.dilation_height), visit(p.dilation_width);
  visit(p.pad_top), visit(p.pad_bottom), visit(p.pad_left), visit(p.pad_right);
  visit(p.out_height), visit(p.out_width);
  visit(p.activation), visit(p.has_residual), visit(p.training), visit(p.unbiased_moving_variance);
  visit(p.algorithm), visit(p.save), visit(p.saved), visit(p.has_output);
}

inline std::vector<int64_t> integers_of(const ConvBnParams& params) {
  std::vector<int64_t> result;
  visit_integers(params, [&](const auto& field) { result.push_back(static_cast<int64_t>(field)); });
  return result;
}

// False if they are not as many as there are fields.
template <class Integers, class Numbers>
bool read_params(const Integers& integers, const Numbers& numbers, ConvBnParams* params) {
  size_t count = 0;
  visit_integers(*params, [&](const auto&) { ++count; });
  if (integers.size() != count || numbers.size() != 2) return false;
  auto next = integers.begin();
  visit_integers(*params, [&](auto& field) { field = static_cast<std::decay_t<decltype(field)>>(*next++); });
  params->epsilon = numbers.begin()[0];
  params->momentum = numbers.begin()[1];
  return true;
}

// As an MLIR dictionary, which XLA parses.
inline std::string attributes_of(const ConvBnParams& params) {
  std::string text = std::string("{") + kIntegers + " = array<i64: ";
  const char* separator = "";
  for (int64_t value : integers_of(params)) text += separator + std::to_string(value), separator = ", ";
  char numbers[80];
  std::snprintf(numbers, sizeof(numbers), "%.17e, %.17e", params.epsilon, params.momentum);
  return text + ">, " + kNumbers + " = array<f64: " + numbers + ">}";
}

}  // namespace fusedconvbn::xla
