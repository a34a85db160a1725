// Products of matrices as multiply.cuh has them, of 16-bit numbers by tensor cores (sm_80 and later), sums in float.
//
// Eight neighbours in memory, a chunk, are read at once: along the depth, or along the rows or columns. Copies into
// shared memory run kStages - 1 tiles ahead of the products. `Operands` says
//
//   int64_t slices; int rows, cols        independent products, and the size of each: cols a multiple of 8, and rows
//                                         unless kDepthFirstA
//   Slice slice(number)                   one of them; slice.depth: how many products a sum has, a multiple of 8 where
//                                         an operand is depth-first
//   LineA line_a(slice, r)                what of a chunk its row tells, or the first of its rows; r may be too large
//   PointA point_a(slice, d)              what its depth tells, or the first of it; d may be too large
//   const T* a(LineA, PointA)             the chunk; null: zeros, as for what is too large
//   line_b, point_b, b                    the same of columns
//   shared_by_rows(slice, c)              what of columns c .. c + 7 all rows need
//   emit(slice, r, c, that, sums)         of columns c .. c + 7
//   const T* anywhere()                   memory that may be read
//   kMeasures, measured(..)               whether, and to whom, a tile's moments of each column go: its first row, and
//                                         the sums of what lies beyond it, and of the squares, of numbers as T holds
//                                         them
#pragma once

#include <cstdlib>
#include <cstring>

#include "warp.cuh"

namespace fusedconvbn::cuda {

constexpr int kTensorDepth = 32;

// How a block of 256 threads shares sums out: its tile, the columns of a warp's, how many tiles of the operands are
// under way, and how many blocks a processor is to have. The larger a warp's part, the less it reads for a product.
template <int kRowsOfTile, int kColsOfTile, int kColsOfWarp, int kStagesAhead, int kBlocksAtOnce>
struct TensorShape {
  static constexpr int kRows = kRowsOfTile, kCols = kColsOfTile, kWarpCols = kColsOfWarp, kStages = kStagesAhead,
                       kBlocks = kBlocksAtOnce;
};
using WideTiles = TensorShape<256, 128, 64, 4, 1>;
using SquareTiles = TensorShape<128, 128, 32, 3, 2>;
using NarrowTiles = TensorShape<128, 64, 32, 3, 2>;

enum class Tiles { kWide, kSquare, kNarrow };

// What FUSEDCONVBN_GPU_TILES asks for, by the first letter; 0: nothing.
inline char asked_tiles() {
  const char* const asked = std::getenv("FUSEDCONVBN_GPU_TILES");
  return asked == nullptr ? '\0' : *asked;
}
// Null, or that it asks for what there is not.
inline const char* wrong_tiles() {
  const char* const asked = std::getenv("FUSEDCONVBN_GPU_TILES");
  for (const char* known : {"", "wide", "square", "narrow"})
    if (asked == nullptr || std::strcmp(asked, known) == 0) return nullptr;
  return "FUSEDCONVBN_GPU_TILES must be wide, square or narrow";
}

// Wide ones where there are two for each processor of a large GPU. The problem alone decides, so that results do not
// depend on the machine.
inline Tiles tiles_for(int64_t rows, int64_t cols, int64_t slices) {
  constexpr int64_t kProcessors = 132;
  const int64_t wide = ceil_div(rows, WideTiles::kRows) * ceil_div(cols, WideTiles::kCols) * slices;
  switch (asked_tiles()) {
    case 'w': return Tiles::kWide;
    case 's': return Tiles::kSquare;
    case 'n': return Tiles::kNarrow;
  }
  if (cols <= NarrowTiles::kCols) return Tiles::kNarrow;
  return wide >= 2 * kProcessors ? Tiles::kWide : Tiles::kSquare;
}

// A tile of an operand in shared memory, kAlong rows (or columns) by kTensorDepth: in lines of one of them, or of one
// depth. Chunks change places within a line so that the eight that are read at once lie in different banks.
template <int kAlong, bool kDepthFirst>
struct TensorTile {
  static constexpr int kLine = (kDepthFirst ? kTensorDepth : kAlong) / kEight;  // chunks
  static constexpr int kChunks = kAlong * kTensorDepth / kEight, kOfThread = kChunks / kThreads;
  static_assert(kChunks % kThreads == 0 && kThreads % kLine == 0, "a thread's chunks are one above the other");

