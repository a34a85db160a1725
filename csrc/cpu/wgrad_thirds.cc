// The gradient by the filters of a 1x1 convolution of stride 1, in float32 on AMX (thirds.inl): inputs' dz, products
// over the pixels.
//
// The narrower of the two images is the left operand, which is transposed as it is cut in thirds; the wider one passes
// by in panels, each cut just before its products. Ranges of blocks of pixels have sums of their own, added in their
// order: the bits do not depend on the threads. Of a single range each part of the panels is stored as soon as its sums
// are complete, from L2.
#include <algorithm>
#include <vector>

#include "compute_type.h"
#include "stages.h"
#include "thirds_convolve.h"

namespace fusedconvbn {
namespace {

class ThirdsFilterGradient {
 public:
  ThirdsFilterGradient(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device,
                       const BackwardBuffers& buffers, const void* conv_grad, char* scratch)
      : p_(p),
        k_(set.f32),
        d_filters_(buffers.d_filters, storage_of<float>(set, DType::kFloat32),
                   image_grid(DataFormat::kNHWC, 1, 1, p.in_channels, p.out_channels)),
        inputs_narrower_(p.in_channels <= p.out_channels),
        narrow_{static_cast<const float*>(inputs_narrower_ ? buffers.inputs : conv_grad),
                std::min(p.in_channels, p.out_channels)},
        wide_{static_cast<const float*>(inputs_narrower_ ? conv_grad : buffers.inputs),
              std::max(p.in_channels, p.out_channels)},
        depth_(wide_.channels <= kWide ? kDepth : kDepth / 2),
        blocks_(ceil_div(p.pixels(), depth_)),
        ranges_(std::clamp<int64_t>(std::min(blocks_ / kMinBlocks, kMaxSums / sum_elements()), 1, kMaxRanges)),
        parts_(std::min(panels(), std::max(ceil_div(sum_elements(), kMaxPart),
                                           ceil_div(device.threads == 1 ? 1 : kTasks * device.threads, ranges_)))) {
    Arena arena(scratch);
    sums_ = arena.take<float>(one_range() ? 0 : ranges_ * sum_elements());
    for (int w = 0; w < device.threads; ++w)
      workers_.push_back(
          {arena.take<float>(one_range() ? rows() * ceil_div(panels(), parts_) * kThirdsColumns : 0),
           arena.take<const float*>(kDepth),
           arena.take<uint16_t>(left_elements(rows(), chunks())),
           {arena.take<uint16_t>(right_elements(chunks())), arena.take<uint16_t>(right_elements(chunks()))},
           arena.take<float>(kThirdsRows * padded(p.out_channels))});
    scratch_bytes_ = arena.used();
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  void run(ParallelFor* parallel) const {
    parallel->run(ranges_ * parts_, [&](int64_t task, int worker) {
      const Span panels = part(task % parts_, parts_, this->panels());
      if (one_range())
        make(panels, workers_[worker]);
      else
        accumulate(task / parts_, panels,
                   {sums_ + task / parts_ * sum_elements() + panels.begin * kThirdsColumns, ld()}, workers_[worker]);
    });
    if (one_range()) return;
    parallel->run(ceil_div(p_.in_channels, kThirdsRows),
                  [&](int64_t rows, int worker) { merge(rows * kThirdsRows, workers_[worker].transposed); });
  }

 private:
  static constexpr int64_t kDepth = 192, kWide = 640;  // pixels of a block; channels beyond which it has half of them
  static constexpr int64_t kMinBlocks = 4, kMaxRanges = 16, kTasks = 4;
  static constexpr int64_t kMaxSums = 512 << 10;  // elements of all ranges: adding them reads them once more
  static constexpr int64_t kMaxPart = 320 << 10;  // of a part: they stay in L2

  struct Pixels {
    const float* data;
    int64_t channels;
    const float* at(int64_t pixel) const { return data + pixel * channels; }
  };
  struct Worker {
    float* sums;             // of a part, where there is one range
    const float** pointers;  // [kDepth]
    uint16_t* left;          // of a block
    uint16_t* right[2];      // of a panel of it, and of the next one, which is cut meanwhile
    float* transposed;       // [kThirdsRows][padded K]
  };

  static int64_t padded(int64_t channels) { return ceil_div(channels, kThirdsColumns) * kThirdsColumns; }
  int64_t rows() const { return padded(narrow_.channels); }
  int64_t panels() const { return ceil_div(wide_.channels, kThirdsColumns); }
  int64_t chunks() const { return depth_ / kThirdsChunk; }
  int64_t ld() const { return panels() * kThirdsColumns; }
  int64_t sum_elements() const { return rows() * ld(); }
  bool one_range() const { return ranges_ == 1; }

  // Some panels of the result.
  void make(const Span& panels, const Worker& w) const {
    const Block<float> sums{w.sums, panels.size() * kThirdsColumns};
    accumulate(0, panels, sums, w);
    const int64_t column = panels.begin * kThirdsColumns;
    const Span wide{column, std::min(column + sums.ld, wide_.channels)}, narrow{0, narrow_.channels};
    store(sums, inputs_narrower_ ? narrow : wide, inputs_narrower_ ? wide : narrow, w.transposed);
    k_.end_streaming();
  }

  // Some panels of the sums of a range.
  void accumulate(int64_t range, const Span& panels, const Block<float>& sums, const Worker& w) const {
    const int64_t begin = range * blocks_ / ranges_, end = (range + 1) * blocks_ / ranges_;
    if (begin == end)
      for (int64_t r = 0; r < rows(); ++r) std::fill_n(sums.data + r * sums.ld, panels.size() * kThirdsColumns, 0.0f);
    k_.amx.begin(kThirdsChunk);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * depth_, count = std::min(depth_, p_.pixels() - first);
      const int64_t next = block + 1 < end ? std::min(depth_, p_.pixels() - first - count) : 0;
      for (int64_t r = 0; r < count; ++r) w.pointers[r] = narrow_.at(first + r);
      const bool careful =
          k_.thirds->left_of_columns({w.pointers, depth_, count, 1, narrow_.channels, 0}, rows(), w.left);
      ThirdsAside aside{};
      aside.fetch = fetch_in(panels.size() * rows() / kThirdsRows * ceil_div(count, kThirdsChunk),
                             wide_.at(first + count), wide_.at(first + count + next));
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const Span pixels{first, first + count};
        if (panel == panels.begin) start_cut(pixels, panel, w, 1, &aside.right);
        k_.thirds->cut_right(&aside.right);
        const ThirdsRightCut cut = aside.right;
        if (cut.careful) k_.thirds->right(cut.from, cut.ld, cut.depth, cut.cols, true, cut.to);
        const int64_t chunks = ceil_div(count, kThirdsChunk);
        if (panel + 1 < panels.end) start_cut(pixels, panel + 1, w, chunks * rows() / kThirdsRows, &aside.right);
        for (int64_t row = 0; row < rows(); row += kThirdsRows)
          k_.thirds->multiply({w.left + row * kThirdsChunk, rows(), cut.to, chunks, careful, cut.careful},
                              block > begin, sums.data + row * sums.ld + (panel - panels.begin) * kThirdsColumns,
                              sums.ld, &aside);
      }
    }
    k_.amx.end();
  }

