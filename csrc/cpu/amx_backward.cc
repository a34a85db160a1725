// Backward for bfloat16 on AMX, the batch's statistics: the sums first, then the gradient of z in bfloat16 and what is
// made of it.
//
// Where positions read pixel after pixel (1x1 filters, stride 1), dz of a strip of pixels is made in cache, and both
// gradients are at once: it never reaches memory. Elsewhere it is written once, in lines with the zeros behind them
// that the gradient by the filters wants, and read by both.
#include "amx_convolve.h"
#include "amx_dgrad.h"
#include "amx_phases.h"
#include "amx_wgrad.h"
#include "gradient_blocks.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

Windows one_tap_windows(const ConvBnParams& p) { return {p.batch, p.out_height, p.out_width, 1, 1, {{0, 0}}}; }

class AmxBackward {
 public:
  AmxBackward(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& buffers,
              char* scratch)
      : set_(set),
        p_(p),
        b_(buffers),
        workers_(device.threads),
        arena_(scratch),
        blocks_(set, p, buffers, image(buffers.conv_out, output_grid(p)), GradientBlocks<float>::blocks(p), workers_,
                &arena_, true),
        wgrad_(set, p, buffers.inputs),
        rounding_(set, p, buffers, wgrad_.ranges(), workers_, &arena_),
        fused_(wgrad_.reader().in_order()),
        dgrad_(set.f32, storage_of<float>(set, p.dtype), image(nullptr, output_grid(p)), one_tap_windows(p),
               {1, p.out_channels, p.in_channels}) {
    wgrad_scratch_ = wgrad_.carve(&arena_, workers_);
    wgrad_scratch_.rounding = &rounding_;
    if (fused_) {
      dgrad_scratch_ = dgrad_.carve(&arena_, workers_);
      const int64_t rows = wgrad_.reader().max_rows() + kSlack;
      for (int w = 0; w < workers_; ++w) strip_dz_.push_back(arena_.take<uint16_t>(rows * dgrad_.row_elements()));
    } else {
      dz_ = arena_.take<uint16_t>(lines() * wgrad_.reader().pitch() * p.out_channels);
      const size_t bytes = AmxMergedPhases::suits(p)
                               ? AmxMergedPhases(set, p, dz_image(), nullptr).scratch_bytes(workers_)
                               : dgrad_amx_scratch(set, p, dz_image(), workers_);
      phases_scratch_ = arena_.take<char>(static_cast<int64_t>(bytes));
    }
  }

  AmxBackward(const AmxBackward&) = delete;  // wgrad_scratch_ refers to rounding_

  size_t scratch_bytes() const { return arena_.used(); }

  void run(ParallelFor* parallel) const {
    if (b_.d_filters) rounding_.prepare();
    blocks_.reduce(parallel);
    if (!b_.d_inputs && !b_.d_filters && !b_.d_residual) return;
    fused_ ? run_strips(parallel) : run_passes(parallel);
    if (b_.d_filters) wgrad_.finish(b_.d_filters, wgrad_scratch_, parallel);
  }

 private:
  static constexpr int64_t kSlack = 32;  // rows behind the last: whole tiles are read

  Image<float> image(const void* data, const Grid& grid) const {
    return Image<float>(data, storage_of<float>(set_, p_.dtype), grid);
  }
  int64_t lines() const { return p_.batch * p_.out_height; }
  Image<float> dz_image() const {
    Grid grid = output_grid(p_);
    grid.line_stride = wgrad_.reader().pitch() * p_.out_channels;
    grid.image_stride = p_.out_height * grid.line_stride;
    return image(dz_, grid);
  }

  void apply(int64_t first, int64_t rows, uint16_t* dz, int64_t stride, int worker) const {
    blocks_.apply_in_place(set_.f32.amx.apply, blocks_.read(first, rows, 0, p_.out_channels, worker), first, 0, dz,
                           stride);
  }

