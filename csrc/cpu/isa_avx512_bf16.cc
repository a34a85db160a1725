// The direct convolution's products of bfloat16, compiled for AVX512_BF16.
#if defined(__x86_64__)
#define FCB_VECTOR_BYTES 64
#define FCB_TILE_ROWS 12
#define FCB_PAIRS
#include "isa_vectors.inl"
#include "pairs.h"

namespace fusedconvbn {
namespace {
#include "half_vectors.inl"

#include "storage.inl"  // by half_vectors.inl

#include "elementwise.inl"

#include "tile_results.inl"

#include "gemm.inl"

#include "outer.inl"

static void load_pairs(const void* memory, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t cols,
                       float* block, int64_t ld) {
  if (row_stride == 1 && column_stride % 2 == 0)  // pairs as they lie
    return transpose(static_cast<const float*>(memory), column_stride / 2, cols, rows, block, ld);
  const uint16_t* low = static_cast<const uint16_t*>(memory);
  for (int64_t r = 0; r < rows; ++r, low += 2 * row_stride, block += ld)
    for (int64_t c = 0; c < cols; ++c) {
      const uint16_t* const from = low + c * column_stride;
      const uint32_t pair = from[0] | static_cast<uint32_t>(from[row_stride]) << 16;
      __builtin_memcpy(block + c, &pair, sizeof pair);
    }
}
}  // namespace

extern constexpr PairKernels kPairKernels = {
    gemm<float>, {load_block<float, float>, nullptr, load_rows<float, float>, {}}, {load_pairs, nullptr, nullptr, {}}};

}  // namespace fusedconvbn
#endif
