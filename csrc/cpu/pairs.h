// Products of bfloat16 by AVX512_BF16: an instruction multiplies pairs and adds both products to a float.
//
// A pair fills 32 bits, as a float does. So to the direct convolution an image of bfloat16 is one of floats with half
// as many channels, and nothing but the product itself and the packing of filters need know better.
#pragma once

#include "kernels.h"

namespace fusedconvbn {

struct PairKernels {
  // As ComputeKernels::gemm, of depths in pairs.
  void (*gemm)(const GatheredRows<float>& rows, const Filters<float>& filters, const GemmOutput<float>& to);
  StorageKernels<float> images;   // 32 bits as they are; those that load
  StorageKernels<float> filters;  // load: row r of a block is of rows 2 r and 2 r + 1 of memory
};

extern const PairKernels kPairKernels;

}  // namespace fusedconvbn
