// Parts of a panel of packed filters: while one is multiplied, the next is fetched, and both leave L2 to the pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "image.h"
#include "span.h"

namespace fusedconvbn {

// Some taps, or some of the depth of one. `rows` of the panel: a row has the columns of one tap and channel.
struct PanelPart {
  Span taps, depth, rows;
};

class PanelParts {
 public:
  // Of at most so many rows, but at least 16 elements of a tap's depth.
  PanelParts(int64_t taps, int64_t depth, int64_t max_rows) : all_taps_(taps), all_depth_(depth) {
    constexpr int64_t kMinDepth = 16;
    taps_ = std::clamp<int64_t>(max_rows / std::max<int64_t>(1, depth), 1, std::max<int64_t>(1, taps));
    depth_ = std::max(std::min(ceil_div(max_rows, kMinDepth) * kMinDepth, depth), int64_t{1});
    pieces_ = std::max<int64_t>(1, ceil_div(depth, depth_));
    depth_ = ceil_div(ceil_div(depth, pieces_), kMinDepth) * kMinDepth;
  }

  int64_t count() const { return std::max<int64_t>(1, ceil_div(all_taps_, taps_) * pieces_); }

  PanelPart operator[](int64_t index) const {
    const int64_t tap = index / pieces_ * taps_, begin = index % pieces_ * depth_;
    const Span taps{tap, std::min(tap + taps_, all_taps_)}, depth{begin, std::min(begin + depth_, all_depth_)};
    const int64_t row = tap * all_depth_ + begin;
    return {taps, depth, {row, row + taps.size() * depth.size()}};
  }

 private:
  int64_t all_taps_, all_depth_;
  int64_t taps_, depth_;  // of a part
  int64_t pieces_;        // of the depth
};

}  // namespace fusedconvbn
