// Backward: the order of the kernels, and where in the workspace they leave what the next one reads.
#pragma once

#include "forward.cuh"
#include "gradients.cuh"

namespace fusedconvbn::cuda {

template <class T>
struct Backward {
  using C = Compute<T>;
  const ConvBnParams& p;
  const BackwardBuffers& b;
  void* stream;
  BackwardVectors<C> vectors{};
  RangeSums<C> sums{};
  T* z_again = nullptr;      // what forward did not save: as it would have stored it,
  C* z_computed = nullptr;   // with frozen statistics as computed
  C* z_gradient = nullptr;   // shape of the output; on tensor cores of the data's type
  C* filter_sums = nullptr;  // [ranges][kh,kw,C/groups,K]

  size_t carve(void* workspace) {
    Carver carver(workspace);
    const int64_t k = p.out_channels, ranges = Ranges(p).count * k, elements = output_elements(p);
    vectors = {in<C>(b.gamma),
               in<C>(b.beta),
               in<C>(b.moving_variance),
               p.training ? in<C>(b.batch_mean) : in<C>(b.moving_mean),
               in<C>(b.inv_std),
               in<C>(b.moving_mean_gradient),
               in<C>(b.moving_variance_gradient),
               out<C>(b.d_gamma),
               out<C>(b.d_beta),
               out<C>(b.d_moving_mean),
               out<C>(b.d_moving_variance),
               carver.take<C>(k),
               carver.take<C>(k),
               carver.take<C>(k),
               carver.take<C>(k),
               carver.take<C>(k),
               carver.take<C>(k)};
    sums = {carver.take<C>(ranges), carver.take<C>(ranges), carver.take<C>(ranges)};
    if (!has_conv_out(p) && p.training) z_again = carver.take<T>(elements);
    if (!p.training) z_computed = carver.take<C>(elements);
    z_gradient = carver.take<C>(elements);
    filter_sums = carver.take<C>(filter_ranges(p) * filter_elements(p));
    return carver.bytes();
  }

  void run() const {
    const Rule rule(p);
    const Ranges ranges(p), by_chunks = Ranges::by_chunks(p, kOfChunk<T>);
    const bool tensor = suits_tensor_cores(p) && aligned({b.inputs, b.filters, b.d_inputs});
    const bool chunks =
        has_chunks<T>(p) && aligned({b.output_gradient, b.residual, b.output, b.conv_out, b.d_residual});
    if (z_again != nullptr) convolve<T>(p, tensor, b.inputs, b.filters, StoreZ<T>{z_again}, stream);
    if (z_computed != nullptr) convolve<T>(p, tensor, b.inputs, b.filters, StoreZ<C>{z_computed}, stream);
    const Argument<T> argument = make_argument(rule);
    launch(start_gradients<C>, blocks_for(p.out_channels), stream, vectors, p.out_channels, rule);
    if (chunks)
      launch(sum_chunks<T>, by_chunks.blocks(), stream, argument, by_chunks, sums);
    else
      launch(sum_ranges<T>, ranges.blocks(), stream, argument, ranges, sums);
    launch(finish_gradients<C>, Finisher::blocks(p.out_channels), stream, vectors, sums, ranges, rule, p.training);
    if (tensor)
      apply<T>(argument, chunks);
    else
      apply<C>(argument, chunks);
    if (b.d_inputs != nullptr) inputs_gradient(tensor);
    if (b.d_filters != nullptr) filters_gradient(tensor);
  }

 private:
  Argument<T> make_argument(const Rule& rule) const {
    const bool saved = has_conv_out(p), rounded = has_rounded_conv_out(p);
    const T* const stored = saved && !rounded ? in<T>(b.conv_out) : z_again;
    return {output_layout(p),
            p.activation,
            {stored, rounded ? in<BFloat16>(b.conv_out) : nullptr, z_computed},
            in<T>(b.output_gradient),
            needs_output(p) ? in<T>(b.output) : nullptr,
            needs_residual(p) ? in<T>(b.residual) : nullptr,
            vectors,
            rule.learns};
  }
  // Leaves the gradient of z, and of the residual.
  template <class Gradient>
  void apply(const Argument<T>& argument, bool chunks) const {
    const int64_t elements = output_elements(p);
    const bool wanted = b.d_inputs != nullptr || b.d_filters != nullptr;
    if (!wanted && b.d_residual == nullptr) return;
    Gradient* const gradient = wanted ? out<Gradient>(z_gradient) : nullptr;
    if (chunks) {
      const ChunkPass pass(elements, p.out_channels, kOfChunk<T>);
      launch(apply_chunks<T, Gradient>, pass.blocks(), stream, argument, pass, gradient, out<T>(b.d_residual));
    } else {
      launch(apply_gradients<T, Gradient>, blocks_for(elements), stream, argument, elements, gradient,
             out<T>(b.d_residual));
    }
  }
  void inputs_gradient(bool tensor) const {
    const Windows windows(p);
    if constexpr (sizeof(T) == 2)
      if (tensor)
        return launch_tensor_multiply(TensorDgrad<T>(windows, in<T>(z_gradient), in<T>(b.filters), out<T>(b.d_inputs)),
                                      stream);
    const int64_t elements = input_elements(p);
    if (is_depthwise(p))
      launch(depthwise_dgrad<T>, blocks_for(elements), stream, windows, elements, static_cast<const C*>(z_gradient),
             in<T>(b.filters), out<T>(b.d_inputs));
    else
      launch_multiply(DgradOperands<T>{windows, z_gradient, in<T>(b.filters), out<T>(b.d_inputs)}, stream);
  }
  bool multiply_on_tensor_cores(bool tensor, const Windows& windows, int64_t count) const {
    if constexpr (sizeof(T) == 2)
      if (tensor)
        launch_tensor_multiply(TensorWgrad<T>(windows, in<T>(b.inputs), in<T>(z_gradient), filter_sums, count), stream);
    return tensor;
  }
  void filters_gradient(bool tensor) const {
    const Windows windows(p);
    const int64_t count = filter_ranges(p), elements = filter_elements(p);
    const Ranges ranges = depthwise_ranges(p);
    if (is_depthwise(p))
      launch(depthwise_wgrad<T>, ranges.blocks() * p.taps(), stream, windows, ranges, in<T>(b.inputs),
             static_cast<const C*>(z_gradient), filter_sums);
    else if (!multiply_on_tensor_cores(tensor, windows, count))
      launch_multiply(WgradOperands<T>{windows, in<T>(b.inputs), z_gradient, filter_sums, count}, stream);
    launch(add_ranges<T>, blocks_for(elements), stream, static_cast<const C*>(filter_sums), count, elements,
           out<T>(b.d_filters));
  }
};

}  // namespace fusedconvbn::cuda
