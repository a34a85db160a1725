// How AMX reads the windows of a convolution: as rows at equal distances in memory.
//
// A tile holds 16 window positions and needs 16 rows at equal distances. Where the positions read pixel after pixel of
// the source (1x1 filters, stride 1) they are read in place. Elsewhere the lines that a strip of positions reads are
// staged with their zero padding, one line of pixels after the other: position (i, j) of the strip then is row
// i * pitch + j, and each tap reads the same rows at an offset of its own. What is computed for the rows between two
// lines is dropped; they are few, since the zeros behind a line are also those before the next. With strides, the lines
// and columns of each phase are staged apart.
//
// With few channels the taps of a filter line merge into one: a row then is the run of pixels that they read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "windows.h"

namespace fusedconvbn {

// The elements of a tap as `chunks` times `chunk`: even, at most 32, and if possible none to spare.
struct AmxDepth {
  int64_t chunks, chunk;

  explicit AmxDepth(int64_t depth) {
    constexpr int64_t kMax = 32, kMin = 16;
    for (chunk = kMax; chunk >= kMin; chunk -= 2)
      if (depth % chunk == 0) break;
    chunks = ceil_div(depth, chunk >= kMin ? chunk : kMax);
    chunk = ceil_div(ceil_div(depth, chunks), 2) * 2;
  }
  int64_t elements() const { return chunks * chunk; }
};

class AmxRowReader {
 public:
  static constexpr int64_t kChunk = 96;  // rows that are multiplied at a time: 3 times 2 tiles

  // Strips of about `max_rows`; 0: of what suits products with filters. With `apart`, staged rows do not share few sets
  // of L1, as those at distances of 1 KB and its multiples do.
  AmxRowReader(const AmxKernels& kernels, const void* source, const Grid& grid, int64_t channels,
               const Windows& windows, int64_t max_rows = 0, bool apart = false)
      : kernels_(kernels),
        source_(static_cast<const uint16_t*>(source)),
        grid_(grid),
        channels_(channels),
        windows_(windows) {
    plan_rows(apart);
    if (windows.positions() == 0) return;
    for (const Tap& tap : windows_.taps) add_plane(tap);
    if (!flat_) set_pitch();
    const int64_t row_bytes = 2 * unit_ * static_cast<int64_t>(std::max<size_t>(1, planes_.size()));
    const int64_t rows =
        max_rows ? max_rows : std::clamp<int64_t>(strip_bytes() / row_bytes / kChunk, flat_ ? 1 : 2, 32) * kChunk;
    lines_ = flat_ ? rows : std::clamp<int64_t>(rows / pitch_, 1, windows.height);
    for (const Tap& tap : windows_.taps) tap_offset_.push_back(flat_ ? 0 : offset(tap));
  }

  // Positions are split into strips: lines of an image, or any run of positions where rows need no padding.
  struct Strip {
    int64_t first, image, line, lines;  // the first position; of a flat strip each position is a line
    int64_t width, pitch;
    int64_t rows() const { return (lines - 1) * pitch + width; }
    int64_t chunks() const { return ceil_div(rows(), kChunk); }
    int64_t positions_before(int64_t row) const {
      return pitch == width ? row : row / pitch * width + std::min(row % pitch, width);
    }
  };

  int64_t strips() const {
    if (windows_.positions() == 0) return 0;
    return flat_ ? ceil_div(windows_.positions(), lines_) : windows_.batch * image_strips();
  }

  Strip strip(int64_t index) const {
    if (flat_) return {index * lines_, 0, 0, std::min(lines_, windows_.positions() - index * lines_), 1, 1};
    const int64_t image = index / image_strips(), line = index % image_strips() * lines_;
    return {(image * windows_.height + line) * windows_.width, image,          line,
            std::min(lines_, windows_.height - line),          windows_.width, pitch_};
  }

  // Chunks of all strips, numbered in their order.
  int64_t chunks() const { return strips() == 0 ? 0 : first_chunk(strips()); }
  int64_t first_chunk(int64_t index) const {
    const int64_t images = flat_ ? 0 : index / image_strips(), rest = index - images * image_strips();
    const int64_t whole = strip(0).chunks(), last = strip(image_strips() - 1).chunks();
    const int64_t of_image = (image_strips() - 1) * whole + last;
    return images * of_image + (rest == image_strips() ? of_image : rest * whole);
  }
  struct Chunk {
    int64_t strip, row;  // its first
  };
  Chunk chunk(int64_t index) const {
    const int64_t of_image = first_chunk(flat_ ? strips() : image_strips()), whole = strip(0).chunks();
    const int64_t image = index / of_image, rest = index % of_image, strip = std::min(rest / whole, image_strips() - 1);
    return {image * image_strips() + strip, (rest - strip * whole) * kChunk};
  }

