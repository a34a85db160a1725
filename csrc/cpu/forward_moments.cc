// The forward stage where the second moments of the inputs give the statistics.
#include <algorithm>
#include <cstring>

#include "amx_convolve.h"
#include "amx_second_moments.h"
#include "forward.h"
#include "second_moments.h"
#include "stages.h"
#include "thirds_convolve.h"

namespace fusedconvbn {
namespace {

// Training of a 1x1 convolution that saves no z: the second moments of the inputs give its statistics beforehand.
template <class C, template <class> class Conv, class Moments, class Statistics>
class ForwardByMoments {
 public:
  ForwardByMoments(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const ForwardBuffers& b,
                   char* scratch)
      : p_(p),
        kept_(scratch),
        conv_out_(b.conv_out),
        saved_{holds_elements(p) ? static_cast<C*>(b.conv_out) : kept_.take<C>(saved_elements()), p.in_channels},
        statistics_(set, p, b.filters, &kept_),
        rest_(scratch ? scratch + kept_.used() : nullptr),
        forward_(set, p, device, without_saved(b), Image<C>(b.output, storage_of<C>(set, p.dtype), output_grid(p)),
                 rest_),
        moments_(set, p, b.inputs) {
    Arena arena(rest_);  // the convolution's, when these are done
    moments_scratch_ = moments_.carve(&arena, device.threads);
    statistics_.carve(&arena, device.threads);
    scratch_bytes_ = kept_.used() + std::max(arena.used(), forward_.scratch_bytes());
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  // z that varies far less than the inputs make its terms vary is computed, and measured, where the output will lie.
  void train(ParallelFor* parallel) const {
    run(parallel);
    if (saved_.data != conv_out_) std::memcpy(conv_out_, saved_.data, saved_elements() * sizeof(C));
  }

 private:
  static ForwardBuffers without_saved(ForwardBuffers b) { return b.conv_out = nullptr, b; }
  // Else conv_out is of 16-bit numbers, and may lie where a C may not.
  static bool holds_elements(const ConvBnParams& p) { return p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64; }
  int64_t saved_elements() const { return (p_.in_channels + 2) * p_.in_channels; }

  void run(ParallelFor* parallel) const {
    if (p_.pixels() == 0) {
      std::fill_n(saved_.data, saved_elements(), C(0));
      return forward_.train(parallel);
    }
    moments_.run(moments_scratch_, parallel, saved_);
    if (!statistics_.run(saved_, parallel)) return forward_.train(parallel);
    forward_.train_with(statistics_.mean(), statistics_.squares(), parallel);
  }

  const ConvBnParams& p_;
  Arena kept_;
  void* conv_out_;
  SavedMoments<C> saved_;
  Statistics statistics_;
  char* rest_;  // of the scratch, behind what is kept
  Forward<C, Conv> forward_;
  Moments moments_;
  typename Moments::Scratch moments_scratch_;
  size_t scratch_bytes_;
};

template <class C>
using DirectByMoments = ForwardByMoments<C, Convolution, SecondMoments<C>, StatisticsByMoments<C>>;
// Of float alone, whatever the type.
template <class>
using AmxByMoments = ForwardByMoments<float, AmxConvolution, AmxSecondMoments, AmxStatisticsByMoments>;
template <class>
using ThirdsByMoments = ForwardByMoments<float, ThirdsConvolution, SecondMoments<float>, StatisticsByMoments<float>>;

template <template <class> class ByMoments>
size_t scratch_of(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return with_compute_type(p.dtype,
                           [&](auto c) { return ByMoments<decltype(c)>(set, p, device, {}, nullptr).scratch_bytes(); });
}

template <template <class> class ByMoments>
Status run_with(const KernelSet& set, const StageCall& call) {
  with_compute_type(call.params.dtype, [&](auto c) {
    ByMoments<decltype(c)>(set, call.params, call.device, *call.forward, call.scratch).train(call.parallel);
  });
  return Status{};
}

}  // namespace

FCB_DEFINE_STAGE(forward_moments, DirectByMoments)
FCB_DEFINE_STAGE(forward_moments_amx, AmxByMoments)
FCB_DEFINE_STAGE(forward_moments_thirds, ThirdsByMoments)

}  // namespace fusedconvbn