  FCB_DEVICE_MEMBER static int at(int line, int chunk) {
    return line * kLine + (kDepthFirst ? chunk ^ (line >> 1 & 3) : chunk ^ (line & 7));
  }
  // The i-th chunk that a thread brings.
  FCB_DEVICE_MEMBER static int line(int thread, int i) { return thread / kLine + i * (kThreads / kLine); }
  FCB_DEVICE_MEMBER static int chunk(int thread) { return thread % kLine; }
  FCB_DEVICE_MEMBER static int place(int thread, int i) { return at(line(thread, i), chunk(thread)); }
  FCB_DEVICE_MEMBER static int along(int thread, int i) {
    return kDepthFirst ? line(thread, i) : chunk(thread) * kEight;
  }
  FCB_DEVICE_MEMBER static int depth(int thread, int i) {
    return kDepthFirst ? chunk(thread) * kEight : line(thread, i);
  }

  // Of four matrices, those at (along, depth), 8 further along, 8 deeper, and both; `kDeeperFirst`: in the other order.
  template <bool kDeeperFirst>
  FCB_DEVICE_MEMBER static void load(const Eight* tile, int lane, int along, int depth, uint32_t (&to)[4]) {
    const int first = lane / 8 % 2 * 8, second = lane / 16 * 8;
    along += kDeeperFirst ? second : first, depth += kDeeperFirst ? first : second;
    const int row = lane % 8;
    load_matrices<!kDepthFirst>(
        to, tile + (kDepthFirst ? at(along + row, depth / kEight) : at(depth + row, along / kEight)));
  }
};

// A thread's part of a block's tile of sums.
template <class Operands, class Shape>
class TensorProduct {
  using T = typename Operands::Element;
  static constexpr int kRows = Shape::kRows, kCols = Shape::kCols, kWarpCols = Shape::kWarpCols;
  static constexpr int kStages = Shape::kStages;
  using A = TensorTile<kRows, Operands::kDepthFirstA>;
  using B = TensorTile<kCols, Operands::kDepthFirstB>;
  static constexpr int kWarpsAcross = kCols / kWarpCols, kWarpRows = kRows / (kThreads / kWarp / kWarpsAcross);
  static constexpr int kHigh = kWarpRows / 16, kWide = kWarpCols / 8;  // a warp's sums in matrices of 16 x 8
  static constexpr int kStage = A::kChunks + B::kChunks;
  static constexpr int kPitch = kWarpCols + 4;  // of sums on their way out: rows begin in different banks

 public:
  static constexpr int kChunks = kStages * kStage;  // of shared memory
  static_assert(kThreads / kWarp * 16 * kPitch * sizeof(float) <= kChunks * sizeof(Eight), "all warps' way out");

  FCB_DEVICE_MEMBER TensorProduct(const Operands& in, Eight* memory, int block, int thread)
      : in_(in), memory_(memory), thread_(thread), slice_(in.slice(block / of_slice(in))) {
    const int tile = block % of_slice(in), col_tiles = tiles(in.cols, kCols);
    row_ = tile / col_tiles * kRows, col_ = tile % col_tiles * kCols;
#pragma unroll
    for (int i = 0; i < A::kOfThread; ++i) lines_a_[i] = in.line_a(slice_, row_ + A::along(thread, i));
#pragma unroll
    for (int i = 0; i < B::kOfThread; ++i) lines_b_[i] = in.line_b(slice_, col_ + B::along(thread, i));
  }

