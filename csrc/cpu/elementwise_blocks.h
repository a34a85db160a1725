// What is computed element by element: blocks as in kernels.h, which includes it.
#pragma once

#include <stdint.h>

namespace fusedconvbn {

// Of each column: its mean, which is shift + offset, and the sum of squared deviations from it. In one number a mean
// that is far from 0 would be rounded more than means of blocks differ.
template <class C>
struct ColumnMoments {
  C *shift, *offset, *squares;
};

// y = activation((z - mean) * scale + beta + residual), for `cols` channels. The kernel says what types they point to.
template <class C>
struct AffineBlock {
  const void* z;
  int64_t ld_z;
  const void* residual;  // may be null
  int64_t ld_residual;
  void* y;
  int64_t ld_y;
  int64_t rows, cols;
  const C *mean, *scale, *beta;  // [cols]
  bool stream;                   // y past the caches; y and its rows aligned to 64 bytes, cols a multiple of 16
  // affine of float, which streams nothing then: z - mean as backward will read it, in bfloat16. May be null.
  uint16_t* rounded = nullptr;
  int64_t ld_rounded = 0;
};

// How the activation's argument u is had again.
enum class Preactivation { kConv, kConvAndResidual, kOutput };

// du = dy * activation'(u), u as in AffineBlock. The kernel says what types they point to.
template <class C>
struct GradientBlock {
  const void* dy;
  int64_t ld_dy;
  const void* z;
  int64_t ld_z;
  const void* extra;  // residual or output, as Preactivation says
  int64_t ld_extra;
  int64_t rows, cols;
  const C *mean, *scale, *beta;  // [cols]
  // reduce: sum_du += sum of du, sum_du_z += sum of du * (z - mean), sum_z += sum of z - mean, over the rows
  C *sum_du, *sum_du_z, *sum_z;  // [cols]
  // apply: d_conv = slope * du + curve * (z - mean) + offset; d_residual = du. With frozen statistics curve is null and
  // slope * du is all: 0 * z would be NaN where z is infinite.
  const C *slope, *curve, *offset;  // [cols]
  void* d_conv;
  int64_t ld_d_conv;
  void* d_residual;  // may be null
  int64_t ld_d_residual;
  bool stream;  // d_residual, as in AffineBlock; 16-bit numbers only
};

// du = dy * activation'(u) where that follows from y.
template <class C>
struct MaskBlock {
  const C* dy;
  int64_t ld_dy;
  const C* y;  // not read where there is no activation
  int64_t ld_y;
  int64_t rows, cols;
  C* du;
  int64_t ld_du;
  C* d_residual;  // may be null; = du
  int64_t ld_d_residual;
  C* sum;  // [cols] += sum of du over the rows
};

}  // namespace fusedconvbn
