// Mean and variance of each channel of z, and what follows from them.
//
// A range of pixels has a mean of its own, and the squares are summed around it: nothing subtracts two large sums.
// Ranges are merged in double, in their order: with m pixels of mean m' and squares M' in a range, mean = sum m m' / n
// and squares = sum M' + m (m' - mean)^2. An infinite mean stays infinite, and large numbers are not summed before they
// are divided.
#pragma once

#include "channel_sums.cuh"

namespace fusedconvbn::cuda {

// What each range of pixels found, [ranges][K]: `center` is near its mean; the others are sums of z - center.
template <class C>
struct RangeMoments {
  C *center, *sum, *squares;
};

// An infinite center stays one.
template <class C>
FCB_DEVICE void keep(const RangeMoments<C>& moments, int64_t at, C center, C rest, C squares) {
  const bool finite = center - center == C(0);
  moments.center[at] = center, moments.sum[at] = finite ? rest : C(0), moments.squares[at] = squares;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    measure_ranges(const T* z, Layout layout, Ranges ranges, RangeMoments<Compute<T>> moments) {
  using C = Compute<T>;
  __shared__ C shared[kThreads];
  const Share s = share_of(ranges, layout.channels_last(), blockIdx.x, threadIdx.x);
  const T* const channel = z + s.channel * layout.channel;
  const C weight = C(1) / static_cast<C>(s.end - s.begin);
  C sum = 0;
  if (s.inside)
    for (int64_t p = s.begin + s.lane; p < s.end; p += s.lanes) sum += load(channel + layout.of_pixel(p)) * weight;
  const C center = sum_of_lanes(sum, s, shared);
  C rest = 0, squares = 0;
  if (s.inside)
    for (int64_t p = s.begin + s.lane; p < s.end; p += s.lanes) {
      const C difference = load(channel + layout.of_pixel(p)) - center;
      rest += difference;
      squares += difference * difference;
    }
  rest = sum_of_lanes(rest, s, shared);
  squares = sum_of_lanes(squares, s, shared);
  if (!s.inside || s.lane != 0) return;
  keep(moments, s.range * ranges.channels + s.channel, center, rest, squares);
}

// The same by chunks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    measure_chunks(const T* z, Ranges ranges, RangeMoments<Compute<T>> moments) {
  using C = Compute<T>;
  constexpr int kNumbers = kOfChunk<T>;
  __shared__ C shared[kThreads * kNumbers];
  const ChunkShare s = ranges.chunks_of(kNumbers, blockIdx.x, threadIdx.x);
  const T* const channels = z + s.channel;
  const C weight = C(1) / static_cast<C>(s.end - s.begin);
  Numbers<T> center = {}, rest = {}, squares = {}, stored;
  if (s.inside)
    for (int64_t p = s.begin + s.lane; p < s.end; p += s.lanes) {
      load_chunk(channels + p * ranges.channels, stored);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) center[i] += stored[i] * weight;
    }
  sum_over_lanes(center, s, shared);
  if (s.inside)
    for (int64_t p = s.begin + s.lane; p < s.end; p += s.lanes) {
      load_chunk(channels + p * ranges.channels, stored);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        const C difference = stored[i] - center[i];
        rest[i] += difference;
        squares[i] += difference * difference;
      }
    }
  sum_over_lanes(rest, s, shared);
  sum_over_lanes(squares, s, shared);
  if (!s.inside || s.lane != 0) return;
  const int64_t at = s.range * ranges.channels + s.channel;
  for (int i = 0; i < kNumbers; ++i) keep(moments, at + i, center[i], rest[i], squares[i]);
}

// f(n pixels, mean, squares around it) of each. All ranges have as many pixels but the last: nothing is divided in the
// loop, whose next iterations' loads then need not wait.
template <class C, class F>
FCB_DEVICE void for_ranges(const RangeMoments<C>& moments, const Ranges& ranges, const SomeRanges& some,
                           int64_t channel, const F& f) {
  const double full = static_cast<double>(ranges.size), of_full = 1 / full,
               last = static_cast<double>(ranges.pixels - (ranges.count - 1) * ranges.size), of_last = 1 / last;
#pragma unroll 4
  for (int64_t range = some.begin; range < some.end; range += some.step) {
    const int64_t at = range * ranges.channels + channel;
    const bool is_last = range == ranges.count - 1;
    const double rest = moments.sum[at], mean = rest * (is_last ? of_last : of_full);
    f(is_last ? last : full, moments.center[at] + mean, moments.squares[at] - rest * mean);
  }
}

