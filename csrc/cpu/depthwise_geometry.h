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

// A strip of columns of a band of lines of an image.
struct Region {
  int64_t image;
  Piece lines, columns;
  Span columns_read;  // of the inputs, by the windows of columns.inside
};

// The lines of z's gradient that a step adds to the ring, and the lines of the inputs' gradient that it completes.
struct Step {
  Span gradients, inputs;
  bool owned;
};

// How far a region is done.
struct Progress {
  int64_t next, ready, staged;  // line of the gradient of z, of the inputs' gradient, of the inputs
};

// How the images are cut: into regions, and these into steps of a few lines.
struct DepthwiseRegions {
  static constexpr int64_t kRanges = 16;        // enough for as many threads
  static constexpr int64_t kMinBandLines = 16;  // of a region that is not a whole image
  static constexpr int64_t kStepPixels = 96;    // of a panel: 12 KiB each of dz and inputs, in L1

  int64_t batch;
  Axis lines, columns;

  int64_t strips() const { return std::max<int64_t>(1, ceil_div(columns.out, kStepPixels)); }
  int64_t bands() const {
    const int64_t wanted = ceil_div(kRanges, std::max<int64_t>(1, batch * strips()));
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, lines.out / kMinBandLines));
  }
  int64_t count() const { return batch * strips() * bands(); }
  int64_t ranges() const { return std::clamp<int64_t>(count(), 1, kRanges); }

  int64_t group_lines() const {
    const int64_t most = strips() > 1 ? 1 : kStepPixels / std::max<int64_t>(1, columns.out);
    return std::max<int64_t>(1, std::min(most, lines.out));
  }
  int64_t input_ring_lines() const {
    return std::clamp<int64_t>((group_lines() - 1) * lines.stride + lines.reach() + 1, 1,
                               std::max<int64_t>(1, lines.in));
  }
  int64_t gradient_ring_lines() const { return group_lines() + lines.reach() / lines.stride + 1; }
  int64_t input_ring_pixels() const {
    return most_columns([this](const Piece& piece) { return window_columns(piece.inside); });
  }
  int64_t gradient_ring_pixels() const {
    return most_columns([](const Piece& piece) { return piece.gradients.size(); });
  }
  int64_t owned_columns() const {
    return most_columns([](const Piece& piece) { return piece.inputs.size(); });
  }

  Region region(int64_t index, bool needs_inputs) const {
    Region r{index / bands() / strips(),
             make_piece(lines, index % bands(), bands(), needs_inputs),
             make_piece(columns, index / bands() % strips(), strips(), needs_inputs),
             {}};
    r.columns_read.begin = r.columns.inside.begin * columns.stride - columns.pad;
    r.columns_read.end = r.columns_read.begin + window_columns(r.columns.inside);
    return r;
  }

  Step next_step(const Region& r, const Progress& done) const {
    const Span& owned = r.lines.outputs;
    const int64_t limit = done.next < owned.begin ? owned.begin
                          : done.next < owned.end ? owned.end
                                                  : r.lines.inside.end;
    Step step{{done.next, std::min(done.next + group_lines(), limit)}, {done.ready, r.lines.inputs.end}, false};
    step.owned = done.next >= owned.begin && done.next < owned.end;
    if (step.gradients.end < r.lines.inside.end)
      step.inputs.end = std::clamp(step.gradients.end * lines.stride - lines.pad, done.ready, r.lines.inputs.end);
    step.inputs.end = std::min(step.inputs.end, done.ready + group_lines() * lines.stride);
    return step;
  }

 private:
  int64_t window_columns(const Span& gradients) const {
    return gradients.size() == 0 ? 0 : (gradients.size() - 1) * columns.stride + columns.reach() + 1;
  }

  // The largest of the strips.
  template <class F>
  int64_t most_columns(F size) const {
    int64_t most = 0;
    for (int64_t strip = 0; strip < strips(); ++strip)
      most = std::max(most, size(make_piece(columns, strip, strips(), true)));
    return most;
  }
};

// The inputs at equal distances from a stride's grid, and the taps through which outputs read them.
struct Phase {
  int64_t line, column;             // (position + pad) mod stride
  std::vector<int64_t> rows, cols;  // of the filter
  int64_t first_tap;                // in the order of the phases
  int64_t taps() const { return static_cast<int64_t>(rows.size() * cols.size()); }
};

// The last one first: an input is read through it by the first of its outputs.
inline std::vector<int64_t> phase_taps(const Axis& axis, int64_t phase) {
  std::vector<int64_t> taps;
  for (int64_t k = axis.taps - 1; k >= 0; --k)
    if (k * axis.dilation % axis.stride == phase) taps.push_back(k);
  return taps;
}

}  // namespace fusedconvbn
