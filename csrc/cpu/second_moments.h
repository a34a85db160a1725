// The statistics of a 1x1 convolution from the second moments of its inputs.
//
// z = W' x at each pixel, so mean(z) = W' mean(x) and the scatter of z, the sum of squares around its mean, is W' S W
// for the scatter S of x. With few inputs and many outputs S costs little, and the convolution that follows knows its
// scale: training forward is one pass that writes no z. Backward starts from S and mean(x) too (backward_moments.cc).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "compute_type.h"
#include "convolve.h"
#include "image.h"
#include "products.h"
#include "windows.h"

namespace fusedconvbn {

inline bool is_pointwise(const ConvBnParams& p) {
  return p.taps() == 1 && p.groups == 1 && p.pad_top == 0 && p.pad_bottom == 0 && p.pad_left == 0 && p.pad_right == 0;
}

// What forward saves for backward: [C][C] scatter, then [C] mean and [C] what the mean lost in rounding, without which
// the gradients would err under a large mean.
template <class C>
struct SavedMoments {
  C* data;
  int64_t channels;

  C* scatter(int64_t row) const { return data + row * channels; }
  C* mean() const { return data + channels * channels; }
  C* mean_rest() const { return mean() + channels; }
};

// Each block of pixels is centered on its own mean, so no shift can be bad; the blocks' means are merged like the
// pixels of a block. Ranges of blocks have sums of their own, added in their order: the bits do not depend on the
// threads.
template <class C>
class SecondMoments {
 public:
  SecondMoments(const KernelSet& set, const ConvBnParams& p, const void* inputs)
      : k_(compute_kernels<C>(set)),
        channels_(p.in_channels),
        pixels_(p.pixels()),
        blocks_(ceil_div(pixels_, kBlockRows)),
        ranges_(std::clamp<int64_t>(blocks_ / kMinBlocks, 1, kMaxRanges)),
        product_(k_.product[0]),  // the smallest tile: half of S is wanted
        ld_(padded_columns<C>(channels_)),
        reader_(Image<C>(inputs, storage_of<C>(set, p.dtype), input_grid(p)), channels_, forward_windows(p), false,
                kBlockRows, kBlockRows) {}

