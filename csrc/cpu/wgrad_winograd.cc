// The gradient by the filters by Winograd's algorithm F(MxM, 3x3), transposed: with the windows d of the input, the
// tiles dz of MxM pixels of the gradient of z, and the matrices of winograd.inl,
//   d_filters = G' [sum over tiles of (B' d B) * (A dz A')] G.
// Each of the (M+2)^2 planes is a matrix product, as deep as there are tiles, of rows of input by columns of output
// channels.
//
// A part of the work is a block of rows and columns whose sums stay in L2 over a range of the tiles; it transforms what
// it needs of them itself, a chunk of tiles at a time. Blocks and ranges follow from the problem alone, and the ranges'
// filters are added in their order, so the bits do not depend on the threads.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "stages.h"
#include "winograd.h"

namespace fusedconvbn {
namespace {

constexpr int64_t kChunk = 32;      // tiles: with blocks of 64 x 64 a plane's operands and sums are 36 KiB, within L1
constexpr int64_t kMaxRows = 72;    // of a block: input channels
constexpr int64_t kMaxBytes = 256;  // of a row of a block: output channels. All planes' sums of 64 x 64 are 576 KiB
constexpr int64_t kTasks = 16;      // enough for as many threads
constexpr int64_t kMinChunks = 8;   // of a range

template <class C, int M>
class WinogradFilterGradient {
 public:
  WinogradFilterGradient(const KernelSet& set, const ConvBnParams& p, const BackwardBuffers& buffers,
                         const void* conv_grad)
      : p_(p),
        k_(compute_kernels<C>(set)),
        transforms_(winograd_kernels<C, M>(k_)),
        sum_storage_(storage_of<C>(set, sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32)),
        d_filters_(filter_image(buffers.d_filters, storage_of<C>(set, p.dtype))),
        max_panels_(kMaxBytes / (k_.panel * static_cast<int64_t>(sizeof(C)))),
        windows_(winograd_windows<M>(forward_windows(p))),
        inputs_(Image<C>(buffers.inputs, storage_of<C>(set, p.dtype), input_grid(p)), p.in_channels, windows_, false,
                kChunk, kChunk),
        dz_(conv_grad_image<C>(set, p, conv_grad), p.out_channels, tiles(windows_), false, kChunk, kChunk) {
    row_blocks_ = ceil_div(p.in_channels, kMaxRows);
    column_blocks_ = ceil_div(p.out_channels, max_panels_ * k_.panel);
    chunks_ = ceil_div(windows_.positions(), kChunk);
    ranges_ = std::clamp<int64_t>(std::min(chunks_ / kMinChunks, kTasks / (row_blocks_ * column_blocks_)), 1, kTasks);
  }

  size_t scratch_bytes(int workers) {
    carve(nullptr, workers);
    return scratch_bytes_;
  }

  void run(int workers, char* scratch, ParallelFor* parallel) {
    carve(scratch, workers);
    std::fill(zeros_, zeros_ + zero_elements(), C(0));
    const int64_t blocks = row_blocks_ * column_blocks_;
    parallel->run(ranges_ * blocks,
                  [&](int64_t task, int worker) { accumulate(task / blocks, block(task % blocks), workers_[worker]); });
    if (ranges_ > 1) parallel->run(9 * p_.in_channels, [&](int64_t row, int) { add_ranges(row); });
  }

 private:
  static constexpr int64_t kPlanes = (M + 2) * (M + 2);
  static constexpr int64_t kOdd = 64 / sizeof(C);  // elements that make a plane an odd number of cache lines

  struct Worker {
    typename WindowReader<C>::Scratch inputs, dz;
    C* input_planes;  // [kPlanes][kChunk][input_ld()]
    C* dz_planes;     // [kPlanes][kChunk][dz_ld()]
    C* sums;          // [max_panels_][kPlanes][kMaxRows][panel]
    C* filters;       // [9][kMaxRows][panel]
  };
  struct FilterBlock {
    int64_t row, rows, column, cols;
  };

  static Windows tiles(const Windows& windows) {
    Windows w{windows.batch, windows.height, windows.width, M, M, {}};
    for (int64_t h = 0; h < M; ++h)
      for (int64_t v = 0; v < M; ++v) w.taps.push_back({h, v});
    return w;
  }

  int64_t zero_elements() const { return std::max(p_.in_channels, p_.out_channels); }
  int64_t input_ld() const { return kMaxRows + kOdd; }
  int64_t input_plane() const { return kChunk * input_ld() + kOdd; }
  int64_t dz_ld() const { return max_panels_ * k_.panel + kOdd; }
  int64_t dz_plane() const { return kChunk * dz_ld() + kOdd; }
  int64_t sum_plane() const { return kMaxRows * k_.panel + kOdd; }
  int64_t filter_elements() const { return 9 * p_.in_channels * p_.out_channels; }

  FilterBlock block(int64_t index) const {
    const int64_t r = index / column_blocks_, c = index % column_blocks_, cols = max_panels_ * k_.panel;
    const int64_t row = r * p_.in_channels / row_blocks_, end = (r + 1) * p_.in_channels / row_blocks_;
    return {row, end - row, c * cols, std::min(cols, p_.out_channels - c * cols)};
  }

