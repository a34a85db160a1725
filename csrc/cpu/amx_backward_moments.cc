// All of backward for bfloat16 1x1 filters on AMX, where forward saved the second moments of the inputs. What is
// computed is as in backward_moments.cc, but two things:
//
// G is summed up of the inputs as they are, whose products are exact, and the mean is subtracted from the sums.
// d_inputs takes two terms, the first of which is bfloat16 when the second is added: W slope and W curve W' are rounded
// where backward_direct_amx rounds dz.
#include <algorithm>
#include <cstring>
#include <vector>

#include "amx_convolve.h"
#include "amx_second_moments.h"
#include "amx_wgrad.h"
#include "channel_gradients.h"
#include "compute_filters.h"
#include "stages.h"

namespace fusedconvbn {
namespace {

class AmxBackwardByMoments {
 public:
  AmxBackwardByMoments(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device, const BackwardBuffers& b,
                       const void* saved, char* scratch)
      : p_(p),
        b_(b),
        k_(set.f32),
        storage_(storage_of<float>(set, p.dtype)),
        conv_out_(saved),
        d_inputs_(b.d_inputs, storage_, input_grid(p)),
        d_residual_(b.d_residual, storage_, output_grid(p)),
        arena_(scratch),
        saved_{arena_.take<float>(saved_elements()), p.in_channels},
        channels_(p, b, 0, &arena_),
        filters_(storage_, b.filters, p.in_channels * p.out_channels, &arena_),
        scatter_product_(set, p, b.filters),
        correlation_(set, p, b.inputs),
        wide_(set.f32, storage_, Image<float>(nullptr, storage_, output_grid(p)), windows(p),
              {1, p.out_channels, p.in_channels}),
        square_(set.f32, storage_, Image<float>(nullptr, storage_, input_grid(p)), windows(p),
                {1, p.in_channels, p.in_channels}) {
    carve(device.threads);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void run(ParallelFor* parallel) const {
    std::memcpy(saved_.data, conv_out_, saved_elements() * sizeof(float));
    channels_.prepare();
    filters_.convert();
    if (b_.d_inputs) {
      scale_filters(channels_.scale());
      pack_transposed(scaled_, wide_.row_elements(), parallel);
    }
    parallel->run(correlation_.ranges(), [&](int64_t range, int worker) { run_range(range, worker); });
    finish_channels(parallel);
    if (b_.d_filters) filters_gradient(parallel);
    if (b_.d_inputs) complete_inputs_gradient(parallel);
  }

 private:
  static constexpr int64_t kSlack = 32;  // rows behind the last: whole tiles are read

  struct Worker {
    uint16_t *du, *x;   // [strip + kSlack][row_elements()]
    float *sums, *row;  // [K]
  };

  static Windows windows(const ConvBnParams& p) { return {p.batch, p.out_height, p.out_width, 1, 1, {{0, 0}}}; }
  int64_t saved_elements() const { return (p_.in_channels + 2) * p_.in_channels; }
  int64_t strip_rows() const { return correlation_.reader().max_rows() + kSlack; }
  static const char* at(const void* memory, int64_t element) {
    return static_cast<const char*>(memory) + element * static_cast<int64_t>(sizeof(uint16_t));
  }

  void carve(int workers) {
    const int64_t inputs = p_.in_channels, outputs = p_.out_channels;
    correlation_scratch_ = correlation_.carve(&arena_, workers);
    sum_du_ = arena_.take<double>(correlation_.ranges() * outputs);
    correlated_ = arena_.take<float>(inputs * outputs);
    scatter_scratch_ = scatter_product_.carve(&arena_, workers);
    wide_scratch_ = wide_.carve(&arena_, workers), square_scratch_ = square_.carve(&arena_, workers);
    scaled_ = arena_.take<uint16_t>((inputs + kSlack) * wide_.row_elements());
    squared_ = arena_.take<uint16_t>(inputs * inputs);
    for (float** vector : {&offset_, &ones_, &zeros_}) *vector = arena_.take<float>(inputs);
    for (int w = 0; w < workers; ++w)
      workers_.push_back({arena_.take<uint16_t>(strip_rows() * wide_.row_elements()),
                          arena_.take<uint16_t>(strip_rows() * square_.row_elements()), arena_.take<float>(outputs),
                          arena_.take<float>(outputs)});
  }

  // scaled_ = the filters times a factor for each output, rounded.
  void scale_filters(const float* factor) const {
    const int64_t ld = wide_.row_elements();
    std::fill(scaled_, scaled_ + (p_.in_channels + kSlack) * ld, uint16_t{0});
    for (int64_t c = 0; c < p_.in_channels; ++c) {
      float* row = workers_[0].row;
      for (int64_t k = 0; k < p_.out_channels; ++k) row[k] = filters_.data()[c * p_.out_channels + k] * factor[k];
      storage_.kernels.store(row, p_.out_channels, 1, p_.out_channels, scaled_ + c * ld, ld, 1, false);
    }
  }

  // Filters [C][ld] for products with rows of outputs.
  void pack_transposed(const void* filters, int64_t ld, ParallelFor* parallel) const {
    wide_.pack(FilterLayout{filters, {0}, 0, 1, ld}, wide_scratch_, wide_scratch_.filters, parallel);
  }

  // Of each strip du, d_residual, what it adds to G and to the sums of du, and the first term of d_inputs.
  void run_range(int64_t range, int worker) const {
    const int64_t stride = wide_.row_elements();
    const Worker& w = workers_[worker];
    if (stride > p_.out_channels) std::fill(w.du, w.du + strip_rows() * stride, uint16_t{0});
    std::fill_n(sum_du_ + range * p_.out_channels, p_.out_channels, 0.0);
    TileEpilogue<float> store;
    store.in_place = [&](const Tile<float>& t) { return sums_in_place(d_inputs_, t); };
    const auto make = [&](int64_t index) {
      const auto strip = correlation_.reader().strip(index);
      mask(strip.first, strip.rows(), w, sum_du_ + range * p_.out_channels);
      if (b_.d_inputs)
        wide_.run_rows(w.du, strip.first, strip.rows(), correlation_.reader().memory_of(strip), wide_scratch_, worker,
                       store);
      return w.du;
    };
    correlation_.accumulate(range, 0, 1, stride, make, nullptr, correlation_scratch_, worker);
  }

  void mask(int64_t first, int64_t rows, const Worker& w, double* sum_du) const {
    const int64_t element = first * p_.out_channels;
    std::fill_n(w.sums, p_.out_channels, 0.0f);
    GradientBlock<float> g{};
    g.dy = at(b_.output_gradient, element), g.ld_dy = p_.out_channels;
    g.extra = at(b_.output, element), g.ld_extra = p_.out_channels;
    g.rows = rows, g.cols = p_.out_channels;
    g.d_conv = w.du, g.ld_d_conv = wide_.row_elements();
    if (d_residual_.present()) {
      g.d_residual = d_residual_.address(first, 0), g.ld_d_residual = d_residual_.ld();
      g.stream = d_residual_.streams(0, g.cols);
    }
    g.sum_du = w.sums;
    k_.amx.mask[static_cast<int>(p_.activation)](g);
    for (int64_t k = 0; k < p_.out_channels; ++k) sum_du[k] += w.sums[k];
  }

  // G of all ranges, the gradients of the vectors, the constants of dz.
  void finish_channels(ParallelFor* parallel) const {
    for (int64_t range = 1; range < correlation_.ranges(); ++range)
      for (int64_t k = 0; k < p_.out_channels; ++k) sum_du_[k] += sum_du_[range * p_.out_channels + k];
    constexpr int64_t kTile = AmxFilterGradient::kTile;
    correlation_.for_tiles(
        correlation_scratch_, parallel,
        [&](const float* tile, int64_t, int64_t block, int64_t panel) { center(tile, block * kTile, panel * kTile); });
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [&](int64_t chunk, int) { finish(chunk * kChannelChunk); });
  }

