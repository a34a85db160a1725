// The second moments of bfloat16 inputs on AMX (second_moments.h): the gradient by the filters of a convolution whose
// dz are its inputs.
//
// Products of bfloat16 are exact, deviations from a mean would not be: so the mean is subtracted from the sums. What
// they lose in rounding then counts for the variance as many times as they are larger than it; so they are added up in
// double after a few strips.
#pragma once

#include <algorithm>
#include <vector>

#include "amx_convolve.h"
#include "amx_wgrad.h"
#include "compute_filters.h"
#include "second_moments.h"
#include "statistics.h"

namespace fusedconvbn {

class AmxSecondMoments {
 public:
  AmxSecondMoments(const KernelSet& set, const ConvBnParams& p, const void* inputs)
      : k_(set.f32.amx), square_(square(p)), products_(set, square_, inputs) {}
  AmxSecondMoments(const AmxSecondMoments&) = delete;  // products_ refers to square_

  struct Scratch {
    AmxFilterGradient::Scratch products;
    double* squares;  // [ranges][sum_elements()]
    double* sums;     // [ranges][C]
    std::vector<uint16_t*> staged;
    std::vector<float*> strip_sums;  // a worker's [C]
  };

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{products_.carve(arena, workers),
              arena->take<double>(products_.ranges() * products_.sum_elements()),
              arena->take<double>(products_.ranges() * channels()),
              {},
              {}};
    for (int w = 0; w < workers; ++w) {
      s.staged.push_back(arena->take<uint16_t>(products_.reader().staged_elements()));
      s.strip_sums.push_back(arena->take<float>(channels()));
    }
    return s;
  }

  void run(const Scratch& s, ParallelFor* parallel, const SavedMoments<float>& result) const {
    parallel->run(products_.ranges(), [&](int64_t range, int worker) { accumulate(range, worker, s); });
    const double pixels = static_cast<double>(square_.pixels());
    for (int64_t c = 0; c < channels(); ++c) {
      double sum = 0;
      for (int64_t range = 0; range < products_.ranges(); ++range) sum += s.sums[range * channels() + c];
      s.sums[c] = sum / pixels;
      result.mean()[c] = static_cast<float>(s.sums[c]);
      result.mean_rest()[c] = static_cast<float>(s.sums[c] - result.mean()[c]);
    }
    const int64_t blocks = ceil_div(channels(), kTile);
    parallel->run(blocks * blocks, [&](int64_t tile, int) {
      center(s.squares + tile * kTile * kTile, tile % blocks * kTile, tile / blocks * kTile, s.sums, pixels, result);
    });
  }

 private:
  static constexpr int64_t kTile = AmxFilterGradient::kTile, kStrips = 8;  // some 4000 pixels

  static ConvBnParams square(ConvBnParams p) {
    p.out_channels = p.in_channels;
    return p;
  }
  int64_t channels() const { return square_.in_channels; }

  void accumulate(int64_t range, int worker, const Scratch& s) const {
    double* sums = s.sums + range * channels();
    std::fill_n(sums, channels(), 0.0);
    const int64_t stride = products_.reader().row_elements();
    const auto rows_of = [&](int64_t index) {
      const auto strip = products_.reader().strip(index);
      const uint16_t* rows = products_.reader().read(strip, s.staged[worker]);
      add_row_sums(k_, rows, stride, strip.rows(), channels(), s.strip_sums[worker], sums);
      return rows;
    };
    const int64_t elements = products_.sum_elements(), end = products_.first_strip(range + 1);
    double* squares = s.squares + range * elements;
    std::fill_n(squares, elements, 0.0);
    for (int64_t strip = products_.first_strip(range); strip < end; strip += kStrips) {
      products_.accumulate_strips(strip, std::min(strip + kStrips, end), range, 0, 1, stride, rows_of, nullptr,
                                  s.products, worker);
      for (int64_t i = 0; i < elements; ++i) squares[i] += s.products.sums[range * elements + i];
    }
  }

  // Adds a tile's ranges.
  void center(const double* tile, int64_t row, int64_t column, const double* mean, double pixels,
              const SavedMoments<float>& result) const {
    for (int64_t r = row; r < std::min(row + kTile, channels()); ++r)
      for (int64_t c = column; c < std::min(column + kTile, channels()); ++c) {
        double sum = 0;
        for (int64_t range = 0; range < products_.ranges(); ++range)
          sum += tile[range * products_.sum_elements() + (r - row) * kTile + c - column];
        result.scatter(r)[c] = static_cast<float>(sum - pixels * mean[r] * mean[c]);
      }
  }

  const AmxKernels& k_;
  ConvBnParams square_;
  AmxFilterGradient products_;
};

// S W in float. S is a sum of three bfloat16 numbers, bit by bit, so their products with the filters are exact.
class AmxScatterTimesFilters {
 public:
  AmxScatterTimesFilters(const KernelSet& set, const ConvBnParams& p, const void* filters)
      : storage_(storage_of<float>(set, p.dtype)),
        channels_(p.in_channels),
        columns_(p.out_channels),
        filters_{filters, {0}, p.out_channels, p.out_channels, 1},
        product_(set.f32, storage_,
                 Image<float>(nullptr, storage_, image_grid(DataFormat::kNHWC, 1, 1, channels_, channels_)),
                 Windows{1, 1, channels_, 1, 1, {{0, 0}}}, {1, channels_, columns_}) {}