  // A panel of some pixels, in so many steps.
  void start_cut(const Span& pixels, int64_t panel, const Worker& w, int64_t steps, ThirdsRightCut* cut) const {
    const int64_t column = panel * kThirdsColumns, cols = std::min(kThirdsColumns, wide_.channels - column);
    *cut = {wide_.at(pixels.begin) + column,
            wide_.channels,
            pixels.size(),
            cols,
            w.right[panel % 2],
            0,
            2 * ceil_div(ceil_div(pixels.size(), 2), steps),
            false};
  }

  // Rows of the gradient, of all ranges.
  void merge(int64_t first, float* transposed) const {
    const int64_t count = std::min(kThirdsRows, p_.in_channels - first), columns = p_.out_channels;
    const int64_t rows = inputs_narrower_ ? count : columns, cols = inputs_narrower_ ? columns : count;
    float* sums = sums_ + first * (inputs_narrower_ ? ld() : 1);
    for (int64_t range = 1; range < ranges_; ++range)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) sums[r * ld() + c] += sums[range * sum_elements() + r * ld() + c];
    store({sums, ld()}, {first, first + count}, {0, columns}, transposed);
  }

  // The gradient by the filters of these channels.
  void store(const Block<float>& sums, const Span& inputs, const Span& outputs, float* transposed) const {
    if (inputs_narrower_) return d_filters_.write(inputs.begin, inputs.size(), outputs.begin, outputs.size(), sums);
    const Block<float> rows{transposed, padded(outputs.size())};
    for (int64_t first = inputs.begin; first < inputs.end; first += kThirdsRows) {
      const int64_t count = std::min(kThirdsRows, inputs.end - first);
      k_.transpose(sums.data + first - inputs.begin, sums.ld, outputs.size(), count, rows.data, rows.ld);
      d_filters_.write(first, count, outputs.begin, outputs.size(), rows);
    }
  }

  const ConvBnParams& p_;
  const ComputeKernels<float>& k_;
  Image<float> d_filters_;  // a pixel an input
  bool inputs_narrower_;
  Pixels narrow_, wide_;
  int64_t depth_, blocks_, ranges_, parts_;
  float* sums_;  // [ranges][narrower channels][ld()], where there are several
  std::vector<Worker> workers_;
  size_t scratch_bytes_;
};

}  // namespace

size_t wgrad_thirds_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return ThirdsFilterGradient(set, p, device, {}, nullptr, nullptr).scratch_bytes();
}

Status run_wgrad_thirds(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_filters == nullptr) return Status{};
  ThirdsFilterGradient(set, call.params, call.device, *call.backward, call.conv_grad, call.scratch).run(call.parallel);
  return Status{};
}

}  // namespace fusedconvbn
