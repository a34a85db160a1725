// What AMX computes in blocks that are emitted line by line (amx_lines.inl).
#pragma once

#include "kernels.h"

namespace fusedconvbn {

// 32 or 64 rows by `panels` panels of filters, which lie `distance` elements apart, in blocks of one panel or two.
struct AmxLineBlocks {
  AmxRows rows;
  const uint16_t* filters;
  int64_t distance, panels, width;  // panels of a block
  float* tile[2];                   // [rows.count][32 * width]: of the next block, of the last
  AmxEmission emission;             // of all columns; without z, `ahead` and `wait`
};

}  // namespace fusedconvbn
