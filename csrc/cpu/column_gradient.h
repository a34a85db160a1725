// The gradient by the inputs where they have few channels: a convolution that produces them would fill few columns of
// a register tile (the 3 channels of an image: 3 of 32).
//
// For a panel of positions (the columns of a tile) one product with the filters gives what every tap and channel adds
// to the inputs: a row each. The rows are added, shifted by their taps, to lines that are kept channel by channel and
// phase of the stride by phase, so that neighbours of one tap stay neighbours. A line is written once, when no later
// position adds to it. Sums run in the order of the positions, and parts are fixed by the problem.
#pragma once

#include <algorithm>
#include <vector>

#include "arena.h"
#include "compute_type.h"
#include "image.h"
#include "span.h"

namespace fusedconvbn {

template <class C>
class ColumnGradient {
 public:
  static constexpr int64_t kPositions = 96;  // of a block: 64 channels of it and the lines it adds to stay in L1

  ColumnGradient(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers, int64_t chunks)
      : p_(p),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        filters_(static_cast<const char*>(buffers.filters)),
        d_inputs_(static_cast<char*>(buffers.d_inputs)),
        chunks_(std::clamp<int64_t>(chunks, 1, std::max<int64_t>(1, p.in_height))),
        span_((p.filter_height - 1) * p.dilation_height + 1),
        margin_(std::max<int64_t>(0, -shift(0))),
        width_(margin_ + std::max(p.out_width + shift(p.filter_width - 1), ceil_div(p.in_width, p.stride_width))) {
    const int64_t outputs = std::min(p.out_height, (kPositions - 2) / std::max<int64_t>(1, p.out_width) + 2);
    ring_ = span_ + std::max<int64_t>(0, outputs - 1) * p.stride_height;
  }

  struct Worker {
    C* dz;                       // [panels][K][panel]
    C* lines;                    // [ring_][line_elements()]
    C** to;                      // [lines of a block][rows()]
    ColumnSegment<C>* segments;  // [kPositions]
    int64_t* begins;             // [panels + 1]: of a panel's segments
  };
  // Lines [begin, end) of an image, of which those before `next` are written.
  struct Lines {
    int64_t image, begin, end, next;
  };

  void carve(Arena* arena, int workers) {
    loaded_ = arena->take<C>(rows() * p_.out_channels);
    packed_ = arena->take<C>(p_.out_channels * ld());
    for (int i = 0; i < workers; ++i)
      workers_.push_back({arena->take<C>(panels() * p_.out_channels * k_.panel),
                          arena->take<C>(ring_ * line_elements()), arena->take<C*>(ring_ * rows()),
                          arena->take<ColumnSegment<C>>(kPositions), arena->take<int64_t>(panels() + 1)});
  }

  // Rows in the order [filter column][filter line][channel]: one that adds to the same pixels is far away.
  void pack_filters() const {
    storage_.kernels.load(filters_, p_.out_channels, 1, rows(), p_.out_channels, loaded_, p_.out_channels);
    std::fill(packed_, packed_ + p_.out_channels * ld(), C(0));
    int64_t row = 0;
    for (int64_t w = 0; w < p_.filter_width; ++w)
      for (int64_t h = 0; h < p_.filter_height; ++h)
        for (int64_t c = 0; c < p_.in_channels; ++c, ++row) {
          const C* from = loaded_ + ((h * p_.filter_width + w) * p_.in_channels + c) * p_.out_channels;
          for (int64_t k = 0; k < p_.out_channels; ++k) packed_[k * ld() + row] = from[k];
        }
  }

  int64_t chunks() const { return chunks_; }  // of the lines of an image
  Span input_lines(int64_t chunk) const { return part(chunk, chunks_, p_.in_height); }
  // The output lines that add to a chunk's.
  Span output_lines(int64_t chunk) const {
    const Span in = input_lines(chunk);
    return {std::max<int64_t>(0, ceil_div(in.begin + p_.pad_top - span_ + 1, p_.stride_height)),
            std::min(p_.out_height, floor_div(in.end - 1 + p_.pad_top, p_.stride_height) + 1)};
  }

  Lines begin(int64_t image, int64_t chunk, int worker) const {
    const Worker& w = workers_[worker];
    const Span in = input_lines(chunk);
    std::fill(w.lines, w.lines + ring_ * line_elements(), C(0));
    Lines lines{image, in.begin, in.end, in.begin};
    write(output_lines(chunk).begin * p_.stride_height - p_.pad_top, w, &lines);
    return lines;
  }

