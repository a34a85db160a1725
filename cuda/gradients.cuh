// The gradient of batch norm, residual and activation. With du = dy activation'(u), n pixels, x = z - mean and sums
// over the pixels of a channel:
//
//   d_beta = sum du, d_gamma = inv_std sum du x, dz = slope du + curve x + offset
//
// where slope = gamma inv_std, and curve and offset are what z does to its own statistics (0 for frozen ones). The mean
// is rounded, and so may x be: sum x is not quite 0, which under a large mean of the inputs would show in d_filters. So
// that sum is taken too, and what follows from it corrected.
#pragma once

#include "statistics.cuh"

namespace fusedconvbn::cuda {

// What backward knows of z: as forward stored it, as z - mean in bfloat16 [N,OH,OW,K], or in the compute type.
template <class T>
struct ConvOut {
  const T* stored;
  const BFloat16* rounded;
  const Compute<T>* computed;

  FCB_INLINE_MEMBER Compute<T> centered(int64_t at, const Layout& layout, int64_t channel, Compute<T> mean) const {
    if (rounded != nullptr) return load(rounded + layout.pixel_of(at) * layout.channels + channel);
    return (stored != nullptr ? load(stored + at) : load(computed + at)) - mean;
  }
  template <int kNumbers>
  FCB_INLINE_MEMBER void centered(int64_t at, const Compute<T> (&mean)[kNumbers], Compute<T> (&x)[kNumbers]) const {
    if (rounded != nullptr) {
      for (int i = 0; i < kNumbers; ++i) x[i] = load(rounded + at + i);
      return;
    }
    if (stored != nullptr)
      load_chunk(stored + at, x);
    else
      load_chunk(computed + at, x);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) x[i] -= mean[i];
  }
};

// The arguments and results of length K, as in BackwardBuffers; the last row is scratch.
template <class C>
struct BackwardVectors {
  const C *gamma, *beta, *moving_variance, *mean, *saved_inv_std, *mean_gradient, *variance_gradient;
  C *d_gamma, *d_beta, *d_mean, *d_variance;
  C *inv_std, *slope, *center, *shift, *curve, *offset;  // center, shift: mean and beta, where chunks can be read
};

// What du and x of an element follow from.
template <class T>
struct Argument {
  using C = Compute<T>;
  Layout layout;
  Activation activation;
  ConvOut<T> z;
  const T *output_gradient, *output, *residual;  // output, residual: null where the derivative does not need them
  BackwardVectors<C> v;
  bool learns;  // whether the statistics are the batch's

  FCB_INLINE_MEMBER C x(int64_t at, int64_t channel) const { return z.centered(at, layout, channel, v.mean[channel]); }
  FCB_INLINE_MEMBER C du(int64_t at, int64_t channel, C x) const {
    const C dy = load(output_gradient + at);
    if (output != nullptr) return dy * of_activation<DerivativeOfOutput>(activation, C(load(output + at)));
    const C u = v.slope[channel] * x + v.beta[channel];
    return dy * of_activation<Derivative>(activation, residual == nullptr ? u : C(u + load(residual + at)));
  }

  // The same of a chunk, whose channels have these.
  template <int kNumbers>
  struct Vectors {
    C mean[kNumbers], slope[kNumbers], beta[kNumbers];
  };
  template <int kNumbers>
  FCB_INLINE_MEMBER Vectors<kNumbers> of_channels(int64_t channel) const {
    Vectors<kNumbers> of;
    load_chunk(v.center + channel, of.mean), load_chunk(v.slope + channel, of.slope);
    load_chunk(v.shift + channel, of.beta);
    return of;
  }
  template <int kNumbers>
  FCB_INLINE_MEMBER void read(int64_t at, const Vectors<kNumbers>& of, C (&x)[kNumbers], C (&du)[kNumbers]) const {
    C u[kNumbers];
    z.centered(at, of.mean, x);
    load_chunk(output_gradient + at, du);
    if (output != nullptr) {
      load_chunk(output + at, u);
      of_activation<ChainChunk<kNumbers, true>>(activation, Chain<C>{u, du});
      return;
    }
    if (residual != nullptr) load_chunk(residual + at, u);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      const C own = of.slope[i] * x[i] + of.beta[i];
      u[i] = residual == nullptr ? own : own + u[i];
    }
    of_activation<ChainChunk<kNumbers, false>>(activation, Chain<C>{u, du});
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads) start_gradients(BackwardVectors<C> v, int64_t channels, Rule rule) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= channels) return;
  v.inv_std[k] = rule.learns ? v.saved_inv_std[k]
                             : static_cast<C>(1 / sqrt(static_cast<double>(v.moving_variance[k]) + rule.epsilon));
  v.slope[k] = v.gamma[k] * v.inv_std[k];
  v.center[k] = v.mean[k];
  v.shift[k] = v.beta[k];
}

