// The direct convolution of bfloat16 by products of pairs (pairs.h): that of an image of floats with half as many
// channels. Of images with consecutive channels, an even number of them a group.
#pragma once

#include "convolve.h"
#include "pairs.h"

namespace fusedconvbn {

template <class C>
class PairsConvolution : public Convolution<C> {
 public:
  PairsConvolution(const ComputeKernels<C>& kernels, const Storage<C>& storage, const Image<C>& source,
                   const Windows& windows, const Channels& channels)
      : Convolution<C>(
            kernels, {kernels.pairs->filters, storage.element_bytes, false},
            {source.memory(), {kernels.pairs->images, sizeof(C), true}, of_pairs(source.grid())}, windows,
            {channels.groups, channels.depth / 2, channels.cols, channels.new_filters, channels.kept_filters},
            kernels.pairs->gemm) {}

 private:
  static Grid of_pairs(Grid grid) {
    grid.image_stride /= 2, grid.line_stride /= 2, grid.pixel_stride /= 2;
    return grid;
  }
};

}  // namespace fusedconvbn
