// What is computed on AMX with floats cut in thirds (thirds.inl); plain structs, as in kernels.h.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace fusedconvbn {

// Operands of products of float32 on AMX (thirds.inl): of each number three of bfloat16, in planes, and in a fourth one
// the first without what is not finite, if there is any. For each 32 of the depth, of the left operand [planes][rows]
// [32], rows a multiple of 32; of the right one [planes][2 halves of its 32 columns][16 pairs][16 columns][2].
constexpr int64_t kThirdPlanes = 4;

// Of 32 rows from `left` on.
struct ThirdsProduct {
  const uint16_t* left;
  int64_t rows;
  const uint16_t* right;
  int64_t chunks;                    // of the depth
  bool careful_left, careful_right;  // whether the fourth plane is there
};

// Operands that are cut step by step: `step` pieces of 32 elements of a row, or, of the right side, rows by pairs.
// `careful` tells whether some number was not finite: then all is to be cut again.
struct ThirdsLeftCut {
  GatheredRows<float> in;
  int64_t rows;  // of the operand
  uint16_t* to;
  int64_t step;
  int64_t row, tap, column;  // of the next piece
  bool careful;
};
struct ThirdsRightCut {
  const float* from;
  int64_t ld, depth, cols;
  uint16_t* to;
  int64_t done, step;
  bool careful;
};

// What is done while a product is computed, at each 32 of its depth: the vector units are idle meanwhile. Operands that
// come next are cut, memory is fetched (some lines for each of the six products of thirds), rows of the tile before are
// emitted, and those that this one will be emitted to are asked for.
struct ThirdsAside {
  ThirdsLeftCut left;
  ThirdsRightCut right;
  AmxFetch fetch;
  void (*emit)(const AffineBlock<float>&);
  AffineBlock<float> block, next;  // at the next row
  int64_t rows, next_rows, slice;  // that are left; of a step
};

struct ThirdsKernels {
  // Make operands of what they read, whole chunks of the depth with zeros, and tell whether they wrote the fourth
  // plane. left: of each tap's rows, one after the other; or of one tap's columns, whose depth is the rows. Rows beyond
  // those of `in` are left as they are. right: from[depth][ld], cols <= 32; the fourth plane too if `careful`.
  bool (*left)(const GatheredRows<float>& in, int64_t rows, uint16_t* to);
  bool (*left_of_columns)(const GatheredRows<float>& in, int64_t rows, uint16_t* to);
  bool (*right)(const float* from, int64_t ld, int64_t depth, int64_t cols, bool careful, uint16_t* to);
  // tile[32][ld] = the product, or that added to it, between AmxKernels::begin(32) and end().
  void (*multiply)(const ThirdsProduct& product, bool add, float* tile, int64_t ld, ThirdsAside* aside);
  // What is left of these.
  void (*emit)(ThirdsAside* aside);
  void (*cut_left)(ThirdsLeftCut* cut);
  void (*cut_right)(ThirdsRightCut* cut);
};

}  // namespace fusedconvbn