  void center(const float* tile, int64_t row, int64_t column) const {
    constexpr int64_t kTile = AmxFilterGradient::kTile;
    for (int64_t c = row; c < std::min(row + kTile, p_.in_channels); ++c) {
      const double mean = static_cast<double>(saved_.mean()[c]) + saved_.mean_rest()[c];
      for (int64_t k = column; k < std::min(column + kTile, p_.out_channels); ++k)
        correlated_[c * p_.out_channels + k] =
            static_cast<float>(tile[(c - row) * kTile + k - column] - mean * sum_du_[k]);
    }
  }

  void finish(int64_t begin) const {
    const int64_t end = std::min(begin + kChannelChunk, p_.out_channels);
    double w_g[kChannelChunk] = {};
    for (int64_t c = 0; c < p_.in_channels; ++c)
      for (int64_t k = begin, i = c * p_.out_channels + begin; k < end; ++k, ++i)
        w_g[k - begin] += static_cast<double>(filters_.data()[i]) * correlated_[i];
    for (int64_t k = begin; k < end; ++k)
      channels_.finish(k, sum_du_[k], w_g[k - begin] * static_cast<const float*>(b_.inv_std)[k], 0);
  }

  // G slope + S W curve + m sum dz, as in backward_moments.cc.
  void filters_gradient(ParallelFor* parallel) const {
    scatter_product_.run(saved_, scatter_scratch_, parallel);
    parallel->run(p_.in_channels, [&](int64_t c, int worker) {
      float* row = workers_[worker].row;
      for (int64_t k = 0, i = c * p_.out_channels; k < p_.out_channels; ++k, ++i) {
        const double sum_dz = (1 - p_.momentum) * static_cast<const float*>(b_.moving_mean_gradient)[k];
        row[k] = static_cast<float>(static_cast<double>(channels_.slope()[k]) * correlated_[i] +
                                    static_cast<double>(channels_.curve()[k]) * scatter_scratch_.result[i] +
                                    saved_.mean()[c] * sum_dz);
      }
      storage_.kernels.store(row, p_.out_channels, 1, p_.out_channels,
                             const_cast<char*>(at(b_.d_filters, c * p_.out_channels)), p_.out_channels, 1, false);
    });
  }

