// The gradient by the inputs.
//
// Input line h takes part in output line i through filter line k where h = i stride - pad + k dilation. All lines of
// one phase h mod stride read the same filter lines, at i = h / stride + (phase + pad - k dilation) / stride: so each
// phase (in both dimensions) is a stride-1 convolution of conv_grad with the transposed filters of its taps.
#include <algorithm>
#include <vector>

#include "amx_convolve.h"
#include "amx_dgrad.h"
#include "compute_type.h"
#include "convolve.h"
#include "pairs_convolve.h"
#include "stages.h"
#include "thirds_convolve.h"
#include "winograd.h"

namespace fusedconvbn {
namespace {

// The filter positions of a phase, each with its offset in source pixels, in the order of the offsets.
struct PhaseTap {
  int64_t index, offset;
};

std::vector<PhaseTap> phase_taps(int64_t phase, int64_t filter, int64_t stride, int64_t dilation, int64_t pad) {
  std::vector<PhaseTap> taps;
  for (int64_t k = filter - 1; k >= 0; --k) {
    const int64_t distance = phase + pad - k * dilation;
    if (distance % stride == 0) taps.push_back({k, distance / stride});
  }
  return taps;
}

// Every s-th pixel of an image, in both dimensions, from (height, width) on.
template <class C>
Image<C> phase_image(const void* data, const Storage<C>& storage, const ConvBnParams& p, int64_t height,
                     int64_t width) {
  Grid grid = input_grid(p);
  const int64_t element = height * grid.line_stride + width * grid.pixel_stride;
  grid.height = ceil_div(p.in_height - height, p.stride_height);
  grid.width = ceil_div(p.in_width - width, p.stride_width);
  grid.line_stride *= p.stride_height;
  grid.pixel_stride *= p.stride_width;
  return Image<C>(data ? static_cast<const char*>(data) + element * storage.element_bytes : nullptr, storage, grid);
}

// Conv: Convolution, or Winograd2 or Winograd4 for the one phase of stride 1.
template <class C, template <class> class Conv>
class Phase {
 public:
  Phase(const KernelSet& set, const ConvBnParams& p, const Image<C>& conv_grad, const void* d_inputs, int64_t height,
        int64_t width)
      : p_(p),
        k_(compute_kernels<C>(set)),
        storage_(storage_of<C>(set, p.dtype)),
        output_(phase_image<C>(d_inputs, storage_, p, height, width)),
        convolution_(k_, storage_, conv_grad, windows(height, width), {p.groups, p.group_out(), p.group_in()}) {}

  size_t scratch_bytes(int workers) const {
    Arena arena, zeros;
    convolution_.carve(&arena, workers);
    zeros.take<C>(p_.in_channels);
    return std::max(arena.used(), zeros.used());
  }

  void run(const void* filters, int workers, char* scratch, ParallelFor* parallel) const {
    Arena arena(scratch);
    if (tap_offset_.empty()) return clear(arena.take<C>(p_.in_channels), parallel);
    const FilterLayout transposed{filters, tap_offset_, p_.group_out(), 1, p_.out_channels};
    TileEpilogue<C> epilogue;
    epilogue.emit = [this](const Tile<C>& t) { output_.write(t.first, t.rows, t.channel, t.cols, {t.data, t.ld}); };
    if (output_.direct()) epilogue.row_by_row = [this](const Tile<C>& t) { return sums_to(k_, output_, t); };
    if (output_.takes_tiles()) epilogue.in_place = [this](const Tile<C>& t) { return sums_in_place(output_, t); };
    convolution_.run(transposed, convolution_.carve(&arena, workers), parallel, epilogue);
  }

 private:
  // No position reads these pixels.
  void clear(C* zeros, ParallelFor* parallel) const {
    std::fill(zeros, zeros + p_.in_channels, C(0));
    const int64_t pixels = output_.grid().pixels();
    parallel->run(ceil_div(pixels, kBlockRows), [&](int64_t block, int) {
      const int64_t first = block * kBlockRows, rows = std::min(kBlockRows, pixels - first);
      output_.write(first, rows, 0, p_.in_channels, {zeros, 0});
    });
  }

  Windows windows(int64_t height, int64_t width) {
    Windows w{p_.batch, output_.grid().height, output_.grid().width, 1, 1, {}};
    for (const PhaseTap& h : phase_taps(height, p_.filter_height, p_.stride_height, p_.dilation_height, p_.pad_top))
      for (const PhaseTap& v : phase_taps(width, p_.filter_width, p_.stride_width, p_.dilation_width, p_.pad_left)) {
        w.taps.push_back({h.offset, v.offset});
        tap_offset_.push_back((h.index * p_.filter_width + v.index) * p_.group_in() * p_.out_channels);
      }
    return w;
  }