  // Whether positions read pixel after pixel of the source, one for one.
  bool in_order() const { return in_order_; }
  int64_t pitch() const { return flat_ ? windows_.width : pitch_; }
  // Rows that read() has, those behind the last that a tap reads included.
  int64_t read_rows(const Strip& strip) const {
    return flat_ ? strip.rows() : static_cast<int64_t>(planes_.size()) * plane_rows() + shared_ + kSlack;
  }
  bool equal_strips() const { return strips() > 0 && (flat_ || windows_.height % lines_ == 0); }
  int64_t max_read_rows() const { return flat_ ? lines_ : read_rows(strip(0)); }
  int64_t max_rows() const { return flat_ ? lines_ : strip(0).rows(); }
  // Whether filters of this shape are packed as they are for the sake of the distance of taps.
  bool merges_by_dilation() const { return !merged_ && channels_ <= kMaxMergedChannels && windows_.taps.size() > 1; }
  int64_t pixel() const { return pixel_; }          // elements of a staged pixel
  const AmxDepth& depth() const { return depth_; }  // of a tap
  int64_t row_elements() const { return unit_; }    // distance of rows
  const std::vector<int64_t>& tap_offset() const { return tap_offset_; }
  int64_t taps() const { return static_cast<int64_t>(windows_.taps.size()); }

  // The memory that a strip reads, where all of it is read but little else.
  struct Memory {
    const uint16_t *begin = nullptr, *end = nullptr;
  };
  Memory memory_of(const Strip& strip) const {
    if (grid_.channel_stride != 1 || (flat_ && !in_order_)) return {};
    if (flat_) return {source_ + grid_.offset(strip.first), source_ + grid_.offset(strip.first + strip.lines)};
    const int64_t begin = std::clamp<int64_t>((strip.line + low_) * windows_.step_height, 0, grid_.height);
    const int64_t end =
        std::clamp<int64_t>((strip.line + strip.lines + high_) * windows_.step_height, begin, grid_.height);
    const uint16_t* image = source_ + strip.image * grid_.image_stride;
    return {image + begin * grid_.line_stride, image + end * grid_.line_stride};
  }

  int64_t staged_elements() const {
    if (windows_.positions() == 0 || taps() == 0) return 0;
    if (flat_) return (lines_ + kSlack) * unit_;
    return read_rows(strip(0)) * unit_ + depth_.elements();  // merged rows overlap
  }

  // The strip's rows, staged unless they can be read in place: at least 32, for whole tiles that end with the last.
  const uint16_t* read(const Strip& strip, uint16_t* staged) const {
    if (taps() == 0) return staged;
    if (in_place_ && strip.rows() >= kSlack) return source_ + strip.first * unit_;
    if (flat_)
      stage_positions(strip, staged);
    else
      for (size_t p = 0; p < planes_.size(); ++p) stage_plane(strip, planes_[p], staged + p * plane_rows() * unit_);
    return staged;
  }

 private:
  static constexpr int64_t kSlack = 32;  // rows behind the last that are read
  // Of a strip's rows: with the filters, the outputs and the next strip within L2. Lines of padding want more of them.
  int64_t strip_bytes() const { return flat_ ? 96 << 10 : 256 << 10; }
  static constexpr int64_t kMaxMergedChannels = 16;

  struct Plane {
    int64_t height_phase, width_phase;
  };

  static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
  int64_t image_strips() const { return flat_ ? strips() : ceil_div(windows_.height, lines_); }
  int64_t plane_rows() const { return (lines_ + high_ - low_) * pitch_; }
  int64_t column_step() const { return merged_ ? 1 : windows_.step_width; }

