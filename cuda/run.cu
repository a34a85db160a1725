// Forward and backward: the order of the kernels, and where in the workspace they leave what the next one reads.
#include "element.h"

#include <algorithm>
#include <initializer_list>

#include "api.h"
#include "convolve.cuh"
#include "depthwise.cuh"
#include "gradients.cuh"
#include "normalize.cuh"
#include "tensor_convolve.cuh"

namespace fusedconvbn::cuda {
namespace {

// Hands out memory; of a null base only its size counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class V>
  V* take(int64_t elements) {
    char* const at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += static_cast<size_t>(ceil_div(elements * static_cast<int64_t>(sizeof(V)), 256) * 256);
    return reinterpret_cast<V*>(at);
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

template <class V>
const V* in(const void* buffer) {
  return static_cast<const V*>(buffer);
}
template <class V>
V* out(void* buffer) {
  return static_cast<V*>(buffer);
}

int64_t output_elements(const ConvBnParams& p) { return p.pixels() * p.out_channels; }
int64_t input_elements(const ConvBnParams& p) { return p.batch * p.in_height * p.in_width * p.in_channels; }
int64_t filter_elements(const ConvBnParams& p) { return p.taps() * p.group_in() * p.out_channels; }

bool is_depthwise(const ConvBnParams& p) { return p.group_in() == 1 && p.groups > 1; }

// Of the filters' gradient of groups of one channel.
Ranges depthwise_ranges(const ConvBnParams& p) { return Ranges(p).in_at_most(most_filter_ranges(p)); }

// How many sums of each element of the filters' gradient there are.
int64_t filter_ranges(const ConvBnParams& p) { return is_depthwise(p) ? depthwise_ranges(p).count : wgrad_ranges(p); }

// The most blocks of threads that a kernel of either direction takes.
int64_t most_blocks(const ConvBnParams& p) {
  const auto tiles = [&p](int64_t rows, int64_t cols) {
    return p.groups * ceil_div(rows, kTile) * ceil_div(cols, kTile);
  };
  const int64_t pixels = p.batch * p.in_height * p.in_width;
  const int64_t elements = std::max({output_elements(p), input_elements(p), filter_elements(p)});
  return std::max({blocks_for(elements), Ranges(p).blocks() * p.taps(), tiles(p.pixels(), p.group_out()),
                   tiles(pixels, p.group_in()), tiles(p.taps() * p.group_in(), p.group_out()) * wgrad_ranges(p)});
}

// Null, or what of the problem the kernels' numbers cannot hold.
const char* too_large(const ConvBnParams& p) {
  constexpr int64_t kMost = INT32_MAX;
  for (int64_t size : {p.stride_height, p.stride_width, p.pad_top, p.pad_left, p.filter_height * p.dilation_height,
                       p.filter_width * p.dilation_width, p.taps()})
    if (size > kMost) return "strides, paddings or filters of more than 2^31 - 1 have no GPU kernel";
  if (p.batch > 0 && std::max(p.in_height * p.in_width, p.out_height * p.out_width) > kMost)
    return "an image of more than 2^31 - 1 pixels has no GPU kernel";
  return most_blocks(p) > kMost ? "tensors this large have no GPU kernel" : nullptr;
}

// Whether chunks can be read from them.
bool aligned(std::initializer_list<const void*> buffers) {
  return std::all_of(buffers.begin(), buffers.end(),
                     [](const void* buffer) { return reinterpret_cast<uintptr_t>(buffer) % 16 == 0; });
}

// Whether passes over the output can go by chunks, of buffers that are aligned.
template <class T>
bool has_chunks(const ConvBnParams& p) {
  return p.data_format == DataFormat::kNHWC && p.out_channels % kOfChunk<T> == 0 && p.out_channels > 0 &&
         output_elements(p) / kOfChunk<T> < INT32_MAX;
}

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
    const int64_t k = p.out_channels, merged = by_tiles ? tiles().merged().count : 0;
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
    of_tiles = take_moments(&carver, by_tiles ? tiles().count * k : 0);
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
  Ranges tiles() const { return Ranges::of_size(p, kTileRows); }
  void convolve_and_measure(T* z) const {
    if constexpr (sizeof(T) == 2) {
      convolve<T>(p, true, b.inputs, b.filters, MeasureZ<T>{{z}, of_tiles}, stream);
      const Ranges few = tiles().merged();
      launch(merge_ranges<C>, blocks_for(few.count * few.channels), stream, of_tiles, tiles(), few, moments);
    }
  }
  void finish(const Ranges& ranges) const {
    launch(finish_statistics<C>, blocks_for(p.out_channels), stream, vectors, moments, ranges, rule());
  }
};

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
    launch(finish_gradients<C>, blocks_for(p.out_channels), stream, vectors, sums, ranges, rule, p.training);
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

// call(Direction<T>) for the data type of the problem.
template <template <class> class Direction, class Buffers, class Call>
void with_type(const ConvBnParams& p, const Buffers& b, void* stream, const Call& call) {
  switch (p.dtype) {
    case DType::kFloat32: return call(Direction<float>{p, b, stream});
    case DType::kFloat64: return call(Direction<double>{p, b, stream});
    case DType::kFloat16: return call(Direction<Half>{p, b, stream});
    case DType::kBFloat16: return call(Direction<BFloat16>{p, b, stream});
  }
}

template <template <class> class Direction, class Buffers>
size_t workspace_of(const ConvBnParams& p) {
  size_t bytes = 0;
  with_type<Direction>(p, Buffers{}, nullptr, [&](auto direction) { bytes = direction.carve(nullptr); });
  return bytes;
}

template <template <class> class Direction, class Buffers>
const char* run(const ConvBnParams& p, const Buffers& b, void* workspace, void* stream) {
  if (const char* error = too_large(p)) return error;
  with_type<Direction>(p, b, stream, [&](auto direction) {
    direction.carve(workspace);
    direction.run();
  });
  return launch_error();
}

}  // namespace
}  // namespace fusedconvbn::cuda

using namespace fusedconvbn;  // NOLINT: of the entry points below alone

size_t fcb_cuda_layout() { return contract_layout(); }
const char* fcb_cuda_kernels(const ConvBnParams* params) {
  if (cuda::suits_tensor_cores(*params)) return "tensor cores";
  return cuda::is_depthwise(*params) ? "depthwise" : "plain";
}
size_t fcb_cuda_forward_workspace(const ConvBnParams* params) {
  return cuda::workspace_of<cuda::Forward, ForwardBuffers>(*params);
}
size_t fcb_cuda_backward_workspace(const ConvBnParams* params) {
  return cuda::workspace_of<cuda::Backward, BackwardBuffers>(*params);
}
const char* fcb_cuda_forward(const ConvBnParams* params, const ForwardBuffers* buffers, void* workspace, void* stream) {
  return cuda::run<cuda::Forward>(*params, *buffers, workspace, stream);
}
const char* fcb_cuda_backward(const ConvBnParams* params, const BackwardBuffers* buffers, void* workspace,
                              void* stream) {
  return cuda::run<cuda::Backward>(*params, *buffers, workspace, stream);
}