  struct Scratch {
    AmxConvolution<float>::Scratch product;
    uint16_t* parts;  // [3][C + kSlack][row_elements()]
    float* rest;      // [C]
    float* result;    // [C][K]
  };

  Scratch carve(Arena* arena, int workers) const {
    return {product_.carve(arena, workers), arena->take<uint16_t>(kParts * part_elements()),
            arena->take<float>(2 * channels_), arena->take<float>(channels_ * columns_)};
  }

  void run(const SavedMoments<float>& moments, const Scratch& s, ParallelFor* parallel) const {
    constexpr int64_t kRows = 96;
    product_.pack(filters_, s.product, s.product.filters, parallel);
    std::fill_n(s.parts, kParts * part_elements(), uint16_t{0});
    for (int64_t c = 0; c < channels_; ++c) split(moments.scatter(c), c, s);
    parallel->run(ceil_div(channels_, kRows), [&](int64_t block, int worker) {
      const int64_t first = block * kRows, rows = std::min(kRows, channels_ - first);
      for (int64_t part = 0; part < kParts; ++part)
        product_.run_rows(s.parts + part * part_elements() + first * product_.row_elements(), first, rows, {},
                          s.product, worker, adding(s.result, part > 0));
    });
  }

 private:
  static constexpr int64_t kParts = 3, kSlack = 32;  // rows behind the last: whole tiles are read

  int64_t part_elements() const { return (channels_ + kSlack) * product_.row_elements(); }

  // Each part is what the ones before it leave, rounded.
  void split(const float* scatter, int64_t row, const Scratch& s) const {
    float *rest = s.rest, *rounded = s.rest + channels_;
    std::copy_n(scatter, channels_, rest);
    for (int64_t part = 0; part < kParts; ++part) {
      uint16_t* to = s.parts + part * part_elements() + row * product_.row_elements();
      storage_.kernels.store(rest, channels_, 1, channels_, to, channels_, 1, false);
      storage_.kernels.load(to, channels_, 1, 1, channels_, rounded, channels_);
      for (int64_t c = 0; c < channels_; ++c) rest[c] -= rounded[c];
    }
  }

  TileEpilogue<float> adding(float* result, bool add) const {
    TileEpilogue<float> epilogue;
    epilogue.emit = [this, result, add](const Tile<float>& t) {
      for (int64_t r = 0; r < t.rows; ++r) {
        float* to = result + (t.first + r) * columns_ + t.channel;
        for (int64_t c = 0; c < t.cols; ++c) to[c] = (add ? to[c] : 0.0f) + t.data[r * t.ld + c];
      }
    };
    return epilogue;
  }

  Storage<float> storage_;
  int64_t channels_, columns_;
  FilterLayout filters_;
  AmxConvolution<float> product_;
};

// As StatisticsByMoments; terms are those of the sums before the mean was subtracted.
class AmxStatisticsByMoments {
 public:
  AmxStatisticsByMoments(const KernelSet& set, const ConvBnParams& p, const void* filters, Arena* vectors)
      : p_(p),
        filters_(storage_of<float>(set, p.dtype), filters, p.in_channels * p.out_channels, vectors),
        product_(set, p, filters) {
    for (double** vector : {&mean_, &squares_, &terms_}) *vector = vectors->take<double>(p.out_channels);
  }

  void carve(Arena* arena, int workers) { scratch_ = product_.carve(arena, workers); }

  bool run(const SavedMoments<float>& moments, ParallelFor* parallel) const {
    filters_.convert();
    product_.run(moments, scratch_, parallel);
    parallel->run(ceil_div(p_.out_channels, kChannelChunk), [&](int64_t chunk, int) {
      const int64_t begin = chunk * kChannelChunk, end = std::min(begin + kChannelChunk, p_.out_channels);
      for (double* vector : {mean_, squares_, terms_}) std::fill(vector + begin, vector + end, 0.0);
      for (int64_t c = 0; c < p_.in_channels; ++c) add(moments, c, begin, end);
    });
    for (int64_t k = 0; k < p_.out_channels; ++k)
      if (!(terms_[k] <= StatisticsByMoments<float>::kMaxRatio * squares_[k])) return false;  // NaN too
    return true;
  }

  const double* mean() const { return mean_; }
  const double* squares() const { return squares_; }

 private:
  // What input channel c adds to columns [begin, end).
  void add(const SavedMoments<float>& moments, int64_t c, int64_t begin, int64_t end) const {
    const double mean = static_cast<double>(moments.mean()[c]) + moments.mean_rest()[c];
    const double square = moments.scatter(c)[c] + static_cast<double>(p_.pixels()) * mean * mean;
    const float *w = filters_.data() + c * p_.out_channels, *s_w = scratch_.result + c * p_.out_channels;
    for (int64_t k = begin; k < end; ++k) {
      const double filter = w[k];
      mean_[k] += mean * filter;
      squares_[k] += s_w[k] * filter;
      terms_[k] += square * filter * filter;
    }
  }

  const ConvBnParams& p_;
  ComputeFilters<float> filters_;
  AmxScatterTimesFilters product_;
  AmxScatterTimesFilters::Scratch scratch_;
  double *mean_, *squares_, *terms_;  // [K]
};

}  // namespace fusedconvbn