// Sums of a range, [ranges][K].
template <class C>
struct RangeSums {
  C *du, *du_x, *x;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sum_ranges(Argument<T> in, Ranges ranges, RangeSums<Compute<T>> sums) {
  using C = Compute<T>;
  __shared__ C shared[kThreads];
  const Share s = share_of(ranges, in.layout.channels_last(), blockIdx.x, threadIdx.x);
  C sum_du = 0, sum_du_x = 0, sum_x = 0;
  if (s.inside)
    for (int64_t p = s.begin + s.lane; p < s.end; p += s.lanes) {
      const int64_t at = in.layout.of_pixel(p) + s.channel * in.layout.channel;
      const C x = in.x(at, s.channel), du = in.du(at, s.channel, x);
      sum_du += du;
      sum_du_x += du * x;
      sum_x += x;
    }
  sum_du = sum_of_lanes(sum_du, s, shared);
  sum_du_x = sum_of_lanes(sum_du_x, s, shared);
  sum_x = sum_of_lanes(sum_x, s, shared);
  if (!s.inside || s.lane != 0) return;
  const int64_t at = s.range * ranges.channels + s.channel;
  sums.du[at] = sum_du, sums.du_x[at] = sum_du_x, sums.x[at] = sum_x;
}

// The same by chunks.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_chunks(Argument<T> in, Ranges ranges, RangeSums<Compute<T>> sums) {
  using C = Compute<T>;
  constexpr int kNumbers = kOfChunk<T>;
  __shared__ C shared[kThreads * kNumbers];
  const ChunkShare s = ranges.chunks_of(kNumbers, blockIdx.x, threadIdx.x);
  Numbers<T> sum_du = {}, sum_du_x = {}, sum_x = {}, x, du;
  if (s.inside) {
    const auto vectors = in.template of_channels<kNumbers>(s.channel);
    for (int64_t p = s.begin + s.lane; p < s.end; p += s.lanes) {
      in.read(p * ranges.channels + s.channel, vectors, x, du);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) sum_du[i] += du[i], sum_du_x[i] += du[i] * x[i], sum_x[i] += x[i];
    }
  }
  sum_over_lanes(sum_du, s, shared);
  sum_over_lanes(sum_du_x, s, shared);
  sum_over_lanes(sum_x, s, shared);
  if (!s.inside || s.lane != 0) return;
  const int64_t at = s.range * ranges.channels + s.channel;
  for (int i = 0; i < kNumbers; ++i)
    sums.du[at + i] = sum_du[i], sums.du_x[at + i] = sum_du_x[i], sums.x[at + i] = sum_x[i];
}

// Of a channel's sums, for all its threads.
template <class C>
FCB_DEVICE double total(const C* sums, const Ranges& ranges, const Finisher& finisher, double* shared) {
  double sum = 0;
#pragma unroll 4
  for (int64_t range = finisher.ranges.begin; range < finisher.ranges.end; range += finisher.ranges.step)
    sum += sums[range * ranges.channels + finisher.channel];
  return finisher.total(sum, shared);
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    finish_gradients(BackwardVectors<C> v, RangeSums<C> sums, Ranges ranges, Rule rule, bool training) {
  __shared__ double shared[kThreads];
  const Finisher finisher(ranges, blockIdx.x, threadIdx.x);
  const double x = total(sums.x, ranges, finisher, shared), d_beta = total(sums.du, ranges, finisher, shared),
               du_x = total(sums.du_x, ranges, finisher, shared);
  if (!finisher.has_channel()) return;
  const int64_t k = finisher.channel;
  const double n = static_cast<double>(ranges.pixels), inv_std = v.inv_std[k], slope = v.slope[k];
  const double mean_error = rule.learns ? x / n : 0, d_gamma = (du_x - mean_error * d_beta) * inv_std;
  double d_mean = v.mean_gradient[k], d_variance = v.variance_gradient[k], curve = 0, offset = 0;
  if (rule.learns) {
    const double learned = (1 - rule.momentum) / n;
    curve = 2 * learned * rule.correction * d_variance - slope * inv_std * d_gamma / n;
    offset = learned * d_mean - slope * d_beta / n - curve * mean_error;
    d_mean *= rule.momentum;
    d_variance *= rule.momentum;
  } else if (!training) {
    d_mean -= slope * d_beta;
    d_variance -= 0.5 * slope * inv_std * d_gamma;
  }
  set(v.d_beta, k, d_beta);
  set(v.d_gamma, k, d_gamma);
  set(v.d_mean, k, d_mean);
  set(v.d_variance, k, d_variance);
  v.curve[k] = static_cast<C>(curve);
  v.offset[k] = static_cast<C>(offset);
}

// The gradients of z and of the residual; each may be null.
template <class T, class Gradient>
__global__ void __launch_bounds__(kThreads)
    apply_gradients(Argument<T> in, int64_t elements, Gradient* z_gradient, T* d_residual) {
  using C = Compute<T>;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= elements) return;
  const int64_t channel = in.layout.channel_of(at);
  const C x = in.x(at, channel), du = in.du(at, channel, x);
  if (d_residual != nullptr) store(du, d_residual + at);
  if (z_gradient == nullptr) return;
  const C direct = in.v.slope[channel] * du;
  store(in.learns ? direct + in.v.curve[channel] * x + in.v.offset[channel] : direct, z_gradient + at);
}

// The same by chunks.
template <class T, class Gradient>
__global__ void __launch_bounds__(kThreads)
    apply_chunks(Argument<T> in, ChunkPass pass, Gradient* z_gradient, T* d_residual) {
  constexpr int kNumbers = kOfChunk<T>;
  const int thread = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= pass.threads) return;
  const int channel = pass.channel(thread, kNumbers);
  const auto vectors = in.template of_channels<kNumbers>(channel);
  Numbers<T> curve = {}, offset = {}, x, du;
  if (in.learns) load_chunk(in.v.curve + channel, curve), load_chunk(in.v.offset + channel, offset);
#pragma unroll
  for (int j = 0; j < kChunksOfThread; ++j) {
    const int64_t chunk = thread + int64_t{j} * pass.threads, at = chunk * kNumbers;
    if (chunk >= pass.chunks) break;
    in.read(at, vectors, x, du);
    if (d_residual != nullptr) store_chunk(du, d_residual + at);
    if (z_gradient == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      const Compute<T> direct = vectors.slope[i] * du[i];
      du[i] = in.learns ? direct + curve[i] * x[i] + offset[i] : direct;
    }
    store_chunk(du, z_gradient + at);
  }
}

}  // namespace fusedconvbn::cuda