  void plan_rows(bool apart) {
    const auto& taps = windows_.taps;
    const bool at_origin = taps.size() == 1 && taps[0].height == 0 && taps[0].width == 0;
    flat_ = taps.empty() || (at_origin && (windows_.height - 1) * windows_.step_height < grid_.height &&
                             (windows_.width - 1) * windows_.step_width < grid_.width);
    const int64_t run = adjacent_taps();
    merged_ = !flat_ && channels_ <= kMaxMergedChannels && run > 1;
    if (merged_) {
      merge(run);
    } else {
      depth_ = AmxDepth(channels_);
      pixel_ = unit_ = depth_.elements() + (apart && !flat_ && depth_.elements() % 512 == 0 ? 32 : 0);
    }
    in_order_ = flat_ && windows_.step_height == 1 && windows_.step_width == 1 && windows_.height == grid_.height &&
                windows_.width == grid_.width;
    in_place_ = in_order_ && grid_.channel_stride == 1 && grid_.uniform() && grid_.pixel_stride == unit_;
  }

  // How many taps a filter line has, if they are adjacent pixels, and all lines alike; else 1.
  int64_t adjacent_taps() const {
    const auto& taps = windows_.taps;
    size_t run = 0;
    while (run < taps.size() && taps[run].height == taps[0].height) ++run;
    if (run == 0 || taps.size() % run != 0) return 1;
    for (size_t t = 0; t < taps.size(); ++t)
      if (taps[t].width != taps[0].width + static_cast<int64_t>(t % run) || taps[t].height != taps[t - t % run].height)
        return 1;
    return static_cast<int64_t>(run);
  }

  void merge(int64_t run) {
    for (pixel_ = ceil_div(channels_, 2) * 2; AmxDepth(run * pixel_).elements() != run * pixel_;) pixel_ += 2;
    depth_ = AmxDepth(run * pixel_);
    unit_ = windows_.step_width * pixel_;
    run_ = run;
    std::vector<Tap> lines;
    for (size_t t = 0; t < windows_.taps.size(); t += run) lines.push_back(windows_.taps[t]);
    windows_.taps = lines;
  }

  Plane plane_of(const Tap& tap) const {
    const auto phase = [](int64_t at, int64_t step) { return at - floor_div(at, step) * step; };
    return {phase(tap.height, windows_.step_height), merged_ ? 0 : phase(tap.width, windows_.step_width)};
  }

  size_t plane_index(const Tap& tap) const {
    const Plane plane = plane_of(tap);
    size_t p = 0;
    while (p < planes_.size() &&
           (planes_[p].height_phase != plane.height_phase || planes_[p].width_phase != plane.width_phase))
      ++p;
    return p;
  }

  void add_plane(const Tap& tap) {
    if (plane_index(tap) == planes_.size()) planes_.push_back(plane_of(tap));
    const int64_t line = floor_div(tap.height, windows_.step_height), column = floor_div(tap.width, column_step());
    low_ = std::min(low_, line), high_ = std::max(high_, line);
    left_ = std::min(left_, column), right_ = std::max(right_, column);
  }

  void set_pitch() {
    if (merged_) {
      pitch_ = windows_.width - 1 + ceil_div(run_, windows_.step_width);
      return;
    }
    int64_t columns = 0;  // of the source, in a plane
    for (const Plane& p : planes_) columns = std::max(columns, ceil_div(grid_.width - p.width_phase, column_step()));
    const int64_t before = std::max<int64_t>(0, -left_);
    const int64_t behind = std::max<int64_t>(0, windows_.width + right_ - columns);
    shared_ = std::min({before, behind, right_ - left_});  // each position has a row of its own
    pitch_ = windows_.width + right_ - left_ - shared_;
  }

  int64_t offset(const Tap& tap) const {
    const int64_t line = floor_div(tap.height, windows_.step_height) - low_;
    const int64_t column = floor_div(tap.width, column_step()) - left_;
    return (static_cast<int64_t>(plane_index(tap)) * plane_rows() + line * pitch_ + column) * unit_;
  }