  struct Scratch {
    C* sums;                   // [ranges][rows()][ld]: scatter within the blocks
    C* means;                  // [blocks][ld]: of the blocks; in the end their weighted deviations
    std::vector<C*> centered;  // a worker's [kBlockRows][ld]
    std::vector<typename WindowReader<C>::Scratch> reader;
  };

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<C>(ranges_ * sum_elements()), arena->take<C>(blocks_ * ld_), {}, {}};
    for (int w = 0; w < workers; ++w) {
      s.centered.push_back(arena->take<C>(kBlockRows * ld_));
      s.reader.push_back(reader_.carve(arena, nullptr));
    }
    return s;
  }

  void run(const Scratch& s, ParallelFor* parallel, const SavedMoments<C>& result) const {
    parallel->run(ranges_, [&](int64_t range, int worker) { accumulate(s, range, worker); });
    merge_means(s, result);
    parallel->run(ceil_div(channels_, product_.rows),
                  [&](int64_t tile, int) { finish(s, tile * product_.rows, result); });
  }

 private:
  static constexpr int64_t kMinBlocks = 4, kMaxRanges = 16;

  int64_t rows() const { return ceil_div(channels_, product_.rows) * product_.rows; }
  int64_t sum_elements() const { return rows() * ld_; }
  int64_t block_rows(int64_t block) const { return std::min(kBlockRows, pixels_ - block * kBlockRows); }

  void accumulate(const Scratch& s, int64_t range, int worker) const {
    C* sums = s.sums + range * sum_elements();
    C* centered = s.centered[worker];
    std::fill(sums, sums + sum_elements(), C(0));
    clear_padding(centered, kBlockRows, channels_);
    for (int64_t block = range * blocks_ / ranges_; block < (range + 1) * blocks_ / ranges_; ++block) {
      const int64_t count = block_rows(block);
      reader_.point(block * kBlockRows, count, s.reader[worker]);
      const GatheredRows<C> rows{s.reader[worker].rows, kBlockRows, count, 1, channels_, 0};
      C* mean = s.means + block * ld_;
      k_.row_means(rows, mean);
      k_.center_rows(rows, mean, centered, ld_);
      for (int64_t row = 0; row < channels_; row += product_.rows) add_products(centered, count, row, sums);
    }
  }

  // The tiles of S on and right of the diagonal: it is symmetric.
  void add_products(const C* x, int64_t depth, int64_t row, C* sums) const {
    for (int64_t column = first_column(row); column < channels_; column += product_.columns)
      product_.add(x + row, ld_, x + column, ld_, depth, sums + row * ld_ + column, ld_, nullptr);
  }

  int64_t first_column(int64_t row) const { return row / product_.columns * product_.columns; }

  // The mean, and in place of the blocks' means their deviations from it, times the root of their pixels.
  void merge_means(const Scratch& s, const SavedMoments<C>& result) const {
    for (int64_t c = 0; c < channels_; ++c) {
      double sum = 0;
      for (int64_t block = 0; block < blocks_; ++block)
        sum += static_cast<double>(block_rows(block)) * s.means[block * ld_ + c];
      const double m = sum / static_cast<double>(pixels_);
      result.mean()[c] = static_cast<C>(m);
      result.mean_rest()[c] = static_cast<C>(m - result.mean()[c]);
      for (int64_t block = 0; block < blocks_; ++block)
        s.means[block * ld_ + c] =
            static_cast<C>((s.means[block * ld_ + c] - m) * std::sqrt(static_cast<double>(block_rows(block))));
    }
    for (int64_t block = 0; block < blocks_; ++block)
      std::fill(s.means + block * ld_ + channels_, s.means + (block + 1) * ld_, C(0));
  }

  // Adds up a tile's rows of S and stores them, and their mirror image.
  void finish(const Scratch& s, int64_t row, const SavedMoments<C>& result) const {
    const int64_t end = std::min(row + product_.rows, channels_), column = first_column(row);
    for (int64_t r = row; r < end; ++r)
      add_ranges(ranges_, sum_elements(), channels_ - column, s.sums + r * ld_ + column);
    add_products(s.means, blocks_, row, s.sums);
    for (int64_t r = row; r < end; ++r)
      for (int64_t c = r; c < channels_; ++c) result.scatter(r)[c] = result.scatter(c)[r] = s.sums[r * ld_ + c];
  }

  const ComputeKernels<C>& k_;
  int64_t channels_, pixels_, blocks_, ranges_;
  const ProductKernel<C>& product_;
  int64_t ld_;
  WindowReader<C> reader_;
};

// S W, a panel of columns at a time. In double: W' S W is a difference of larger terms where z varies less than x does.
template <class C>
class MomentsTimesFilters {
 public:
  MomentsTimesFilters(const KernelSet& set, const C* filters, int64_t channels, int64_t columns)
      : k_(set.f64), filters_(filters), channels_(channels), columns_(columns), ld_(channels + 8) {}

  struct Scratch {
    double* scatter;                     // [C][ld]
    const double** rows;                 // [C]
    std::vector<double*> filters, tile;  // a worker's [C][panel], [kBlockRows][panel]
  };

  Scratch carve(Arena* arena, int workers) const {
    Scratch s{arena->take<double>(channels_ * ld_), arena->take<const double*>(channels_), {}, {}};
    for (int w = 0; w < workers; ++w) {
      s.filters.push_back(arena->take<double>(channels_ * k_.panel));
      s.tile.push_back(arena->take<double>(kBlockRows * k_.panel));
    }
    return s;
  }