  FCB_DEVICE_MEMBER void run() {
    const int steps = tiles(slice_.depth, kTensorDepth);
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) bring(step, steps);
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // what all threads brought is there, and the stage that is written next is read no more
      bring(step + kStages - 1, steps);
      multiply_stage(memory_ + step % kStages * kStage);
    }
    wait_for_copies<0>();
    __syncthreads();
    hand_out();
  }

  static FCB_INLINE_MEMBER int tiles(int size, int tile) { return (size + tile - 1) / tile; }
  // Tiles of a slice.
  static FCB_INLINE_MEMBER int of_slice(const Operands& in) { return tiles(in.rows, kRows) * tiles(in.cols, kCols); }

 private:
  // A group of copies, empty behind the last step.
  FCB_DEVICE_MEMBER void bring(int step, int steps) {
    if (step < steps) {
      Eight* const a = memory_ + step % kStages * kStage;
      const int depth = step * kTensorDepth;
      bring_tile<A, Operands::kDepthFirstA>(
          a, [&](int of_tile) { return in_.point_a(slice_, depth + of_tile); },
          [&](int i, const auto& point) { return in_.a(lines_a_[i], point); });
      bring_tile<B, Operands::kDepthFirstB>(
          a + A::kChunks, [&](int of_tile) { return in_.point_b(slice_, depth + of_tile); },
          [&](int i, const auto& point) { return in_.b(lines_b_[i], point); });
    }
    commit_copies();
  }
  // Depth-first, all chunks of a thread are of one depth.
  template <class Tile, bool kDepthFirst, class PointOf, class ChunkOf>
  FCB_DEVICE_MEMBER void bring_tile(Eight* to, const PointOf& point_of, const ChunkOf& chunk_of) {
    auto point = point_of(Tile::depth(thread_, 0));
#pragma unroll
    for (int i = 0; i < Tile::kOfThread; ++i) {
      if (i > 0 && !kDepthFirst) point = point_of(Tile::depth(thread_, i));
      copy_async(to + Tile::place(thread_, i), chunk_of(i, point), in_.anywhere());
    }
  }

  FCB_DEVICE_MEMBER int lane() const { return thread_ % kWarp; }
  FCB_DEVICE_MEMBER int warp_row() const { return thread_ / kWarp / kWarpsAcross * kWarpRows; }
  FCB_DEVICE_MEMBER int warp_col() const { return thread_ / kWarp % kWarpsAcross * kWarpCols; }

  FCB_DEVICE_MEMBER void multiply_stage(const Eight* a) {
#pragma unroll
    for (int depth = 0; depth < kTensorDepth; depth += 16) {
      uint32_t left[kHigh][4], right[kWide / 2][4];  // of `right`, each holds two matrices of 16 x 8
#pragma unroll
      for (int i = 0; i < kHigh; ++i) A::template load<false>(a, lane(), warp_row() + 16 * i, depth, left[i]);
#pragma unroll
      for (int j = 0; j < kWide / 2; ++j)
        B::template load<true>(a + A::kChunks, lane(), warp_col() + 16 * j, depth, right[j]);
#pragma unroll
      for (int i = 0; i < kHigh; ++i)
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const uint32_t of[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          multiply_add(sums_[i][j], left[i], of, T{});
        }
    }
  }

  // Through shared memory, each warp by itself, so that a thread has neighbours in a row.
  FCB_DEVICE_MEMBER void hand_out() {
    float* const way = reinterpret_cast<float*>(memory_) + thread_ / kWarp * 16 * kPitch;
    const int channel = col_ + warp_col() + own_columns();
    const bool inside = channel < in_.cols;
    const auto columns = in_.shared_by_rows(slice_, inside ? channel : 0);
    Moments moments;
    if constexpr (Operands::kMeasures) moments = begin_moments();
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          way[(lane() / 4 + k / 2 * 8) * kPitch + j * 8 + lane() % 4 * 2 + k % 2] = sums_[i][j][k];
      __syncwarp();
      for (int row = lane() / kAcross; row < 16; row += kWarp / kAcross) {
        const int of_slice = row_ + warp_row() + 16 * i + row;
        float sums[kEight];
#pragma unroll
        for (int k = 0; k < kEight; ++k) sums[k] = way[row * kPitch + own_columns() + k];
        if (of_slice >= in_.rows || !inside) continue;
        in_.emit(slice_, of_slice, channel, columns, sums);
        if constexpr (Operands::kMeasures) moments.add(sums);
      }
      __syncwarp();
    }
    if constexpr (Operands::kMeasures) end_moments(moments);
  }

  // Of the eight columns that a thread hands out.
  struct Moments {
    float first[kEight], sum[kEight] = {}, squares[kEight] = {};
    FCB_DEVICE_MEMBER void add(const float (&values)[kEight]) {
#pragma unroll
      for (int k = 0; k < kEight; ++k) {
        const float beyond = rounded(values[k]) - first[k];
        sum[k] += beyond, squares[k] += beyond * beyond;
      }
    }
  };
  FCB_DEVICE_MEMBER static float rounded(float value) {
    T as_stored;
    store(value, &as_stored);
    return load(&as_stored);
  }

  // Behind all warps' way out: the tile's first row, then sums and squares of each row of warps.
  static constexpr int kAcross = kWarpCols / kEight, kOfRows = kWarp - kAcross;  // lanes; bits of them that are rows
  static constexpr int kWarpsDown = kRows / kWarpRows;
  static constexpr int kFirst = kThreads / kWarp * 16 * kPitch, kSums = kFirst + kCols;
  static_assert((kSums + 2 * kWarpsDown * kCols) * sizeof(float) <= kChunks * sizeof(Eight), "and the moments");

  FCB_DEVICE_MEMBER Moments begin_moments() {
    float* const first = reinterpret_cast<float*>(memory_) + kFirst;
    if (warp_row() == 0 && lane() < 4)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        for (int k = 0; k < 2; ++k) first[warp_col() + j * 8 + lane() * 2 + k] = rounded(sums_[0][j][k]);
    __syncthreads();
    Moments moments;
#pragma unroll
    for (int k = 0; k < kEight; ++k) moments.first[k] = first[warp_col() + own_columns() + k];
    return moments;
  }
  FCB_DEVICE_MEMBER void end_moments(const Moments& moments) {
    float* const shared = reinterpret_cast<float*>(memory_);
    float* const own = shared + kSums + warp_row() / kWarpRows * kCols + warp_col() + own_columns();
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      const float sum = sum_over(moments.sum[k], kOfRows), squares = sum_over(moments.squares[k], kOfRows);
      if (lane() < kAcross) own[k] = sum, own[kWarpsDown * kCols + k] = squares;
    }
    __syncthreads();
    if (thread_ >= kCols || col_ + thread_ >= in_.cols) return;
    float sum = 0, squares = 0;
    for (int w = 0; w < kWarpsDown; ++w) {
      sum += shared[kSums + w * kCols + thread_];
      squares += shared[kSums + (kWarpsDown + w) * kCols + thread_];
    }
    in_.measured(slice_, row_ / kRows, col_ + thread_, shared[kFirst + thread_], sum, squares);
  }
  // The first of those, of the warp's.
  FCB_DEVICE_MEMBER int own_columns() const { return lane() % kAcross * kEight; }

  const Operands& in_;
  Eight* const memory_;
  const int thread_;
  const typename Operands::Slice slice_;
  int row_, col_;  // of the tile's first
  typename Operands::LineA lines_a_[A::kOfThread];
  typename Operands::LineB lines_b_[B::kOfThread];
  float sums_[kHigh][kWide][4] = {};
};

template <class Operands, class Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocks) tensor_multiply(Operands in) {
  FCB_DYNAMIC_SHARED(Eight, memory);
  TensorProduct<Operands, Shape>(in, memory, blockIdx.x, threadIdx.x).run();
}

template <class Operands, class Shape>
void launch_tensor_tiles(const Operands& in, void* stream) {
  using Product = TensorProduct<Operands, Shape>;
  launch_with_shared(tensor_multiply<Operands, Shape>, in.slices * Product::of_slice(in),
                     Product::kChunks * sizeof(Eight), stream, in);
}

template <class Operands>
void launch_tensor_multiply(const Operands& in, void* stream) {
  switch (tiles_for(in.rows, in.cols, in.slices)) {
    case Tiles::kWide: return launch_tensor_tiles<Operands, WideTiles>(in, stream);
    case Tiles::kSquare: return launch_tensor_tiles<Operands, SquareTiles>(in, stream);
    case Tiles::kNarrow: return launch_tensor_tiles<Operands, NarrowTiles>(in, stream);
  }
}

}  // namespace fusedconvbn::cuda
