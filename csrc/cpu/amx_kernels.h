// What is computed on AMX; plain structs, as in kernels.h, which includes it.
#pragma once

#include <stdint.h>

#include "../activation.h"
#include "elementwise_blocks.h"

namespace fusedconvbn {

// Rows of bfloat16 at equal distances times packed filters. A step is a chunk of a tap's depth: of its row r, the chunk
// lies at rows + step_offset[step] + r * stride, its filters step * filter_step behind the first ones, and those of the
// right half of the columns filter_half behind the left; all in elements.
struct AmxRows {
  const uint16_t* rows;
  int64_t stride;
  const int64_t* step_offset;  // [taps * chunks]
  int64_t taps, chunks, chunk;
  int64_t filter_step, filter_half;
  int64_t count;  // at least 32, or there is memory behind the last row: whole tiles are read
};

// Memory that is fetched into L2 while products are computed: so many lines, at this distance, for each step, which is
// the product of 32 rows by 32 columns and a chunk of the depth.
struct AmxFetch {
  const char *at, *end;
  int64_t distance, lines;
};

// A tile's rows that are emitted while products of the next tile are computed, which leave the vector units idle.
struct AmxEmission {
  void (*emit)(const AffineBlock<float>&);
  AffineBlock<float> block;  // at the next row; y and residual are bfloat16
  const char* ahead;         // the residual of the tile that is being computed, or null: rows of it are fetched
  int64_t rows, row;         // that are left; of the next in the tile
  int64_t line, width, gap;  // rows left of a line, rows of a line, rows of the tile between two
  int64_t slice, steps;      // rows emitted at once, and how many steps, or products, apart
  int64_t wait;              // of these up to the next slice
};

struct AmxLineBlocks;  // amx_lines.h

// What is done besides products.
struct AmxAside {
  AmxFetch fetch;
  AmxEmission emission;  // with no rows left: nothing
};

// The depth of a product in pieces: a piece is `depth` rows, a multiple of 32, and lies so many elements behind the
// last.
struct AmxPieces {
  const uint16_t* columns;
  int64_t ld, columns_step;
  const uint16_t* panel;
  int64_t panel_step;
  int64_t pieces, depth;
};

// A panel of packed filters: [taps][chunks][2 halves of the panel], or [2 halves][chunks][taps], of [chunk / 2]
// [16 columns][2], the last pair being the elements 2i and 2i + 1 of the depth.
struct AmxKernels {
  // Between these a thread's tiles are set up for rows of `chunk` elements, even, at most 32.
  void (*begin)(int64_t chunk);
  void (*end)();
  // As InPlaceKernels::apply, d_conv also of bfloat16.
  void (*apply[kActivationCount][3])(const GradientBlock<float>&);
  // Of dy, and of the output in `extra` where there is an activation: adds the sums of du, and stores it as d_conv and
  // as d_residual, of bfloat16, either of which may be null. Null for activations that need more.
  void (*mask[kActivationCount])(const GradientBlock<float>&);
  // tile[count][32] = the sum over taps and chunks of rows * filters; whole 32 rows of `tile` are written.
  void (*multiply)(const AmxRows& rows, const uint16_t* filters, float* tile, int64_t ld, AmxAside* aside);
  // The same block by block, of 32 or 64 rows. Each is left to be emitted during the products of the next, line by
  // line, as affine_of_tile of this activation does but for rounding; so is what is left when this is called. Null for
  // activations that take longer.
  void (*multiply_lines[kActivationCount])(AmxLineBlocks* blocks, AmxAside* aside);
  // Emits the rows that are left.
  void (*emit)(AmxEmission* emission);
  // `count` pixels of so many elements, which lie and are to lie at these distances.
  void (*copy_pixels)(const uint16_t* from, int64_t distance, int64_t count, int64_t elements, uint16_t* to,
                      int64_t to_distance);
  // Packs a tap: element k of its depth has the columns at rows[k], or is 0 where rows[k] is null; cols <= 32, the
  // others are 0. Chunks and halves of the panel are to lie at these distances.
  void (*pack)(const uint16_t* const* rows, int64_t column_stride, int64_t cols, int64_t chunks, int64_t chunk,
               uint16_t* packed, int64_t chunk_distance, int64_t half_distance);

  // For the gradient by the filters, rows are the depth; both fill up to a multiple of 32 of them with 0.
  // columns[cols][ld] = the transposed rows[count][stride]; cols is rounded up to a multiple of 32, the others
  // undefined.
  void (*transpose)(const uint16_t* rows, int64_t stride, int64_t count, int64_t cols, uint16_t* columns, int64_t ld);
  // Panels of 32 columns of rows[count][stride], each [depth / 2][32][2]: as filters.
  void (*pairs)(const uint16_t* rows, int64_t stride, int64_t count, int64_t cols, uint16_t* panels);
  // sums[32][32] = or += the sum over pieces of columns[32][ld] * panel[depth / 2][32][2], as set up by begin(32).
  void (*outer)(const AmxPieces& pieces, bool add, float* sums);
};

}  // namespace fusedconvbn
