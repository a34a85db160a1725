// Which outputs and inputs of a depthwise convolution have to do with each other, in one dimension.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "depthwise_lines.h"

namespace fusedconvbn {

// One dimension of a convolution.
struct Axis {
  int64_t in, out, stride, pad, dilation, taps;

  int64_t reach() const { return (taps - 1) * dilation; }

  // The outputs whose windows read any of `inputs`, of an unbounded image.
  Span readers(const Span& inputs) const {
    return {-floor_div(reach() - pad - inputs.begin, stride), floor_div(inputs.end - 1 + pad, stride) + 1};
  }
};

// A region's share of one dimension: the outputs and inputs that it owns, and all outputs that these have to do with.
// Those outside of the image stand for zeros; `inside` are the others.
struct Piece {
  Span outputs, inputs, gradients, inside;
};

inline Piece make_piece(const Axis& axis, int64_t index, int64_t count, bool needs_inputs) {
  Piece piece{part(index, count, axis.out), {0, 0}, {}, {}};
  piece.gradients = piece.outputs;
  if (needs_inputs) {
    piece.inputs.begin = index == 0 ? 0 : std::min(axis.in, piece.outputs.begin * axis.stride);
    piece.inputs.end = index + 1 == count ? axis.in : std::min(axis.in, piece.outputs.end * axis.stride);
  }
  if (piece.inputs.size() > 0) {
    const Span readers = axis.readers(piece.inputs);
    piece.gradients.begin = std::min(piece.gradients.begin, readers.begin);
    piece.gradients.end = std::max(piece.gradients.end, readers.end);
  }
  piece.inside.begin = std::clamp<int64_t>(piece.gradients.begin, 0, axis.out);
  piece.inside.end = std::clamp<int64_t>(piece.gradients.end, piece.inside.begin, axis.out);
  return piece;
}

// The inputs at equal distances from a stride's grid, and the taps through which outputs read them.
struct Phase {
  int64_t line, column;             // (position + pad) mod stride
  std::vector<int64_t> rows, cols;  // of the filter
  int64_t first_tap;                // in the order of the phases
  int64_t taps() const { return static_cast<int64_t>(rows.size() * cols.size()); }
};

inline std::vector<int64_t> phase_taps(const Axis& axis, int64_t phase) {
  std::vector<int64_t> taps;
  for (int64_t k = 0; k < axis.taps; ++k)
    if (k * axis.dilation % axis.stride == phase) taps.push_back(k);
  return taps;
}

}  // namespace fusedconvbn
