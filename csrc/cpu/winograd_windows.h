// The windows of Winograd's F(MxM, 3x3): where they lie in the image, and in planes.
//
// Where 1 or 2 outputs are left at the end of a line or a column, F(4x4) takes windows of two outputs there: their F(2,
// 3) is of four of its six points, so that they need the transformed filters that are there, and 4 of 6 planes. At
// 14x14 that is 484 products a channel and not 576. For the rows of every plane to be neighbours, the windows of a task
// are sorted by kind.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "span.h"
#include "windows.h"

namespace fusedconvbn {

// The windows of F(MxM, 3x3) that cover the positions of `w`, whose taps are 3x3 and steps 1.
template <int M>
Windows winograd_windows(const Windows& w) {
  Windows tiles{w.batch, ceil_div(w.height, M), ceil_div(w.width, M), M, M, {}};
  for (int64_t h = 0; h < M + 2; ++h)
    for (int64_t v = 0; v < M + 2; ++v) tiles.taps.push_back({w.taps[0].height + h, w.taps[0].width + v});
  return tiles;
}

// In the order of their rows: every plane has the windows of neighbouring kinds.
enum WindowKind { kLowWindow, kWholeWindow, kNarrowWindow, kLowNarrowWindow, kWindowKinds };

inline WindowKind window_kind(bool low, bool narrow) {
  return low ? narrow ? kLowNarrowWindow : kLowWindow : narrow ? kNarrowWindow : kWholeWindow;
}
inline bool is_low(WindowKind kind) { return kind == kLowWindow || kind == kLowNarrowWindow; }
inline bool is_narrow(WindowKind kind) { return kind >= kNarrowWindow; }

// The rows in planes of a task's windows: those of a kind from begin[kind] on.
struct WindowRows {
  std::array<int64_t, kWindowKinds + 1> begin{};

  int64_t count(WindowKind kind) const { return begin[kind + 1] - begin[kind]; }

  // The rows of plane `plane` of (M+2)^2: of the points before the last, low and narrow windows have the first three.
  template <int M>
  Span of_plane(int64_t plane) const {
    const auto lacks = [](int64_t point) { return point > 2 && point <= M; };
    const bool no_low = lacks(plane / (M + 2)), no_narrow = lacks(plane % (M + 2));
    return {begin[no_low ? kWholeWindow : kLowWindow], begin[no_narrow ? kNarrowWindow
                                                             : no_low  ? kLowNarrowWindow
                                                                       : kWindowKinds]};
  }

  // The first of the next `count` rows of a kind, which are then passed over.
  int64_t take(WindowKind kind, int64_t count) {
    begin[kind] += count;
    return begin[kind] - count;
  }
};

// Neighbouring windows of one line, of which the last may be narrow, and the `lines` output lines of `pixels` that they
// give.
struct WindowLine {
  int64_t window, windows;
  bool low, narrow;
  int64_t first, pixels, lines;

  int64_t wide() const { return windows - narrow; }
};

template <int M>
class WinogradWindows {
 public:
  explicit WinogradWindows(const Windows& outputs) : outputs_(outputs), windows_(winograd_windows<M>(outputs)) {}

  const Windows& windows() const { return windows_; }
  int64_t positions() const { return windows_.positions(); }
  int64_t output_width() const { return outputs_.width; }

  // Calls f(WindowLine) for windows begin .. end - 1, line by line.
  template <class F>
  void for_lines(int64_t begin, int64_t end, F f) const {
    for (int64_t at = begin, count; at < end; at += count) {
      const int64_t line = at / windows_.width, column = at % windows_.width;
      count = std::min(end - at, windows_.width - column);
      const int64_t image = line / windows_.height, h = line % windows_.height * M, left = outputs_.height - h;
      const int64_t pixels = std::min(M * count, outputs_.width - M * column);
      f(WindowLine{at, count, small(left), small(pixels - M * (count - 1)),
                   (image * outputs_.height + h) * outputs_.width + M * column, pixels, std::min<int64_t>(M, left)});
    }
  }

  WindowRows rows(int64_t begin, int64_t end) const {
    std::array<int64_t, kWindowKinds> counts{};
    for_lines(begin, end, [&](const WindowLine& line) {
      counts[window_kind(line.low, false)] += line.wide();
      counts[window_kind(line.low, true)] += line.narrow;
    });
    WindowRows rows;
    for (int kind = 0; kind < kWindowKinds; ++kind) rows.begin[kind + 1] = rows.begin[kind] + counts[kind];
    return rows;
  }

 private:
  static bool small(int64_t outputs) { return M == 4 && outputs <= 2; }

  Windows outputs_, windows_;
};

}  // namespace fusedconvbn
