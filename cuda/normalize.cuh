// output = activation(scale (z - mean) + beta + residual), as the epilogue of a convolution or as a pass over z.
#pragma once

#include "chunks.cuh"
#include "statistics.cuh"

namespace fusedconvbn::cuda {

// Epilogue of inference.
template <class T>
struct Normalize {
  using C = Compute<T>;
  const C *mean, *scale, *beta;
  static constexpr bool kMeasures = false;
  const T* residual;  // may be null, and may be the output
  T* output;
  Activation activation;

  FCB_INLINE_MEMBER C argument(int64_t at, int64_t channel, C centered) const {
    const C u = scale[channel] * centered + beta[channel];
    return residual == nullptr ? u : u + load(residual + at);
  }
  FCB_INLINE_MEMBER void emit(int64_t at, int64_t channel, C z) const {
    store(of_activation<Activate>(activation, argument(at, channel, z - mean[channel])), output + at);
  }

  // What a chunk's channels have; `channel` is a multiple of kNumbers.
  template <int kNumbers>
  struct Vectors {
    C mean[kNumbers], scale[kNumbers], beta[kNumbers];
  };
  template <int kNumbers>
  FCB_INLINE_MEMBER Vectors<kNumbers> of_channels(int64_t channel) const {
    Vectors<kNumbers> v;
    load_chunk(mean + channel, v.mean), load_chunk(scale + channel, v.scale), load_chunk(beta + channel, v.beta);
    return v;
  }
  template <int kNumbers>
  FCB_INLINE_MEMBER void emit(int64_t at, const Vectors<kNumbers>& v, const C (&z)[kNumbers]) const {
    C u[kNumbers], other[kNumbers] = {};
    if (residual != nullptr) load_chunk(residual + at, other);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) u[i] = v.scale[i] * (z[i] - v.mean[i]) + v.beta[i] + other[i];
    of_activation<ActivateChunk<kNumbers>>(activation, static_cast<C*>(u));
    store_chunk(u, output + at);
  }
};

struct None {};

// Epilogue that stores z.
template <class T>
struct StoreZ {
  static constexpr bool kMeasures = false;
  T* z;
  FCB_INLINE_MEMBER void emit(int64_t at, int64_t, Compute<T> sum) const { store(sum, z + at); }
  template <int kNumbers>
  FCB_INLINE_MEMBER None of_channels(int64_t) const {
    return {};
  }
  template <int kNumbers>
  FCB_INLINE_MEMBER void emit(int64_t at, None, const Compute<T> (&sums)[kNumbers]) const {
    store_chunk(sums, z + at);
  }
};

// And measures it, by tiles of rows.
template <class T>
struct MeasureZ : StoreZ<T> {
  static constexpr bool kMeasures = true;
  RangeMoments<Compute<T>> moments;
};

// z - mean as save="bfloat16" keeps it: the nearest, or, where the activation's derivative jumps between the arguments
// of the two, the neighbour on the other side of x.
template <class T>
FCB_INLINE BFloat16 round_for_backward(const Normalize<T>& n, int64_t at, int64_t channel, Compute<T> x) {
  using C = Compute<T>;
  const float stored = static_cast<float>(x);
  const BFloat16 nearest = to_bfloat16(stored);
  const C rounded = to_float(nearest);
  if (!derivative_jumps(n.activation) || of_activation<Piece>(n.activation, n.argument(at, channel, rounded)) ==
                                             of_activation<Piece>(n.activation, n.argument(at, channel, x)))
    return nearest;
  const uint32_t toward_zero = float_bits(stored) >> 16;
  return {static_cast<uint16_t>(2 * toward_zero + 1 - nearest.bits)};
}

// z: where the output goes, or elsewhere. rounded: [N,OH,OW,K], or null.
template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize(const T* z, Layout layout, int64_t elements, Normalize<T> to, BFloat16* rounded) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= elements) return;
  const int64_t channel = layout.channel_of(at);
  const Compute<T> stored = load(z + at), x = stored - to.mean[channel];
  if (rounded != nullptr)
    rounded[layout.pixel_of(at) * layout.channels + channel] = round_for_backward(to, at, channel, x);
  to.emit(at, channel, stored);
}

// The same by chunks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize_chunks(const T* z, ChunkPass pass, Normalize<T> to, BFloat16* rounded) {
  constexpr int kNumbers = kOfChunk<T>;
  const int thread = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= pass.threads) return;
  const int channel = pass.channel(thread, kNumbers);
  const auto vectors = to.template of_channels<kNumbers>(channel);
  Numbers<T> stored[kChunksOfThread];
#pragma unroll
  for (int j = 0; j < kChunksOfThread; ++j) {
    const int64_t chunk = thread + int64_t{j} * pass.threads;
    if (chunk < pass.chunks) load_chunk(z + chunk * kNumbers, stored[j]);
  }
#pragma unroll
  for (int j = 0; j < kChunksOfThread; ++j) {
    const int64_t chunk = thread + int64_t{j} * pass.threads, at = chunk * kNumbers;
    if (chunk >= pass.chunks) break;
    if (rounded != nullptr)
      for (int i = 0; i < kNumbers; ++i)
        rounded[at + i] = round_for_backward(to, at + i, channel + i, stored[j][i] - vectors.mean[i]);
    to.emit(at, vectors, stored[j]);
  }
}

}  // namespace fusedconvbn::cuda
