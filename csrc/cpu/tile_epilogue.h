// What becomes of the results of a convolution, a tile at a time while it is hot in L1.
#pragma once

#include <cstdint>
#include <functional>

#include "image.h"
#include "kernels.h"

namespace fusedconvbn {

// A block's outputs of a few channels: consecutive pixels as rows.
template <class C>
struct Tile {
  C* data;
  int64_t ld, first, rows, channel, cols;
  int64_t block;  // of blocks()
  int worker;
};

// Rows that are asked for before they are read or written.
struct RowsAhead {
  const void* data = nullptr;  // may be null
  int64_t row_bytes = 0;
};

template <class C>
struct TileEpilogue {
  // For each run of consecutive pixels, at most kBlockRows; in thirds, a block's. These need no conversion.
  std::function<void(const Tile<C>&)> emit;
  // May be empty; for the rows of all the block's runs at once, up to twice as many.
  std::function<void(const Tile<C>&)> finish;
  // May be empty. What to do with a tile's sums a few rows at a time, in place of emit.
  std::function<GemmOutput<C>(const Tile<C>&)> row_by_row = nullptr;
  // May be empty. The same where the rows of memory are of 16-bit numbers.
  std::function<GemmOutput<C>(const Tile<C>&)> in_place = nullptr;
  // Of all channels; asked for a block ahead.
  RowsAhead reads{}, writes{};

  GemmOutput<C> output(const Tile<C>& tile) const {
    GemmOutput<C> to = in_place ? in_place(tile) : row_by_row ? row_by_row(tile) : GemmOutput<C>{tile.data};
    to.keep = !to.emit || finish;
    return to;
  }
  // Of a tile that output() has been made of.
  void end(const GemmOutput<C>& to, const Tile<C>& tile) const {
    if (!to.emit) emit(tile);
    if (finish) finish(tile);
  }
};

// The tile's sums, as they are, to an image whose memory takes them.
template <class C>
GemmOutput<C> sums_to(const ComputeKernels<C>& kernels, const Image<C>& image, const Tile<C>& t) {
  const Block<C> y = image.target(t.first, t.channel, {t.data, t.ld});
  AffineBlock<C> block{};
  block.y = y.data, block.ld_y = y.ld, block.cols = t.cols, block.stream = image.streams(t.channel, t.cols);
  return {t.data, false, kernels.emit_sums, block};
}

// The same where its rows are of 16-bit numbers.
template <class C>
GemmOutput<C> sums_in_place(const Image<C>& image, const Tile<C>& t) {
  AffineBlock<C> block{};
  block.y = image.address(t.first, t.channel), block.ld_y = image.ld(), block.cols = t.cols;
  block.stream = image.streams(t.channel, t.cols);
  GemmOutput<C> to{t.data, false, image.in_place_kernels().emit_sums, block};
  to.rows = image.row_type();
  return to;
}

}  // namespace fusedconvbn
