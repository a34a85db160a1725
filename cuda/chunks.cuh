// Passes over an image whose neighbouring channels are read at once: NHWC, whole chunks in a pixel, all of it aligned.
#pragma once

#include "divisor.h"
#include "image.h"
#include "launch.h"

namespace fusedconvbn::cuda {

constexpr int kChunksOfThread = 4;  // in flight at once

// A thread takes chunks of the same channels, whose vectors it reads once: so many pixels apart that all threads
// together read neighbours.
struct ChunkPass {
  int64_t chunks;
  int threads;  // that have work; a multiple of a pixel's chunks
  Divisor of_pixel;

  ChunkPass(int64_t elements, int64_t channels, int of_chunk)
      : chunks(elements / of_chunk), threads(0), of_pixel(channels / of_chunk) {
    const int64_t pixel = channels / of_chunk;
    threads = static_cast<int>(ceil_div(ceil_div(chunks, kChunksOfThread), pixel) * pixel);
  }
  int64_t blocks() const { return blocks_for(threads); }
  FCB_INLINE_MEMBER int channel(int thread, int of_chunk) const {
    return of_pixel.rest(thread, of_pixel.quotient(thread)) * of_chunk;
  }
};

// A block's share of sums over pixels: a range, and a tile of channels, a power of two, of which a thread takes a chunk
// at every lanes-th pixel.
struct ChunkShare {
  int64_t range, channel, begin, end;
  int lanes, lane, of_tile;
  bool inside;  // are there such channels?
};
FCB_INLINE ChunkShare chunk_share(int64_t pixels, int64_t size, int64_t channels, int tile, int of_chunk, int block,
                                  int thread) {
  const int across = tile / of_chunk, tiles = static_cast<int>(ceil_div(channels, tile));
  const int64_t range = block / tiles, end = (range + 1) * size;
  const int of_tile = thread % across * of_chunk;
  const int64_t channel = block % tiles * int64_t{tile} + of_tile;
  return {range,           channel, range * size,      end < pixels ? end : pixels, kThreads / across,
          thread / across, of_tile, channel < channels};
}

// The sums of `values` over the lanes, for each of them. `shared`: kThreads * kNumbers elements; all threads call.
template <class C, int kNumbers>
FCB_DEVICE void sum_over_lanes(C (&values)[kNumbers], const ChunkShare& s, C* shared) {
  const int tile = kThreads / s.lanes * kNumbers;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) shared[s.lane * tile + s.of_tile + i] = values[i];
  __syncthreads();
  for (int half = s.lanes / 2; half > 0; half /= 2) {  // a tree: its order is the block's, whatever the GPU
    for (int i = threadIdx.x; i < half * tile; i += kThreads) shared[i] += shared[half * tile + i];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) values[i] = shared[s.of_tile + i];
  __syncthreads();
}

}  // namespace fusedconvbn::cuda