  // `count` pixels, `step` pixels of the source apart.
  void stage_pixels(int64_t element, int64_t step, int64_t count, uint16_t* to) const {
    const uint16_t* from = source_ + element;
    const int64_t distance = step * grid_.pixel_stride;
    if (grid_.channel_stride == 1 && distance == pixel_ && channels_ == pixel_) {
      std::memcpy(to, from, static_cast<size_t>(count * pixel_) * sizeof *to);
      return;
    }
    if (grid_.channel_stride == 1 && channels_ == depth_.elements())
      return kernels_.copy_pixels(from, distance, count, channels_, to, pixel_);
    if (grid_.channel_stride == 1 && channels_ == 3 && pixel_ == 4) return stage_colors(from, distance, count, to);
    const bool lines = grid_.channel_stride == 1 && channels_ > kMaxMergedChannels;
    for (int64_t i = 0; i < count; ++i, from += distance, to += pixel_) {
      if (lines)
        std::memcpy(to, from, static_cast<size_t>(channels_) * sizeof *to);
      else
        for (int64_t c = 0; c < channels_; ++c) to[c] = from[c * grid_.channel_stride];
      std::fill(to + channels_, to + pixel_, uint16_t{0});
    }
  }

  // 3 channels as 4, a word a pixel: nothing is read behind the last.
  static void stage_colors(const uint16_t* from, int64_t distance, int64_t count, uint16_t* to) {
    constexpr uint64_t kColors = (uint64_t{1} << 48) - 1;
    uint64_t pixel = 0;
    for (int64_t i = 0; i + 1 < count; ++i, from += distance, to += 4) {
      std::memcpy(&pixel, from, sizeof pixel);
      pixel &= kColors;
      std::memcpy(to, &pixel, sizeof pixel);
    }
    pixel = 0;
    if (count > 0) std::memcpy(&pixel, from, 3 * sizeof *from);
    if (count > 0) std::memcpy(to, &pixel, sizeof pixel);
  }

  void stage_positions(const Strip& strip, uint16_t* to) const {
    const int64_t end = strip.first + strip.lines;
    for (int64_t p = strip.first, count; p < end; p += count, to += count * unit_) {
      const int64_t column = p % windows_.width, line = p / windows_.width;
      count = std::min(end - p, windows_.width - column);
      const int64_t element = line / windows_.height * grid_.image_stride +
                              line % windows_.height * windows_.step_height * grid_.line_stride +
                              column * windows_.step_width * grid_.pixel_stride;
      stage_pixels(element, windows_.step_width, count, to);
    }
  }

  void stage_plane(const Strip& strip, const Plane& plane, uint16_t* to) const {
    const int64_t line_elements = pitch_ * unit_;
    for (int64_t l = 0; l < strip.lines + high_ - low_; ++l, to += line_elements) {
      const int64_t h = (strip.line + l + low_) * windows_.step_height + plane.height_phase;
      if (h < 0 || h >= grid_.height)
        std::fill(to, to + line_elements, uint16_t{0});
      else
        stage_line(strip.image * grid_.image_stride + h * grid_.line_stride, plane, to);
    }
    std::fill(to, to + (shared_ + kSlack) * unit_ + depth_.elements(),
              uint16_t{0});  // the next plane, if any, comes next
  }

  // Pixel x of a line is source column (x + left) * step + phase, or 0 outside of the image.
  void stage_line(int64_t element, const Plane& plane, uint16_t* to) const {
    const int64_t pixels = pitch_ * unit_ / pixel_, step = column_step();
    const int64_t columns = ceil_div(grid_.width - plane.width_phase, step);
    const int64_t begin = std::clamp<int64_t>(-left_, 0, pixels), end = std::clamp(columns - left_, begin, pixels);
    std::fill(to, to + begin * pixel_, uint16_t{0});
    stage_pixels(element + ((begin + left_) * step + plane.width_phase) * grid_.pixel_stride, step, end - begin,
                 to + begin * pixel_);
    std::fill(to + end * pixel_, to + pixels * pixel_, uint16_t{0});
  }

  const AmxKernels& kernels_;
  const uint16_t* source_;
  Grid grid_;
  int64_t channels_;
  Windows windows_;  // its taps: the merged ones
  bool flat_ = false, in_order_ = false, in_place_ = false, merged_ = false;
  AmxDepth depth_{1};
  int64_t pixel_ = 0, unit_ = 0, run_ = 1;
  static constexpr int64_t kFar = int64_t{1} << 60;
  int64_t low_ = kFar, high_ = -kFar, left_ = kFar, right_ = -kFar;  // lines and columns of the taps, in strides
  int64_t pitch_ = 1, lines_ = 1, shared_ = 0;  // shared: zeros behind a line that are before the next
  std::vector<Plane> planes_;
  std::vector<int64_t> tap_offset_;
};

}  // namespace fusedconvbn