struct Moments {
  double mean, variance;
};

// Of ranges together, which have `count` pixels; combine(sum): with what other threads summed over theirs.
template <class C, class Combine>
FCB_DEVICE Moments merge(const RangeMoments<C>& moments, const Ranges& ranges, const SomeRanges& some, double count,
                         int64_t channel, const Combine& combine) {
  const double share = 1 / count;
  double mean = 0, squares = 0;
  for_ranges(moments, ranges, some, channel, [&](double n, double of_range, double) { mean += n * share * of_range; });
  mean = combine(mean);
  for_ranges(moments, ranges, some, channel, [&](double n, double of_range, double around) {
    squares += around + n * (of_range - mean) * (of_range - mean);
  });
  squares = combine(squares);
  return {mean, squares < 0 ? 0.0 : squares * share};  // rounding may leave less than 0; NaN stays
}

// Of many ranges few: each of `to` is some neighbours of `from`.
template <class C>
__global__ void __launch_bounds__(kThreads)
    merge_ranges(RangeMoments<C> moments, Ranges from, Ranges to, RangeMoments<C> merged) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= to.count * to.channels) return;
  const int64_t range = i / to.channels, channel = i % to.channels, of_one = to.size / from.size;
  const int64_t end = (range + 1) * of_one < from.count ? (range + 1) * of_one : from.count;
  const double count = static_cast<double>(to.end(range) - range * to.size);
  const SomeRanges some{range * of_one, end, 1};
  const Moments found = merge(moments, from, some, count, channel, [](double sum) { return sum; });
  const C center = static_cast<C>(found.mean);
  const double rest = found.mean - center;
  keep(merged, i, center, static_cast<C>(rest * count), static_cast<C>((found.variance + rest * rest) * count));
}

// The arguments and results of length K, as in ForwardBuffers; those that may be null are not written then. `mean`,
// `scale` = gamma / sqrt(variance + epsilon) and `shift` = beta are scratch, what the output is computed from.
template <class C>
struct ForwardVectors {
  const C *gamma, *beta, *moving_mean, *moving_variance;
  C *new_moving_mean, *new_moving_variance, *batch_mean, *inv_std, *mean, *scale, *shift;
};

// The problem's constants that the statistics depend on.
struct Rule {
  bool learns;                           // from the batch
  double epsilon, momentum, correction;  // correction: what an unbiased moving variance multiplies the batch's by

  explicit Rule(const ConvBnParams& p)
      : learns(p.training && p.pixels() > 0), epsilon(p.epsilon), momentum(p.momentum), correction(1) {
    const double n = static_cast<double>(p.pixels());
    if (p.unbiased_moving_variance && n > 1) correction = n / (n - 1);
  }
};

template <class C>
FCB_INLINE void set(C* to, int64_t at, double value) {
  if (to != nullptr) to[at] = static_cast<C>(value);
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    finish_statistics(ForwardVectors<C> v, RangeMoments<C> moments, Ranges ranges, Rule rule) {
  __shared__ double shared[kThreads];
  const Finisher finisher(ranges, blockIdx.x, threadIdx.x);
  const int64_t k = finisher.channel;
  Moments found{};
  if (rule.learns)
    found = merge(moments, ranges, finisher.ranges, static_cast<double>(ranges.pixels), k,
                  [&](double sum) { return finisher.total(sum, shared); });
  if (!finisher.has_channel()) return;
  const double old_mean = v.moving_mean[k], old_variance = v.moving_variance[k], m = rule.momentum;
  const Moments used = rule.learns ? found : Moments{old_mean, old_variance};
  const double inv_std = 1 / sqrt(used.variance + rule.epsilon);
  set(v.new_moving_mean, k, rule.learns ? m * old_mean + (1 - m) * used.mean : old_mean);
  set(v.new_moving_variance, k,
      rule.learns ? m * old_variance + (1 - m) * used.variance * rule.correction : old_variance);
  set(v.batch_mean, k, used.mean);
  set(v.inv_std, k, inv_std);
  v.mean[k] = static_cast<C>(used.mean);
  v.scale[k] = static_cast<C>(v.gamma[k] * inv_std);
  v.shift[k] = v.beta[k];
}

}  // namespace fusedconvbn::cuda