  // Adds positions [first, first + count) of the image, count <= kPositions, whose gradient is dz[count][ld].
  void add(int64_t first, int64_t count, const C* dz, int64_t ld_dz, int worker, Lines* lines) const {
    const Worker& w = workers_[worker];
    for (int64_t at = 0; at < count; at += k_.panel)
      k_.transpose(dz + at * ld_dz, ld_dz, std::min(k_.panel, count - at), p_.out_channels, w.dz + at * p_.out_channels,
                   k_.panel);
    point(first, count, w, *lines);
    for (int64_t row = 0; row < rows(); row += k_.outer_rows)
      for (int64_t panel = 0; panel * k_.panel < count; ++panel)
        k_.add_columns(packed_ + row, ld(), w.dz + panel * p_.out_channels * k_.panel, p_.out_channels,
                       {w.segments + w.begins[panel], w.begins[panel + 1] - w.begins[panel], row,
                        std::min(k_.outer_rows, rows() - row)});
    write((first + count) / p_.out_width * p_.stride_height - p_.pad_top, w, lines);
  }

  void end(int worker, Lines* lines) const { write(lines->end, workers_[worker], lines); }

 private:
  int64_t rows() const { return p_.taps() * p_.in_channels; }
  int64_t ld() const { return ceil_div(rows(), k_.outer_rows) * k_.outer_rows; }
  int64_t panels() const { return ceil_div(kPositions, k_.panel); }
  int64_t line_elements() const { return p_.stride_width * p_.in_channels * width_; }
  // Tap w of position j reads the pixel j + shift(w) of phase(w).
  int64_t column(int64_t w) const { return w * p_.dilation_width - p_.pad_left; }
  int64_t shift(int64_t w) const { return floor_div(column(w), p_.stride_width); }
  int64_t phase(int64_t w) const { return column(w) - shift(w) * p_.stride_width; }
  C* line(const Worker& w, int64_t h) const { return w.lines + h % ring_ * line_elements(); }

  // Cuts a block into parts of one line and panel each, and has the pointers of its lines.
  void point(int64_t first, int64_t count, const Worker& w, const Lines& lines) const {
    const int64_t first_line = first / p_.out_width;
    int64_t segments = 0;
    for (int64_t done = 0, run; done < count; done += run) {
      const int64_t i = (first + done) / p_.out_width, j = (first + done) % p_.out_width, column = done % k_.panel;
      run = std::min({count - done, p_.out_width - j, k_.panel - column});
      C** to = w.to + (i - first_line) * rows();
      if (done == 0 || j == 0) point(i, lines, w, to);
      if (column == 0) w.begins[done / k_.panel] = segments;
      w.segments[segments++] = {column, run, j, to};
      w.begins[done / k_.panel + 1] = segments;
    }
  }

  // Where position 0 of line i adds each row; null where that is not among these lines.
  void point(int64_t i, const Lines& lines, const Worker& w, C** to) const {
    const int64_t top = i * p_.stride_height - p_.pad_top, step = p_.dilation_height % ring_;
    const int64_t top_slot = top - floor_div(top, ring_) * ring_;
    for (int64_t v = 0; v < p_.filter_width; ++v)
      for (int64_t k = 0, h = top, slot = top_slot; k < p_.filter_height; ++k, h += p_.dilation_height) {
        const bool here = h >= lines.begin && h < lines.end;
        C* plane = w.lines + slot * line_elements() + phase(v) * p_.in_channels * width_ + margin_ + shift(v);
        for (int64_t c = 0; c < p_.in_channels; ++c, plane += width_) *to++ = here ? plane : nullptr;
        slot += slot + step >= ring_ ? step - ring_ : step;
      }
  }

  // Writes the lines before `end`, and clears them for later ones.
  void write(int64_t end, const Worker& w, Lines* lines) const {
    const Grid grid = input_grid(p_);
    for (int64_t& h = lines->next; h < std::min(end, lines->end); ++h) {
      C* from = line(w, h);
      for (int64_t v = 0; v < std::min(p_.stride_width, p_.in_width); ++v) {
        const int64_t element = lines->image * grid.image_stride + h * grid.line_stride + v * grid.pixel_stride;
        storage_.kernels.store(from + v * p_.in_channels * width_ + margin_, width_, p_.in_channels,
                               ceil_div(p_.in_width - v, p_.stride_width), d_inputs_ + element * storage_.element_bytes,
                               grid.channel_stride, grid.pixel_stride * p_.stride_width, false);
      }
      std::fill(from, from + line_elements(), C(0));
    }
  }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  const char* filters_;
  char* d_inputs_;
  int64_t chunks_;
  int64_t span_;    // lines that a position adds to
  int64_t margin_;  // pixels of a line left of the image
  int64_t width_;   // pixels of a line, phase and channel
  int64_t ring_;    // lines that the positions of a block add to
  C* loaded_;       // [rows()][K]
  C* packed_;       // [K][ld()]
  std::vector<Worker> workers_;
};

}  // namespace fusedconvbn