  // A task is a range of strips.
  void run_strips(ParallelFor* parallel) const {
    const Image<float> d_inputs = image(b_.d_inputs, input_grid(p_));
    const FilterLayout transposed{b_.filters, {0}, 0, 1, p_.out_channels};
    if (b_.d_inputs) dgrad_.pack(transposed, dgrad_scratch_, dgrad_scratch_.filters, parallel);
    TileEpilogue<float> store;
    store.in_place = [&](const Tile<float>& t) { return sums_in_place(d_inputs, t); };
    parallel->run(wgrad_.ranges(), [&](int64_t range, int worker) {
      const int64_t stride = dgrad_.row_elements();
      uint16_t* dz = strip_dz_[worker];
      if (stride > p_.out_channels) std::fill(dz, dz + (wgrad_.reader().max_rows() + kSlack) * stride, uint16_t{0});
      const auto make = [&](int64_t index) {
        const auto strip = wgrad_.reader().strip(index);
        apply(strip.first, strip.rows(), dz, stride, worker);
        if (b_.d_inputs)
          dgrad_.run_rows(dz, strip.first, strip.rows(), wgrad_.reader().memory_of(strip), dgrad_scratch_, worker,
                          store);
        return dz;
      };
      if (b_.d_filters) return wgrad_.accumulate(range, 0, 1, stride, make, b_.d_filters, wgrad_scratch_, worker);
      for (int64_t strip = wgrad_.first_strip(range); strip < wgrad_.first_strip(range + 1); ++strip) make(strip);
    });
  }

  void run_passes(ParallelFor* parallel) const {
    write_dz(parallel);
    if (b_.d_inputs) inputs_gradient(parallel);
    if (!b_.d_filters) return;
    const int64_t parts = wgrad_.parts(parallel->threads()), pitch = wgrad_.reader().pitch();
    parallel->run(wgrad_.ranges() * parts, [&](int64_t task, int worker) {
      const auto dz_of = [&](int64_t strip) {
        const int64_t first = wgrad_.reader().strip(strip).first, row = first / p_.out_width * pitch;
        return dz_ + (row + first % p_.out_width) * p_.out_channels;
      };
      wgrad_.accumulate(task / parts, task % parts, parts, p_.out_channels, dz_of, b_.d_filters, wgrad_scratch_,
                        worker);
    });
  }

  void inputs_gradient(ParallelFor* parallel) const {
    if (!AmxMergedPhases::suits(p_))
      return run_dgrad_amx(set_, p_, dz_image(), b_, workers_, phases_scratch_, parallel);
    AmxMergedPhases(set_, p_, dz_image(), b_.d_inputs).run(b_.filters, workers_, phases_scratch_, parallel);
  }

  // Line by line, where zeros lie between them; else in larger runs.
  void write_dz(ParallelFor* parallel) const {
    constexpr int64_t kRun = 256;
    const int64_t pitch = wgrad_.reader().pitch(), gap = pitch - p_.out_width, run = gap ? p_.out_width : kRun;
    const int64_t runs = ceil_div(p_.pixels(), run), in_task = std::max<int64_t>(1, kRun / run);
    parallel->run(ceil_div(runs, in_task), [&](int64_t task, int worker) {
      for (int64_t r = task * in_task; r < std::min(runs, (task + 1) * in_task); ++r) {
        const int64_t first = r * run, count = std::min(run, p_.pixels() - first);
        uint16_t* dz = dz_ + (gap ? r * pitch : first) * p_.out_channels;
        apply(first, count, dz, p_.out_channels, worker);
        std::fill(dz + count * p_.out_channels, dz + (count + gap) * p_.out_channels, uint16_t{0});
      }
    });
  }

  const KernelSet& set_;
  const ConvBnParams& p_;
  BackwardBuffers b_;
  int workers_;
  Arena arena_;
  GradientBlocks<float> blocks_;
  AmxFilterGradient wgrad_;
  AmxRounding rounding_;
  bool fused_;
  AmxConvolution<float> dgrad_;  // fused
  AmxFilterGradient::Scratch wgrad_scratch_;
  AmxConvolution<float>::Scratch dgrad_scratch_;
  std::vector<uint16_t*> strip_dz_;  // fused: a worker's
  uint16_t* dz_ = nullptr;           // else [lines][pitch][K]
  char* phases_scratch_ = nullptr;
};

}  // namespace

size_t backward_direct_amx_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return AmxBackward(set, p, device, {}, nullptr).scratch_bytes();
}

Status run_backward_direct_amx(const KernelSet& set, const StageCall& call) {
  AmxBackward(set, call.params, call.device, *call.backward, call.scratch).run(call.parallel);
  return Status{};
}

}  // namespace fusedconvbn
