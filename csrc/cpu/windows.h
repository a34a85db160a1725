// The geometry of a convolution: which source pixel each window position reads through each tap.
//
// Forward, its gradient by the input (a phase at a time) and its gradient by the filters all read a source image
// through windows: position (i, j) reads source pixel (i * step_height + tap.height, j * step_width + tap.width).
// Pixels outside the image are read from a row of zeros. Kernels then see nothing but a table of pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "image.h"
#include "span.h"

namespace fusedconvbn {

struct Tap {
  int64_t height, width;
};

struct Windows {
  int64_t batch, height, width;  // positions
  int64_t step_height, step_width;
  std::vector<Tap> taps;

  int64_t positions() const { return batch * height * width; }
};

inline Windows forward_windows(const ConvBnParams& p) {
  Windows w{p.batch, p.out_height, p.out_width, p.stride_height, p.stride_width, {}};
  for (int64_t h = 0; h < p.filter_height; ++h)
    for (int64_t v = 0; v < p.filter_width; ++v)
      w.taps.push_back({h * p.dilation_height - p.pad_top, v * p.dilation_width - p.pad_left});
  return w;
}

// Makes the table of pointers for a range of positions. A source that is not [pixel][channel] in the compute type is
// first staged: the lines that the range needs are converted into scratch. Where the taps of a filter line are adjacent
// they then merge into one, for which staged lines carry their zero padding: C = 3 would else mean 3-element rows. Rows
// of 16-bit numbers that one tap reads may be left to be converted by who reads them (RowConversion).
template <class C>
class WindowReader {
 public:
  WindowReader(const Image<C>& source, int64_t channels, const Windows& windows, bool may_merge, int64_t table_rows,
               int64_t stage_rows, bool may_convert = false)
      : source_(source), channels_(channels), windows_(windows), table_rows_(table_rows), stage_rows_(stage_rows) {
    for (const Tap& tap : windows.taps) {
      low_ = std::min(low_, tap.height);
      high_ = std::max(high_, tap.height);
      left_ = std::min(left_, tap.width);
      right_ = std::max(right_, tap.width);
    }
    merged_ = may_merge && can_merge() && (!source.direct() || channels < 16);
    converts_ = may_convert && !merged_ && !source.direct() && source.rows() && windows.taps.size() == 1;
    staged_ = merged_ || !(source.direct() || converts_);
    if (merged_) merge();
    in_order_ = staged_ && !merged_ && windows.taps.size() == 1 && (source.rows() || one_for_one());
  }

  bool staged() const { return staged_; }
  // Whether what a run of positions has staged is of no use to those before and behind.
  bool stages_apart() const { return in_order_; }
  int64_t taps() const { return static_cast<int64_t>(windows_.taps.size()); }
  int64_t depth() const { return depth_; }  // in units of the source's channels

  // Whether the source is read where it lies, and neighbouring positions leave out none of its pixels.
  bool gapless() const {
    return !staged_ && high_ - low_ + 1 >= windows_.step_height && right_ - left_ + 1 >= windows_.step_width;
  }
  // The elements of a direct source that positions first .. first + count - 1 read, and those before do not; in whole
  // lines. 0 < first.
  Span new_elements(int64_t first, int64_t count) const {
    const int64_t line = source_.grid().width * source_.grid().pixel_stride;
    const int64_t read = line_behind(position(first - 1)), end = line_behind(position(first + count - 1));
    return {std::max(read, line_of(position(first), low_)) * line, end * line};
  }

  struct Scratch {
    const C** rows;        // [taps][table_rows]
    const void** sources;  // of rows to be converted
    int64_t* image_base;   // [images]: element offset of the line 0 of an image; or the first position
    C* lines;              // staged lines
    const C* zeros;        // one row of a tap
  };

  Scratch carve(Arena* arena, const C* zeros) const {
    return {arena->take<const C*>(taps() * table_rows_), arena->take<const void*>(source_rows()),
            arena->take<int64_t>(max_images()), arena->take<C>(staged_elements()), zeros};
  }
  int64_t zero_elements() const { return channels_ * depth_; }

  // Of the rows that point() has pointed to, from this one on.
  RowConversion<C> conversion(const Scratch& s, int64_t first) const {
    if (!converts_) return {};
    return {s.sources + first, s.lines + first * channels_, channels_, source_.kernels().load_rows};
  }