  void carve(char* base, int workers) {
    Arena arena(base);
    range_filters_ = arena.take<C>(ranges_ > 1 ? ranges_ * filter_elements() : 0);
    zeros_ = arena.take<C>(zero_elements());
    for (int w = 0; w < workers; ++w)
      workers_.push_back({inputs_.carve(&arena, zeros_), dz_.carve(&arena, zeros_),
                          arena.take<C>(kPlanes * input_plane()), arena.take<C>(kPlanes * dz_plane()),
                          arena.take<C>(max_panels_ * kPlanes * sum_plane()), arena.take<C>(9 * kMaxRows * k_.panel)});
    scratch_bytes_ = arena.used();
  }

  // One block of the filters over one range of the tiles.
  void accumulate(int64_t range, const FilterBlock& b, const Worker& w) const {
    const int64_t begin = range * chunks_ / ranges_, end = (range + 1) * chunks_ / ranges_;
    if (begin == end) std::fill(w.sums, w.sums + max_panels_ * kPlanes * sum_plane(), C(0));
    if (b.cols % k_.panel != 0) std::fill(w.dz_planes, w.dz_planes + kPlanes * dz_plane(), C(0));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, windows_.positions() - first);
      transform(first, count, b, w);
      for (int64_t column = 0; column < b.cols; column += k_.panel)
        k_.multiply_transposed_planes({kPlanes, b.rows, count, w.input_planes, input_ld(), input_plane(),
                                       w.dz_planes + column, dz_ld(), dz_plane(),
                                       w.sums + column / k_.panel * kPlanes * sum_plane(), sum_plane(), chunk > begin});
    }
    for (int64_t column = 0; column < b.cols; column += k_.panel)
      store(range, {b.row, b.rows, b.column + column, std::min(k_.panel, b.cols - column)},
            w.sums + column / k_.panel * kPlanes * sum_plane(), w.filters);
  }

  void transform(int64_t first, int64_t count, const FilterBlock& b, const Worker& w) const {
    inputs_.stage(first, count, {b.row, b.row + b.rows}, w.inputs);
    inputs_.point(first, count, w.inputs);
    transforms_.window[0][0]({w.inputs.rows, kChunk, count, kPlanes, b.rows, b.row},
                             {w.input_planes, input_ld(), kPlaneDepth, input_plane()});
    dz_.point(first, count, w.dz);
    transforms_.gradient({w.dz.rows, kChunk, count, M * M, b.cols, b.column},
                         {w.dz_planes, dz_ld(), kPlaneDepth, dz_plane()});
  }

  // Filters as an image: a pixel for each tap and input channel.
  Image<C> filter_image(const void* data, const Storage<C>& storage) const {
    return Image<C>(data, storage, image_grid(DataFormat::kNHWC, 1, 9, p_.in_channels, p_.out_channels));
  }

  // Transforms the sums of a panel into filters: the range's, or d_filters where there is but one range.
  void store(int64_t range, const FilterBlock& b, const C* sums, C* filters) const {
    transforms_.filter_gradient(sums, sum_plane(), b.rows, filters);
    const Image<C> to =
        ranges_ > 1 ? filter_image(range_filters_ + range * filter_elements(), sum_storage_) : d_filters_;
    for (int64_t tap = 0; tap < 9; ++tap)
      to.write(tap * p_.in_channels + b.row, b.rows, b.column, b.cols, {filters + tap * b.rows * k_.panel, k_.panel});
  }

  // Adds the ranges' filters for one tap and input channel.
  void add_ranges(int64_t row) const {
    const int64_t first = row * p_.out_channels;
    C* sum = range_filters_ + first;
    for (int64_t range = 1; range < ranges_; ++range)
      for (int64_t i = 0; i < p_.out_channels; ++i) sum[i] += sum[range * filter_elements() + i];
    d_filters_.write(row, 1, 0, p_.out_channels, {sum, p_.out_channels});
  }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  const WinogradKernels<C>& transforms_;
  Storage<C> sum_storage_;
  Image<C> d_filters_;
  int64_t max_panels_;  // of a block
  Windows windows_;
  WindowReader<C> inputs_, dz_;
  int64_t row_blocks_, column_blocks_, chunks_, ranges_;
  C *range_filters_, *zeros_;  // range_filters_: [ranges][9][C][K]
  std::vector<Worker> workers_;
  size_t scratch_bytes_ = 0;
};

template <int M>
size_t scratch_of(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    return WinogradFilterGradient<decltype(c), M>(set, p, {}, nullptr).scratch_bytes(device.threads);
  });
}

template <int M>
Status run_with(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_filters == nullptr) return Status{};
  with_compute_type(call.params.dtype, [&](auto c) {
    WinogradFilterGradient<decltype(c), M>(set, call.params, *call.backward, call.conv_grad)
        .run(call.device.threads, call.scratch, call.parallel);
  });
  return Status{};
}

}  // namespace

size_t wgrad_winograd2_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return scratch_of<2>(set, p, device);
}
size_t wgrad_winograd4_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return scratch_of<4>(set, p, device);
}
Status run_wgrad_winograd2(const KernelSet& set, const StageCall& call) { return run_with<2>(set, call); }
Status run_wgrad_winograd4(const KernelSet& set, const StageCall& call) { return run_with<4>(set, call); }

}  // namespace fusedconvbn
