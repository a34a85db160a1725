// Forward: the order of the kernels, and where in the workspace they leave what the next one reads.
#pragma once

#include "depthwise.cuh"
#include "problem.h"

namespace fusedconvbn::cuda {

// z = conv(inputs, filters), to the epilogue.
template <class T, class Epilogue>
void convolve(const ConvBnParams& p, bool tensor, const void* inputs, const void* filters, const Epilogue& epilogue,
              void* stream) {
  const Windows windows(p);
  if constexpr (sizeof(T) == 2)
    if (tensor)
      return launch_tensor_multiply(TensorForward<T, Epilogue>(windows, in<T>(inputs), in<T>(filters), epilogue),
                                    stream);
  if (is_depthwise(p))
    launch(depthwise_forward<T, Epilogue>, blocks_for(output_elements(p)), stream, windows, output_elements(p),
           in<T>(inputs), in<T>(filters), epilogue);
  else
    launch_multiply(ForwardOperands<T, Epilogue>{windows, in<T>(inputs), in<T>(filters), epilogue}, stream);
}

template <class T>
struct Forward {
  using C = Compute<T>;
  const ConvBnParams& p;
  const ForwardBuffers& b;
  void* stream;
  ForwardVectors<C> vectors{};
  RangeMoments<C> moments{}, of_tiles{};

  size_t carve(void* workspace) {
    Carver carver(workspace);
    const bool by_tiles = rule().learns && suits_tensor_cores(p);
    const Ranges most = Ranges::of_size(p, kFewestMeasured);
    const int64_t k = p.out_channels, merged = by_tiles ? most.merged().count : 0;
    const int64_t ranges = rule().learns ? std::max(Ranges(p).count, merged) * k : 0;
    vectors = {in<C>(b.gamma),
               in<C>(b.beta),
               in<C>(b.moving_mean),
               in<C>(b.moving_variance),
               out<C>(b.new_moving_mean),
               out<C>(b.new_moving_variance),
               out<C>(b.batch_mean),
               out<C>(b.inv_std),
               carver.take<C>(k),
               carver.take<C>(k),
               carver.take<C>(k)};
    moments = take_moments(&carver, ranges);
    of_tiles = take_moments(&carver, by_tiles ? most.count * k : 0);
    return carver.bytes();
  }

  void run() const {
    const Normalize<T> last{vectors.mean,     vectors.scale,
                            vectors.shift,    p.has_residual ? in<T>(b.residual) : nullptr,
                            out<T>(b.output), p.activation};
    const bool can = aligned({b.inputs, b.filters, b.residual, b.output, b.conv_out});
    const bool tensor = can && suits_tensor_cores(p), chunks = can && has_chunks<T>(p);
    if (!p.training) {
      finish(Ranges(p));
      convolve<T>(p, tensor, b.inputs, b.filters, last, stream);
      return;
    }
    const Saved saved = asked_for(p);
    T* const z = out<T>(saved == Saved::kConv ? b.conv_out : b.output);
    const bool measured = rule().learns && tensor;
    if (measured)
      convolve_and_measure(z);
    else
      convolve<T>(p, tensor, b.inputs, b.filters, StoreZ<T>{z}, stream), measure(z, chunks);
    finish(measured ? tiles().merged() : Ranges(p));
    normalize_all(z, last, saved == Saved::kBFloat16 ? out<BFloat16>(b.conv_out) : nullptr, chunks);
  }

 private:
  Rule rule() const { return Rule(p); }
  void measure(const T* z, bool chunks) const {
    const Ranges ranges(p), by_chunks = Ranges::by_chunks(p, kOfChunk<T>);
    if (chunks)
      launch(measure_chunks<T>, by_chunks.blocks(), stream, z, by_chunks, moments);
    else
      launch(measure_ranges<T>, ranges.blocks(), stream, z, output_layout(p), ranges, moments);
  }
  void normalize_all(const T* z, const Normalize<T>& last, BFloat16* rounded, bool chunks) const {
    const int64_t elements = output_elements(p);
    if (chunks) {
      const ChunkPass pass(elements, p.out_channels, kOfChunk<T>);
      launch(normalize_chunks<T>, pass.blocks(), stream, z, pass, last, rounded);
    } else {
      launch(normalize<T>, blocks_for(elements), stream, z, output_layout(p), elements, last, rounded);
    }
  }
  static RangeMoments<C> take_moments(Carver* carver, int64_t count) {
    return {carver->take<C>(count), carver->take<C>(count), carver->take<C>(count)};
  }
  // On tensor cores the convolution measures what it stores, tile by tile.
  Ranges tiles() const { return Ranges::of_size(p, measured_rows(p)); }
  void convolve_and_measure(T* z) const {
    if constexpr (sizeof(T) == 2) {
      convolve<T>(p, true, b.inputs, b.filters, MeasureZ<T>{{z}, of_tiles}, stream);
      const Ranges few = tiles().merged();
      launch(merge_ranges<C>, blocks_for(few.count * few.channels), stream, of_tiles, tiles(), few, moments);
    }
  }
  void finish(const Ranges& ranges) const {
    launch(finish_statistics<C>, Finisher::blocks(p.out_channels), stream, vectors, moments, ranges, rule());
  }
};

}  // namespace fusedconvbn::cuda