  // Points rows[t][r] at what position first + r reads through tap t, r < count <= table_rows. stage() must have
  // covered these positions.
  void point(int64_t first, int64_t count, const Scratch& s) const {
    if (in_order_) return point_in_order(s.lines + (first - s.image_base[0]) * channels_, count, s);
    if (!converts_)
      return point_at(first, count, staged_ ? s.lines : source_.read(0, 1, 0, 1, nullptr).data, s.rows, s);
    point_in_order(s.lines, count, s);
    point_at(first, count, static_cast<const uint16_t*>(source_.memory()), s.sources, s);
  }

  // Converts the source lines that positions first .. first + count - 1 read, count <= stage_rows; nothing to do for a
  // direct source.
  void stage(int64_t first, int64_t count, const Scratch& s) const { stage(first, count, {0, channels_}, s); }
  // Of lines whose taps may not merge, only some channels.
  void stage(int64_t first, int64_t count, const Span& channels, const Scratch& s) const {
    if (!staged_) return;
    if (in_order_) {
      s.image_base[0] = first;
      C* const to = s.lines + channels.begin;
      if (!source_.rows()) return source_.copy(first, count, channels.begin, channels.size(), {to, channels_});
      point_at(first, count, static_cast<const uint16_t*>(source_.memory()), s.sources, s);
      return source_.kernels().load_rows(s.sources, channels.begin, count, channels.size(), to, channels_);
    }
    const Position begin = position(first), end = position(first + count - 1);
    s.image_base[max_images() - 1] = begin.image;
    int64_t slot = 0;
    for (int64_t b = begin.image; b <= end.image; ++b) {
      const int64_t i0 = b == begin.image ? begin.line : 0, i1 = b == end.image ? end.line : windows_.height - 1;
      const int64_t from = std::max<int64_t>(0, i0 * windows_.step_height + low_);
      const int64_t to = std::min(source_.grid().height, i1 * windows_.step_height + high_ + 1);
      s.image_base[b - begin.image] = (slot - from) * line_elements();
      // Within one line of positions only the columns that they read: lines may be very long.
      const bool one_line = begin.image == end.image && begin.line == end.line;
      const int64_t width = source_.grid().width;
      const int64_t left = one_line ? std::clamp<int64_t>(begin.column * windows_.step_width + left_, 0, width) : 0;
      const int64_t right =
          one_line ? std::clamp<int64_t>(end.column * windows_.step_width + right_ + 1, left, width) : width;
      for (int64_t h = from; h < to; ++h, ++slot)
        stage_line(b, h, {left, right}, channels, s.lines + slot * line_elements());
    }
  }

 private:
  struct Position {
    int64_t image, line, column;
  };

  void point_in_order(const C* row, int64_t count, const Scratch& s) const {
    for (int64_t r = 0; r < count; ++r, row += channels_) s.rows[r] = row;
  }

  // table[t][r] = where, from `base` on, position first + r reads through tap t.
  template <class E, class Pointer>
  void point_at(int64_t first, int64_t count, const E* base, Pointer* table, const Scratch& s) const {
    const Grid& grid = source_.grid();
    const bool lines = staged_ && !in_order_;
    const int64_t height = grid.height, width = lines ? line_pixels() : grid.width;
    const int64_t pixel = lines ? channels_ : grid.pixel_stride;
    const int64_t line = lines ? line_elements() : grid.line_stride;
    const int64_t first_image = lines ? s.image_base[max_images() - 1] : 0;
    for (int64_t done = 0, run; done < count; done += run) {
      const Position at = position(first + done);
      run = std::min(count - done, windows_.width - at.column);
      const int64_t image = lines ? s.image_base[at.image - first_image] : at.image * grid.image_stride;
      for (int64_t t = 0; t < taps(); ++t) {
        Pointer* rows = table + t * table_rows_ + done;
        const int64_t h = at.line * windows_.step_height + windows_.taps[t].height;
        if (h < 0 || h >= height) {
          std::fill(rows, rows + run, s.zeros);
          continue;
        }
        int64_t w = at.column * windows_.step_width + windows_.taps[t].width;
        for (int64_t r = 0; r < run; ++r, w += windows_.step_width)
          rows[r] = w >= 0 && w < width ? static_cast<Pointer>(base + image + h * line + w * pixel) : s.zeros;
      }
    }
  }

  Position position(int64_t p) const {
    const int64_t line = p / windows_.width;
    return {line / windows_.height, line % windows_.height, p % windows_.width};
  }