  const ConvBnParams& p_;
  const ComputeKernels<C>& k_;
  Storage<C> storage_;
  Image<C> output_;
  std::vector<int64_t> tap_offset_;
  Conv<C> convolution_;
};

// The phases of one dimension that have taps, and phase 0, whose image is the largest: the others need no more memory.
std::vector<int64_t> distinct_phases(int64_t in, int64_t filter, int64_t stride, int64_t dilation, int64_t pad) {
  std::vector<int64_t> phases = {0};
  for (int64_t k = 0; k < filter; ++k) {
    const int64_t phase = ((k * dilation - pad) % stride + stride) % stride;
    if (phase < in) phases.push_back(phase);
  }
  std::sort(phases.begin(), phases.end());
  phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
  return phases;
}

template <class C, template <class> class Conv>
size_t scratch_as(const KernelSet& set, const ConvBnParams& p, const Image<C>& conv_grad, int workers) {
  size_t bytes = 0;
  for (int64_t h : distinct_phases(p.in_height, p.filter_height, p.stride_height, p.dilation_height, p.pad_top))
    for (int64_t w : distinct_phases(p.in_width, p.filter_width, p.stride_width, p.dilation_width, p.pad_left))
      bytes = std::max(bytes, Phase<C, Conv>(set, p, conv_grad, nullptr, h, w).scratch_bytes(workers));
  return bytes;
}

template <class C, template <class> class Conv>
void run_as(const KernelSet& set, const ConvBnParams& p, const Image<C>& conv_grad, const BackwardBuffers& b,
            int workers, char* scratch, ParallelFor* parallel) {
  for (int64_t h = 0; h < std::min(p.stride_height, p.in_height); ++h)
    for (int64_t w = 0; w < std::min(p.stride_width, p.in_width); ++w)
      Phase<C, Conv>(set, p, conv_grad, b.d_inputs, h, w).run(b.filters, workers, scratch, parallel);
}

template <template <class> class Conv>
size_t scratch_of(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype, [&](auto c) {
    using C = decltype(c);
    return scratch_as<C, Conv>(set, p, conv_grad_image<C>(set, p, nullptr), device.threads);
  });
}

template <template <class> class Conv>
Status run_with(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_inputs == nullptr) return Status{};
  with_compute_type(call.params.dtype, [&](auto c) {
    using C = decltype(c);
    run_as<C, Conv>(set, call.params, conv_grad_image<C>(set, call.params, call.conv_grad), *call.backward,
                    call.device.threads, call.scratch, call.parallel);
  });
  return Status{};
}

}  // namespace

FCB_DEFINE_STAGE(dgrad_direct, Convolution)
FCB_DEFINE_STAGE(dgrad_winograd2, Winograd2)
FCB_DEFINE_STAGE(dgrad_winograd4, Winograd4)

size_t dgrad_thirds_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return scratch_as<float, ThirdsConvolution>(set, p, conv_grad_image<float>(set, p, nullptr), device.threads);
}
Status run_dgrad_thirds(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_inputs == nullptr) return Status{};
  run_as<float, ThirdsConvolution>(set, call.params, conv_grad_image<float>(set, call.params, call.conv_grad),
                                   *call.backward, call.device.threads, call.scratch, call.parallel);
  return Status{};
}

// By products of pairs: the gradient of z is rounded to bfloat16 first, as stock ops have it.
namespace {

void round_conv_grad(const KernelSet& set, const StageCall& call, const Image<float>& rounded) {
  const Image<float> conv_grad = conv_grad_image<float>(set, call.params, call.conv_grad);
  const int64_t pixels = call.params.pixels(), channels = call.params.out_channels;
  call.parallel->run(ceil_div(pixels, kBlockRows), [&](int64_t block, int) {
    const int64_t first = block * kBlockRows, rows = std::min(kBlockRows, pixels - first);
    rounded.write(first, rows, 0, channels, conv_grad.target(first, 0, {}));
  });
}

}  // namespace

size_t dgrad_pairs_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  Arena arena;
  arena.take<uint16_t>(p.pixels() * p.out_channels);
  return arena.used() + scratch_as<float, PairsConvolution>(
                            set, p, saved_image<float>(set, p, Saved::kBFloat16, nullptr), device.threads);
}
Status run_dgrad_pairs(const KernelSet& set, const StageCall& call) {
  if (call.backward->d_inputs == nullptr) return Status{};
  Arena arena(call.scratch);
  const auto* data = arena.take<uint16_t>(call.params.pixels() * call.params.out_channels);
  const Image<float> rounded = saved_image<float>(set, call.params, Saved::kBFloat16, data);
  round_conv_grad(set, call, rounded);
  run_as<float, PairsConvolution>(set, call.params, rounded, *call.backward, call.device.threads,
                                  call.scratch + arena.used(), call.parallel);
  return Status{};
}

size_t dgrad_amx_scratch(const KernelSet& set, const ConvBnParams& p, const Image<float>& conv_grad, int workers) {
  return scratch_as<float, AmxConvolution>(set, p, conv_grad, workers);
}
void run_dgrad_amx(const KernelSet& set, const ConvBnParams& p, const Image<float>& conv_grad, const BackwardBuffers& b,
                   int workers, char* scratch, ParallelFor* parallel) {
  run_as<float, AmxConvolution>(set, p, conv_grad, b, workers, scratch, parallel);
}

}  // namespace fusedconvbn
