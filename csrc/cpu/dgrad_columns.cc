// The gradient by the inputs where they have few channels: a convolution that produces them would fill few columns of
// a register tile (the 3 channels of an image: 3 of 32).
//
// For a panel of positions (the columns of a tile) one product with the filters gives what every tap and channel adds
// to the inputs: a row each. The rows are added, shifted by their taps, to lines that are kept channel by channel and
// phase of the stride by phase, so that neighbours of one tap stay neighbours. A line is written once, when no later
// position adds to it. Sums run in the order of the positions, and tasks are fixed by the problem.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "convolve.h"
#include "span.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

constexpr int64_t kTasks = 16;  // enough for as many threads

template <class C>
class ColumnGradient {
 public:
  ColumnGradient(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers, const void* conv_grad)
      : p_(p),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        dz_(static_cast<const C*>(conv_grad)),
        filters_(static_cast<const char*>(buffers.filters)),
        d_inputs_(static_cast<char*>(buffers.d_inputs)),
        span_((p.filter_height - 1) * p.dilation_height + 1),
        margin_(std::max<int64_t>(0, -shift(0))),
        width_(margin_ + std::max(p.out_width + shift(p.filter_width - 1), ceil_div(p.in_width, p.stride_width))),
        chunks_(std::clamp<int64_t>(kTasks / std::max<int64_t>(p.batch, 1), 1, p.in_height)) {}

  size_t scratch_bytes(int workers) {
    carve(nullptr, workers);
    return scratch_bytes_;
  }

  void run(int workers, char* scratch, ParallelFor* parallel) {
    carve(scratch, workers);
    convert_filters();
    parallel->run(p_.batch * chunks_, [&](int64_t task, int worker) {
      const int64_t chunk = task % chunks_;
      run_lines(task / chunks_, chunk * p_.in_height / chunks_, (chunk + 1) * p_.in_height / chunks_, workers_[worker]);
    });
  }

 private:
  struct Worker {
    C* dz;     // [K][panel]
    C* tile;   // [rows()][panel]
    C* lines;  // [span_][line_elements()]
    C** to;    // [rows()]
  };
  // Lines [begin, end) of an image, of which those before `next` are written.
  struct Lines {
    int64_t image, begin, end, next;
  };

  int64_t rows() const { return p_.taps() * p_.in_channels; }
  int64_t line_elements() const { return p_.stride_width * p_.in_channels * width_; }
  // Tap w of position j reads the pixel j + shift(w) of phase(w).
  int64_t column(int64_t w) const { return w * p_.dilation_width - p_.pad_left; }
  int64_t shift(int64_t w) const { return floor_div(column(w), p_.stride_width); }
  int64_t phase(int64_t w) const { return column(w) - shift(w) * p_.stride_width; }
  C* line(const Worker& w, int64_t h) const { return w.lines + h % span_ * line_elements(); }

  void carve(char* base, int workers) {
    Arena arena(base);
    packed_ = arena.take<C>(rows() * p_.out_channels);
    filter_rows_ = arena.take<const C*>(rows());
    for (int i = 0; i < workers; ++i)
      workers_.push_back({arena.take<C>(p_.out_channels * k_.panel), arena.take<C>(rows() * k_.panel),
                          arena.take<C>(span_ * line_elements()), arena.take<C*>(rows())});
    scratch_bytes_ = arena.used();
  }

  // Rows in the order [filter column][filter line][channel]: one that adds to the same pixels is far away.
  void convert_filters() const {
    storage_.kernels.load(filters_, p_.out_channels, 1, rows(), p_.out_channels, packed_, p_.out_channels);
    const C** row = filter_rows_;
    for (int64_t w = 0; w < p_.filter_width; ++w)
      for (int64_t h = 0; h < p_.filter_height; ++h)
        for (int64_t c = 0; c < p_.in_channels; ++c)
          *row++ = packed_ + ((h * p_.filter_width + w) * p_.in_channels + c) * p_.out_channels;
  }

  void run_lines(int64_t image, int64_t begin, int64_t end, const Worker& w) const {
    Lines lines{image, begin, end, begin};
    std::fill(w.lines, w.lines + span_ * line_elements(), C(0));
    const int64_t first = std::max<int64_t>(0, ceil_div(begin + p_.pad_top - span_ + 1, p_.stride_height));
    const int64_t last = std::min(p_.out_height, floor_div(end - 1 + p_.pad_top, p_.stride_height) + 1);
    write(first * p_.stride_height - p_.pad_top, w, &lines);
    for (int64_t at = first * p_.out_width; at < last * p_.out_width; at += k_.panel)
      run_panel(at, std::min(k_.panel, last * p_.out_width - at), w, &lines);
    write(end, w, &lines);
  }

  // Positions [first, first + count) of the image.
  void run_panel(int64_t first, int64_t count, const Worker& w, Lines* lines) const {
    const int64_t image = lines->image * p_.out_height * p_.out_width;
    k_.transpose(dz_ + (image + first) * p_.out_channels, p_.out_channels, count, p_.out_channels, w.dz, k_.panel);
    k_.gemm({filter_rows_, rows(), rows(), 1, p_.out_channels, 0}, w.dz, k_.panel, {w.tile});
    for (int64_t done = 0, run; done < count; done += run) {
      const int64_t i = (first + done) / p_.out_width, j = (first + done) % p_.out_width;
      run = std::min(count - done, p_.out_width - j);
      if (done == 0 || j == 0) point(i, w, *lines);
      k_.add_rows(w.tile + done, rows(), run, w.to, j);
      if (j + run == p_.out_width) write((i + 1) * p_.stride_height - p_.pad_top, w, lines);
    }
  }

  // Where position 0 of line i adds each row; null where that is not among these lines.
  void point(int64_t i, const Worker& w, const Lines& lines) const {
    C** to = w.to;
    for (int64_t v = 0; v < p_.filter_width; ++v)
      for (int64_t k = 0; k < p_.filter_height; ++k) {
        const int64_t h = i * p_.stride_height - p_.pad_top + k * p_.dilation_height;
        const bool here = h >= lines.begin && h < lines.end;
        C* first = here ? line(w, h) + phase(v) * p_.in_channels * width_ + margin_ + shift(v) : nullptr;
        for (int64_t c = 0; c < p_.in_channels; ++c) *to++ = here ? first + c * width_ : nullptr;
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
  const C* dz_;  // [pixels][K]
  const char* filters_;
  char* d_inputs_;
  int64_t span_;           // lines that a position adds to
  int64_t margin_;         // pixels of a line left of the image
  int64_t width_;          // pixels of a line, phase and channel
  int64_t chunks_;         // of the lines of an image
  C* packed_;              // [rows()][K]
  const C** filter_rows_;  // [rows()]
  std::vector<Worker> workers_;
  size_t scratch_bytes_ = 0;
};

}  // namespace

size_t dgrad_columns_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(
      p.dtype, [&](auto c) { return ColumnGradient<decltype(c)>(set, p, {}, nullptr).scratch_bytes(device.threads); });
}

Status run_dgrad_columns(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_inputs == nullptr) return Status{};
  with_compute_type(call.params.dtype, [&](auto c) {
    ColumnGradient<decltype(c)>(set, call.params, *call.backward, call.conv_grad)
        .run(call.device.threads, call.scratch, call.parallel);
  });
  return Status{};
}

}  // namespace fusedconvbn