  // W curve W' x + W offset, added to what run_range() left.
  void complete_inputs_gradient(ParallelFor* parallel) const {
    pack_square(parallel);
    std::fill_n(ones_, p_.in_channels, 1.0f);
    std::fill_n(zeros_, p_.in_channels, 0.0f);
    for (int64_t c = 0; c < p_.in_channels; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < p_.out_channels; ++k)
        sum += static_cast<double>(filters_.data()[c * p_.out_channels + k]) * channels_.offset()[k];
      offset_[c] = static_cast<float>(sum);
    }
    const auto& reader = correlation_.reader();
    parallel->run(reader.strips(), [&](int64_t index, int worker) {
      const auto strip = reader.strip(index);
      add_square(strip.first, strip.rows(), worker);
    });
  }

  // W curve W' as the filters of square_.
  void pack_square(ParallelFor* parallel) const {
    scale_filters(channels_.curve());
    pack_transposed(b_.filters, p_.out_channels, parallel);
    TileEpilogue<float> keep;
    keep.emit = [&](const Tile<float>& t) {
      storage_.kernels.store(t.data, t.ld, t.rows, t.cols, squared_ + t.first * p_.in_channels + t.channel,
                             p_.in_channels, 1, false);
    };
    wide_.run_rows(scaled_, 0, p_.in_channels, {}, wide_scratch_, 0, keep);
    square_.pack(FilterLayout{squared_, {0}, 0, p_.in_channels, 1}, square_scratch_, square_scratch_.filters, parallel);
  }

  void add_square(int64_t first, int64_t rows, int worker) const {
    const Worker& w = workers_[worker];
    const int64_t ld = square_.row_elements(), element = first * p_.in_channels;
    if (ld > p_.in_channels) std::fill(w.x, w.x + strip_rows() * ld, uint16_t{0});
    AffineBlock<float> centered{};
    centered.z = at(b_.inputs, element), centered.ld_z = p_.in_channels;
    centered.y = w.x, centered.ld_y = ld, centered.rows = rows, centered.cols = p_.in_channels;
    centered.mean = saved_.mean(), centered.scale = ones_, centered.beta = zeros_;
    constexpr int kNone = static_cast<int>(Activation::kNone);
    storage_.kernels.in_place.affine[kNone](centered);
    TileEpilogue<float> add;
    add.in_place = [&](const Tile<float>& t) {
      AffineBlock<float> sum{};
      sum.y = d_inputs_.address(t.first, t.channel), sum.residual = sum.y;
      sum.ld_y = sum.ld_residual = d_inputs_.ld(), sum.cols = t.cols;
      sum.mean = zeros_, sum.scale = ones_, sum.beta = offset_ + t.channel;
      return GemmOutput<float>{t.data, false, storage_.kernels.in_place.affine_of_tile[kNone], sum};
    };
    square_.run_rows(w.x, first, rows, {}, square_scratch_, worker, add);
  }

  const ConvBnParams& p_;
  BackwardBuffers b_;
  const ComputeKernels<float>& k_;
  Storage<float> storage_;
  const void* conv_out_;  // where moments lie as 16-bit numbers, maybe not where a float may
  Image<float> d_inputs_, d_residual_;
  Arena arena_;
  SavedMoments<float> saved_;
  ChannelGradients<float> channels_;
  ComputeFilters<float> filters_;
  AmxScatterTimesFilters scatter_product_;
  AmxFilterGradient correlation_;        // of the inputs and du: G
  AmxConvolution<float> wide_, square_;  // from K to C channels, and from C to C
  AmxFilterGradient::Scratch correlation_scratch_;
  AmxScatterTimesFilters::Scratch scatter_scratch_;
  AmxConvolution<float>::Scratch wide_scratch_, square_scratch_;
  double* sum_du_;                  // [ranges][K]
  float* correlated_;               // [C][K]: G
  uint16_t *scaled_, *squared_;     // [C + kSlack][row_elements()], [C][C]
  float *offset_, *ones_, *zeros_;  // [C]
  std::vector<Worker> workers_;
};

}  // namespace

size_t backward_moments_amx_scratch(const KernelSet& set, const ConvBnParams& p, const DeviceInfo& device) {
  return AmxBackwardByMoments(set, p, device, {}, nullptr, nullptr).scratch_bytes();
}

Status run_backward_moments_amx(const KernelSet& set, const StageCall& call) {
  AmxBackwardByMoments(set, call.params, call.device, *call.backward, call.conv_out, call.scratch).run(call.parallel);
  return Status{};
}

}  // namespace fusedconvbn
