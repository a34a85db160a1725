// Products of matrices that are never laid out: `Operands` says where their elements are, what they are multiplied with
// and what becomes of the sums. The plain kernel of every convolution and of its gradients: any shape, any type.
//
//   int64_t slices, rows, cols            independent products, and the size of each
//   Span depth(slice)                     what is summed over
//   Row row(slice, r), Depth at(slice, d) what a row, an element of the depth is, computed once for many elements
//   a(Row, Depth), b(slice, Depth, c)     the elements
//   emit(slice, r, c, sum)
//   kDepthFirstA, kDepthFirstB            whether neighbours along the depth are neighbours in memory
#pragma once

#include "element.h"
#include "launch.h"

namespace fusedconvbn::cuda {

constexpr int kTile = 64, kTileDepth = 16;  // of sums a block, and what of the depth lies in shared memory at once
constexpr int kOwn = 4;                     // a thread has kOwn x kOwn sums
constexpr int kLoads = kTile * kTileDepth / kThreads;  // a thread brings of each matrix
static_assert((kTile / kOwn) * (kTile / kOwn) == kThreads, "a thread for each kOwn x kOwn sums");

struct Span {
  int64_t begin, end;
};

// The element of a tile [kTileDepth][kTile] that a thread brings as its i-th: neighbouring threads bring neighbours.
struct Place {
  int depth, along;
};
template <bool kDepthFirst>
FCB_INLINE Place place_of(int thread, int i) {
  const int number = thread + i * kThreads;
  return kDepthFirst ? Place{number % kTileDepth, number / kTileDepth} : Place{number / kTile, number % kTile};
}

template <class Operands>
__global__ void __launch_bounds__(kThreads) multiply(Operands in) {
  using C = typename Operands::Sum;
  __shared__ C a[kTileDepth][kTile + 1], b[kTileDepth][kTile + 1];  // + 1: columns of a tile are in different banks
  const int thread = threadIdx.x;
  const int64_t col_tiles = ceil_div(in.cols, kTile), row_tiles = ceil_div(in.rows, kTile);
  const int64_t slice = blockIdx.x / (row_tiles * col_tiles), tile = blockIdx.x % (row_tiles * col_tiles);
  const int64_t first_row = tile / col_tiles * kTile, first_col = tile % col_tiles * kTile;

  typename Operands::Row rows[kLoads];
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = first_row + place_of<Operands::kDepthFirstA>(thread, i).along;
    rows[i] = in.row(slice, row < in.rows ? row : 0);
  }

  C sums[kOwn][kOwn] = {};
  const int own_row = thread / (kTile / kOwn), own_col = thread % (kTile / kOwn);
  const Span depth = in.depth(slice);
  for (int64_t d = depth.begin; d < depth.end; d += kTileDepth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Place p = place_of<Operands::kDepthFirstA>(thread, i);
      const bool inside = first_row + p.along < in.rows && d + p.depth < depth.end;
      a[p.depth][p.along] = inside ? in.a(rows[i], in.at(slice, d + p.depth)) : C(0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Place p = place_of<Operands::kDepthFirstB>(thread, i);
      const bool inside = first_col + p.along < in.cols && d + p.depth < depth.end;
      b[p.depth][p.along] = inside ? in.b(slice, in.at(slice, d + p.depth), first_col + p.along) : C(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k)
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int c = 0; c < kOwn; ++c)  // of each 64 the rows and columns own_row, own_row + 16, ..
          sums[r][c] += a[k][own_row + r * (kTile / kOwn)] * b[k][own_col + c * (kTile / kOwn)];
    __syncthreads();
  }

  for (int r = 0; r < kOwn; ++r)
    for (int c = 0; c < kOwn; ++c) {
      const int64_t row = first_row + own_row + r * (kTile / kOwn), col = first_col + own_col + c * (kTile / kOwn);
      if (row < in.rows && col < in.cols) in.emit(slice, row, col, sums[r][c]);
    }
}

template <class Operands>
void launch_multiply(const Operands& in, void* stream) {
  launch(multiply<Operands>, in.slices * ceil_div(in.rows, kTile) * ceil_div(in.cols, kTile), stream, in);
}

}  // namespace fusedconvbn::cuda