  // f(column, count, first_row, rows, tile[rows][panel()], filters[C][panel()], worker) for each panel and block of
  // rows.
  template <class F>
  void run(const SavedMoments<C>& moments, const Scratch& s, ParallelFor* parallel, F f) const {
    for (int64_t r = 0; r < channels_; ++r) {
      std::copy(moments.scatter(r), moments.scatter(r) + channels_, s.scatter + r * ld_);
      s.rows[r] = s.scatter + r * ld_;
    }
    parallel->run(ceil_div(columns_, k_.panel), [&](int64_t panel, int worker) {
      const int64_t column = panel * k_.panel, count = std::min(k_.panel, columns_ - column);
      pack(column, count, s.filters[worker]);
      for (int64_t first = 0; first < channels_; first += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, channels_ - first);
        k_.gemm({s.rows + first, kBlockRows, rows, 1, channels_, 0}, {s.filters[worker], k_.panel}, {s.tile[worker]});
        f(column, count, first, rows, s.tile[worker], s.filters[worker], worker);
      }
    });
  }

  int64_t panel() const { return k_.panel; }

 private:
  void pack(int64_t column, int64_t count, double* packed) const {
    std::fill(packed, packed + channels_ * k_.panel, 0.0);
    for (int64_t c = 0; c < channels_; ++c) std::copy_n(filters_ + c * columns_ + column, count, packed + c * k_.panel);
  }

  const ComputeKernels<double>& k_;
  const C* filters_;  // [C][K]
  int64_t channels_, columns_, ld_;
};

// Mean of z and the sum of squares around it, for each output channel.
template <class C>
class StatisticsByMoments {
 public:
  // `vectors` must outlive everything else in scratch.
  StatisticsByMoments(const KernelSet& set, const ConvBnParams& p, const void* filters, Arena* vectors)
      : columns_(p.out_channels), product_(set, static_cast<const C*>(filters), p.in_channels, p.out_channels) {
    for (double** vector : {&mean_, &squares_, &terms_}) *vector = vectors->take<double>(columns_);
  }

  void carve(Arena* arena, int workers) { scratch_ = product_.carve(arena, workers); }

  // False where a channel's variance is too small a part of what its terms have, added as if independent: S is of the
  // compute type, so the variance errs by about 2 eps times their ratio (measured: 2e-5 at 100, in float32).
  static constexpr double kMaxRatio = 32;
  bool run(const SavedMoments<C>& moments, ParallelFor* parallel) const {
    for (double* vector : {mean_, squares_, terms_}) std::fill(vector, vector + columns_, 0.0);
    product_.run(
        moments, scratch_, parallel,
        [&](int64_t column, int64_t count, int64_t first, int64_t rows, const double* s_w, const double* filters, int) {
          const int64_t panel = product_.panel();
          for (int64_t r = 0; r < rows; ++r)
            add(moments, first + r, column, count, s_w + r * panel, filters + (first + r) * panel);
        });
    for (int64_t k = 0; k < columns_; ++k)
      if (!(terms_[k] <= kMaxRatio * squares_[k])) return false;  // NaN too
    return true;
  }

  const double* mean() const { return mean_; }
  const double* squares() const { return squares_; }

 private:
  // What input channel c adds.
  void add(const SavedMoments<C>& moments, int64_t c, int64_t column, int64_t count, const double* s_w,
           const double* w) const {
    const double mean = static_cast<double>(moments.mean()[c]) + moments.mean_rest()[c];
    const double square = moments.scatter(c)[c];
    for (int64_t k = 0; k < count; ++k) {
      mean_[column + k] += mean * w[k];
      squares_[column + k] += s_w[k] * w[k];
      terms_[column + k] += square * w[k] * w[k];
    }
  }

  int64_t columns_;
  double *mean_, *squares_, *terms_;  // [K]
  MomentsTimesFilters<C> product_;
  typename MomentsTimesFilters<C>::Scratch scratch_;
};

}  // namespace fusedconvbn
