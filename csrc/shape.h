// The shape rule: from a user's arguments to ConvBnParams, once, for every adapter.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "conv_bn.h"

namespace fusedconvbn {

enum class Padding { kValid, kSame, kExplicit };

// A user's arguments. Shapes are in the order of data_format; height before width everywhere.
struct ConvArguments {
  std::array<int64_t, 4> inputs_shape{};   // [N,H,W,C] or [N,C,H,W]
  std::array<int64_t, 4> filters_shape{};  // [kh,kw,C/groups,K]
  std::array<int64_t, 2> strides{1, 1}, dilations{1, 1};
  Padding padding = Padding::kValid;
  std::array<int64_t, 4> explicit_padding{};  // top, bottom, left, right; for Padding::kExplicit
};

// (before, after) of SAME: the output has ceil(in / stride) elements and the odd element of padding goes behind.
std::pair<int64_t, int64_t> same_padding(int64_t in, int64_t filter, int64_t stride, int64_t dilation);

// The number of window positions, as TensorFlow counts them: 0 where the dilated filter exceeds the padded input by
// less than two strides, negative (an error) where it exceeds it by more.
int64_t output_size(int64_t in, int64_t filter, int64_t stride, int64_t dilation, int64_t pad_before,
                    int64_t pad_after);

// Fills sizes, strides, dilations, paddings, groups and output sizes of *params, by its data_format. An error names the
// argument, what it got and what is accepted.
Status resolve(const ConvArguments& arguments, ConvBnParams* params);

// Checks sizes that resolve() has set, and the other fields; plan_*() begins with it.
Status validate(const ConvBnParams& params);

// Whether Winograd's algorithms, F(2x2, 3x3) and F(4x4, 3x3), can compute the problem.
bool winograd_applies(const ConvBnParams& params);

// Shape of the output in the order of data_format.
std::array<int64_t, 4> output_shape(const ConvBnParams& params);

}  // namespace fusedconvbn