  // Of the lines of all images: the one that a tap reads, or the next to it in the position's image.
  int64_t line_of(const Position& p, int64_t tap_height) const {
    const int64_t height = source_.grid().height;
    return p.image * height + std::clamp<int64_t>(p.line * windows_.step_height + tap_height, 0, height);
  }
  int64_t line_behind(const Position& p) const { return line_of(p, high_ + 1); }

  bool one_for_one() const {
    const Grid& grid = source_.grid();
    const auto& taps = windows_.taps;
    return taps.size() == 1 && taps[0].height == 0 && taps[0].width == 0 && windows_.step_height == 1 &&
           windows_.step_width == 1 && windows_.height == grid.height && windows_.width == grid.width;
  }

  // Taps in lines of adjacent pixels, each line as long as the first.
  bool can_merge() const {
    const auto& taps = windows_.taps;
    const int64_t line = right_ - left_ + 1;
    if (line < 2 || static_cast<int64_t>(taps.size()) % line != 0) return false;
    if (-left_ > kMaxMargin || (windows_.width - 1) * windows_.step_width + right_ >= source_.grid().width + kMaxMargin)
      return false;
    for (size_t t = 0; t < taps.size(); ++t)
      if (taps[t].width != left_ + static_cast<int64_t>(t) % line || taps[t].height != taps[t - t % line].height)
        return false;
    return true;
  }

  void merge() {
    std::vector<Tap> lines;
    depth_ = right_ - left_ + 1;
    for (size_t t = 0; t < windows_.taps.size(); t += depth_)
      lines.push_back({windows_.taps[t].height, left_ + margin()});
    windows_.taps = lines;
  }

  int64_t margin() const { return merged_ ? std::max<int64_t>(0, -left_) : 0; }  // zero pixels before a staged line
  int64_t line_pixels() const {
    const int64_t width = source_.grid().width;
    return merged_ ? margin() + std::max(width, (windows_.width - 1) * windows_.step_width + right_ + 1) : width;
  }
  int64_t line_elements() const { return line_pixels() * channels_; }

  int64_t max_images() const {  // the last element holds the number of the first image
    if (windows_.positions() == 0) return 1;
    return std::min(windows_.batch, (stage_rows_ - 1) / (windows_.height * windows_.width) + 2) + 1;
  }
  // Of 16-bit numbers, whose addresses are listed.
  int64_t source_rows() const {
    if (converts_) return table_rows_;
    return in_order_ && source_.rows() ? stage_rows_ : 0;
  }
  int64_t staged_elements() const {
    if (in_order_) return stage_rows_ * channels_;
    if (converts_) return table_rows_ * channels_;
    return staged_ ? max_lines() * line_elements() : 0;
  }
  int64_t max_lines() const {
    if (windows_.positions() == 0) return 0;
    const int64_t images = max_images() - 1, span = high_ - low_ + 1;
    const int64_t positions = std::min((stage_rows_ - 1) / windows_.width + 2, images * windows_.height);
    return std::min(positions * windows_.step_height + images * span, images * source_.grid().height);
  }

  // Some columns of source line h, and all of its padding.
  void stage_line(int64_t image, int64_t h, const Span& columns, const Span& channels, C* line) const {
    const Grid& grid = source_.grid();
    const int64_t before = margin() * channels_, pixels = grid.width * channels_;
    std::fill(line, line + before, C(0));
    std::fill(line + before + pixels, line + line_elements(), C(0));
    const int64_t first = (image * grid.height + h) * grid.width + columns.begin;
    C* const to = line + before + columns.begin * channels_ + channels.begin;
    if (!source_.direct()) return source_.copy(first, columns.size(), channels.begin, channels.size(), {to, channels_});
    const C* const from = source_.read(first, columns.size(), 0, channels_, nullptr).data;
    std::copy(from, from + columns.size() * channels_, to);
  }

  static constexpr int64_t kFar = int64_t{1} << 60;
  static constexpr int64_t kMaxMargin = 256;  // pixels: more zero padding is not worth staging

  Image<C> source_;
  int64_t channels_;
  Windows windows_;
  int64_t table_rows_, stage_rows_;
  int64_t low_ = kFar, high_ = -kFar, left_ = kFar, right_ = -kFar;  // of the taps
  int64_t depth_ = 1;
  bool merged_ = false, staged_ = false, in_order_ = false, converts_ = false;
};

}  // namespace fusedconvbn
