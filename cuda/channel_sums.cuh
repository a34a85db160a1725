// Sums over the pixels, channel by channel. The pixels are divided into ranges, whose number the problem fixes; a block
// of threads takes a range and some neighbouring channels, and adds up in an order that does not depend on the machine.
#pragma once

#include "chunks.cuh"

namespace fusedconvbn::cuda {

struct Ranges {
  int64_t pixels, size, count, channels;
  int tile;  // channels a block

  // Ranges long enough to hide what a block costs, and no more of them than a few threads (Finisher) add up quickly.
  Ranges(const ConvBnParams& p, int channel_tile) : pixels(p.pixels()), channels(p.out_channels), tile(channel_tile) {
    constexpr int64_t kShortest = 256, kMost = 1024;
    size = ceil_div(pixels, kMost) < kShortest ? kShortest : ceil_div(pixels, kMost);
    count = ceil_div(pixels, size);
  }
  explicit Ranges(const ConvBnParams& p) : Ranges(p, p.data_format == DataFormat::kNHWC ? 32 : 8) {}

  // The same pixels in no more ranges than that.
  Ranges in_at_most(int64_t most) const {
    Ranges fewer = *this;
    if (count > most) fewer.size = ceil_div(pixels, most), fewer.count = ceil_div(pixels, fewer.size);
    return fewer;
  }

  FCB_INLINE_MEMBER int64_t end(int64_t range) const {
    return (range + 1) * size < pixels ? (range + 1) * size : pixels;
  }
  int64_t blocks() const { return count * ceil_div(channels, tile); }

  // Of so many pixels each, and of these as many together as leave few ranges.
  static Ranges of_size(const ConvBnParams& p, int64_t size) {
    Ranges ranges(p);
    ranges.size = size, ranges.count = ceil_div(ranges.pixels, size);
    return ranges;
  }
  Ranges merged() const {
    constexpr int64_t kFew = 256;
    Ranges ranges = *this;
    ranges.size *= ceil_div(count, kFew), ranges.count = ceil_div(pixels, ranges.size);
    return ranges;
  }

  // For kernels that take channels by chunks: tiles of a power of two.
  static Ranges by_chunks(const ConvBnParams& p, int of_chunk) {
    constexpr int kWidest = 64;
    int tile = of_chunk;
    while (tile < kWidest && tile < p.out_channels) tile *= 2;
    return Ranges(p, tile);
  }
  FCB_INLINE_MEMBER ChunkShare chunks_of(int of_chunk, int block, int thread) const {
    return chunk_share(pixels, size, channels, tile, of_chunk, block, thread);
  }
};

// A thread's share of a block's work: one channel, and every lanes-th pixel of the range. Neighbouring threads take
// neighbours in memory: channels in NHWC, pixels in NCHW.
struct Share {
  int64_t range, channel, begin, end;
  int lanes, lane, of_tile;
  bool inside;  // is there such a channel?
};
FCB_INLINE Share share_of(const Ranges& r, bool channels_last, int64_t block, int thread) {
  const int64_t tiles = ceil_div(r.channels, r.tile), range = block / tiles;
  const int lanes = kThreads / r.tile;
  const int of_tile = channels_last ? thread % r.tile : thread / lanes;
  const int lane = channels_last ? thread / r.tile : thread % lanes;
  const int64_t channel = block % tiles * r.tile + of_tile;
  return {range, channel, range * r.size, r.end(range), lanes, lane, of_tile, channel < r.channels};
}

// The sum of `value` over the lanes of a channel, for each of them. `shared` has kThreads elements; all threads call.
template <class C>
FCB_DEVICE C sum_of_lanes(C value, const Share& s, C* shared) {
  shared[s.of_tile * s.lanes + s.lane] = value;
  __syncthreads();
  C sum = 0;
  for (int lane = 0; lane < s.lanes; ++lane) sum += shared[s.of_tile * s.lanes + lane];
  __syncthreads();
  return sum;
}

// Some of the ranges: begin, begin + step, .. before `end`.
struct SomeRanges {
  int64_t begin, end, step;
};

// A thread of a block that finishes what ranges found: of neighbouring channels, each by some lanes, which take every
// so many ranges and add up in their order.
struct Finisher {
  static constexpr int kChannels = 16, kLanes = kThreads / kChannels;
  int64_t channel;
  int lane, of_block;
  SomeRanges ranges;  // the lane's; none where there is no such channel

  FCB_DEVICE_MEMBER Finisher(const Ranges& all, int block, int thread)
      : channel(int64_t{block} * kChannels + thread % kChannels),
        lane(thread / kChannels),
        of_block(thread % kChannels),
        ranges{lane, channel < all.channels ? all.count : 0, kLanes},
        channels_(all.channels) {}

  static int64_t blocks(int64_t channels) { return ceil_div(channels, kChannels); }
  // Whether it is this thread that writes the channel's results.
  FCB_DEVICE_MEMBER bool has_channel() const { return lane == 0 && channel < channels_; }
  // All threads call. `shared`: kThreads elements.
  FCB_DEVICE_MEMBER double total(double value, double* shared) const {
    shared[lane * kChannels + of_block] = value;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += shared[i * kChannels + of_block];
    __syncthreads();
    return sum;
  }

 private:
  int64_t channels_;
};

}  // namespace fusedconvbn::cuda
