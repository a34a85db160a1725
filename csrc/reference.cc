#include <cmath>

// The activations find these by ordinary lookup where they are defined, so they come before activation.h.
namespace fusedconvbn {
namespace {
inline double exp_of(double x) { return std::exp(x); }
inline double erf_of(double x) { return std::erf(x); }
}  // namespace
}  // namespace fusedconvbn

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "half.h"
#include "reference.h"

namespace fusedconvbn {
namespace {

double load(float value) { return value; }
double load(double value) { return value; }
double load(Half value) { return to_float(value); }
double load(BFloat16 value) { return to_float(value); }

void store(double value, float* to) { *to = static_cast<float>(value); }
void store(double value, double* to) { *to = value; }
void store(double value, Half* to) { *to = to_half(static_cast<float>(value)); }
void store(double value, BFloat16* to) { *to = to_bfloat16(static_cast<float>(value)); }

template <class T>
double load(const void* from, int64_t index) {
  return load(static_cast<const T*>(from)[index]);
}

template <class T>
void store(double value, void* to, int64_t index) {
  if (to != nullptr) store(value, static_cast<T*>(to) + index);
}

using Function = double (*)(double);

template <size_t... A>
Function activation_function(Activation a, std::index_sequence<A...>) {
  static constexpr Function table[] = {activate<static_cast<Activation>(A), double, double>...};
  return table[static_cast<int>(a)];
}

template <size_t... A>
Function derivative_function(Activation a, std::index_sequence<A...>) {
  static constexpr Function table[] = {derivative<static_cast<Activation>(A), double, double>...};
  return table[static_cast<int>(a)];
}

template <size_t... A>
Function derivative_of_output_function(Activation a, std::index_sequence<A...>) {
  static constexpr Function table[] = {derivative_of_output<static_cast<Activation>(A), double, double>...};
  return table[static_cast<int>(a)];
}

using Pieces = int (*)(double);

template <size_t... A>
Pieces piece_function(Activation a, std::index_sequence<A...>) {
  static constexpr Pieces table[] = {[](double u) { return int(piece<static_cast<Activation>(A), double>(u)); }...};
  return table[static_cast<int>(a)];
}

using AllActivations = std::make_index_sequence<kActivationCount>;

// Where element (n, h, w, c) of an image lies.
class Layout {
 public:
  Layout(DataFormat format, int64_t height, int64_t width, int64_t channels)
      : nhwc_(format == DataFormat::kNHWC), height_(height), width_(width), channels_(channels) {}
  int64_t operator()(int64_t n, int64_t h, int64_t w, int64_t c) const {
    return nhwc_ ? ((n * height_ + h) * width_ + w) * channels_ + c : ((n * channels_ + c) * height_ + h) * width_ + w;
  }

 private:
  bool nhwc_;
  int64_t height_, width_, channels_;
};

struct Problem {
  explicit Problem(const ConvBnParams& params)
      : p(params),
        input(p.data_format, p.in_height, p.in_width, p.in_channels),
        output(p.data_format, p.out_height, p.out_width, p.out_channels) {}
  int64_t filter(int64_t tap, int64_t c, int64_t k) const { return (tap * p.group_in() + c) * p.out_channels + k; }

  const ConvBnParams& p;
  Layout input, output;
};

// Where z of an element is saved in bfloat16: in NHWC whatever the data format.
int64_t rounded_at(const ConvBnParams& p, int64_t n, int64_t h, int64_t w, int64_t k) {
  return Layout(DataFormat::kNHWC, p.out_height, p.out_width, p.out_channels)(n, h, w, k);
}

// f(n, h, w) for every pixel of the output.
template <class F>
void for_each_pixel(const ConvBnParams& p, F f) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t h = 0; h < p.out_height; ++h)
      for (int64_t w = 0; w < p.out_width; ++w) f(n, h, w);
}

// f(tap, h, w) for every tap of the filter at output pixel (out_h, out_w) that reads input pixel (h, w), not padding.
template <class F>
void for_each_tap(const ConvBnParams& p, int64_t out_h, int64_t out_w, F f) {
  for (int64_t kh = 0; kh < p.filter_height; ++kh) {
    const int64_t h = out_h * p.stride_height + kh * p.dilation_height - p.pad_top;
    if (h < 0 || h >= p.in_height) continue;
    for (int64_t kw = 0; kw < p.filter_width; ++kw) {
      const int64_t w = out_w * p.stride_width + kw * p.dilation_width - p.pad_left;
      if (w >= 0 && w < p.in_width) f(kh * p.filter_width + kw, h, w);
    }
  }
}

// One element of the convolution.
template <class T>
double convolve(const Problem& problem, const void* inputs, const void* filters, int64_t n, int64_t out_h,
                int64_t out_w, int64_t k) {
  const ConvBnParams& p = problem.p;
  const int64_t first = k / p.group_out() * p.group_in();
  double sum = 0;
  for_each_tap(p, out_h, out_w, [&](int64_t tap, int64_t h, int64_t w) {
    for (int64_t c = 0; c < p.group_in(); ++c)
      sum += load<T>(inputs, problem.input(n, h, w, first + c)) * load<T>(filters, problem.filter(tap, c, k));
  });
  return sum;
}

bool uses_batch_statistics(const ConvBnParams& p) { return p.training && p.pixels() > 0; }

// What an unbiased moving variance multiplies the batch variance by.
double variance_correction(const ConvBnParams& p) {
  const double n = static_cast<double>(p.pixels());
  return p.unbiased_moving_variance && n > 1 ? n / (n - 1) : 1;
}

struct Moments {
  double mean = 0, variance = 0;
};

// Of channel k of z as stored. A running sum of equal signs errs by up to its length, too much for doubles in double.
template <class T>
Moments batch_moments(const Problem& problem, const void* z, int64_t k) {
  const ConvBnParams& p = problem.p;
  const double count = static_cast<double>(p.pixels());
  long double mean = 0, variance = 0;
  for_each_pixel(p, [&](int64_t n, int64_t h, int64_t w) { mean += load<T>(z, problem.output(n, h, w, k)); });
  mean /= count;
  for_each_pixel(p, [&](int64_t n, int64_t h, int64_t w) {
    const long double difference = load<T>(z, problem.output(n, h, w, k)) - mean;
    variance += difference * difference;
  });
  return {static_cast<double>(mean), static_cast<double>(variance / count)};
}

// x as a bfloat16: the nearest or, where activation' jumps between u of the two, that on the other side of x.
template <class F>
BFloat16 round_for_backward(Activation a, double x, const F& u_of) {
  const Pieces piece_of = piece_function(a, AllActivations{});
  const float stored = static_cast<float>(x);
  const BFloat16 nearest = to_bfloat16(stored);
  if (!derivative_jumps(a) || piece_of(u_of(to_float(nearest))) == piece_of(u_of(x))) return nearest;
  const uint32_t toward_zero = float_bits(stored) >> 16;
  return {static_cast<uint16_t>(2 * toward_zero + 1 - nearest.bits)};
}

template <class T, class Stat>
void forward_channel(const Problem& problem, const ForwardBuffers& b, int64_t k) {
  const ConvBnParams& p = problem.p;
  const auto z_at = [&](int64_t n, int64_t h, int64_t w) {
    return convolve<T>(problem, b.inputs, b.filters, n, h, w, k);
  };
  const double old_mean = load<Stat>(b.moving_mean, k), old_variance = load<Stat>(b.moving_variance, k);
  const Saved saved = asked_for(p);
  void* conv_out = saved == Saved::kConv ? b.conv_out : b.output;  // where z is not saved, y lies there in the end
  Moments used{old_mean, old_variance}, updated = used;
  if (uses_batch_statistics(p)) {
    for_each_pixel(
        p, [&](int64_t n, int64_t h, int64_t w) { store<T>(z_at(n, h, w), conv_out, problem.output(n, h, w, k)); });
    used = batch_moments<T>(problem, conv_out, k);
    updated.mean = p.momentum * old_mean + (1 - p.momentum) * used.mean;
    updated.variance = p.momentum * old_variance + (1 - p.momentum) * used.variance * variance_correction(p);
  }
  const double inv_std = 1 / std::sqrt(used.variance + p.epsilon);
  store<Stat>(updated.mean, b.new_moving_mean, k);
  store<Stat>(updated.variance, b.new_moving_variance, k);
  store<Stat>(used.mean, b.batch_mean, k);
  store<Stat>(inv_std, b.inv_std, k);

  const double gamma = load<Stat>(b.gamma, k), beta = load<Stat>(b.beta, k);
  const Function activation = activation_function(p.activation, AllActivations{});
  for_each_pixel(p, [&](int64_t n, int64_t h, int64_t w) {
    const int64_t at = problem.output(n, h, w, k);
    const double centered = (p.training ? load<T>(conv_out, at) : z_at(n, h, w)) - used.mean;
    const double residual = p.has_residual ? load<T>(b.residual, at) : 0;
    const auto u_of = [&](double x) { return gamma * x * inv_std + beta + residual; };
    if (saved == Saved::kBFloat16)
      static_cast<BFloat16*>(b.conv_out)[rounded_at(p, n, h, w, k)] = round_for_backward(p.activation, centered, u_of);
    store<T>(activation(u_of(centered)), b.output, at);
  });
}

template <class T, class Stat>
Status forward(const ConvBnParams& p, const ForwardBuffers& b) {
  const Problem problem(p);
  for (int64_t k = 0; k < p.out_channels; ++k) forward_channel<T, Stat>(problem, b, k);
  return Status{};
}

// Zeros in double precision; empty() after a failed allocation.
class Scratch {
 public:
  explicit Scratch(int64_t size) : size_(size), data_(new(std::nothrow) double[std::max<int64_t>(size, 1)]()) {}
  bool empty() const { return data_ == nullptr; }
  double& operator[](int64_t i) { return data_[i]; }
  template <class T>
  void store_to(void* to) const {
    for (int64_t i = 0; i < size_; ++i) store<T>(data_[i], to, i);
  }

 private:
  int64_t size_;
  std::unique_ptr<double[]> data_;
};

// The statistics that forward used, and gamma and beta, of one channel.
struct Channel {
  double gamma, beta, mean, inv_std;
};

template <class Stat>
Channel channel_of(const ConvBnParams& p, const BackwardBuffers& b, int64_t k) {
  const double gamma = load<Stat>(b.gamma, k), beta = load<Stat>(b.beta, k);
  if (uses_batch_statistics(p)) return {gamma, beta, load<Stat>(b.batch_mean, k), load<Stat>(b.inv_std, k)};
  const double variance = load<Stat>(b.moving_variance, k);
  return {gamma, beta, load<Stat>(b.moving_mean, k), 1 / std::sqrt(variance + p.epsilon)};
}

// z as forward stored it: in training it was rounded to T before anything used it. `mean` is what it lacks in bfloat16.
template <class T>
double conv_out_at(const Problem& problem, const BackwardBuffers& b, double mean, int64_t n, int64_t h, int64_t w,
                   int64_t k) {
  if (has_rounded_conv_out(problem.p)) return mean + load<BFloat16>(b.conv_out, rounded_at(problem.p, n, h, w, k));
  if (has_conv_out(problem.p)) return load<T>(b.conv_out, problem.output(n, h, w, k));
  const double z = convolve<T>(problem, b.inputs, b.filters, n, h, w, k);
  if (!problem.p.training) return z;
  T stored;
  store(z, &stored);
  return load(stored);
}

// du = dy activation'(u) at one element, u = gamma xhat + beta + residual.
template <class T>
double argument_gradient(const ConvBnParams& p, const BackwardBuffers& b, const Channel& channel, double xhat,
                         int64_t at) {
  const double dy = load<T>(b.output_gradient, at);
  if (needs_output(p)) return dy * derivative_of_output_function(p.activation, AllActivations{})(load<T>(b.output, at));
  const double residual = needs_residual(p) ? load<T>(b.residual, at) : 0;
  return dy * derivative_function(p.activation, AllActivations{})(channel.gamma * xhat + channel.beta + residual);
}

// The mean of z - mean of channel k: not 0 where that was rounded.
template <class T>
double mean_error(const Problem& problem, const BackwardBuffers& b, double mean, int64_t k) {
  if (!has_rounded_conv_out(problem.p)) return 0;
  double sum = 0;
  for_each_pixel(problem.p,
                 [&](int64_t n, int64_t h, int64_t w) { sum += conv_out_at<T>(problem, b, mean, n, h, w, k) - mean; });
  return sum / static_cast<double>(problem.p.pixels());
}

// Writes the gradients of gamma, beta, both moving statistics and the residual of channel k, and the gradient of z to
// *dz. *xhat: scratch.
template <class T, class Stat>
void backward_channel(const Problem& problem, const BackwardBuffers& b, int64_t k, Scratch* xhat, Scratch* dz) {
  const ConvBnParams& p = problem.p;
  const Channel channel = channel_of<Stat>(p, b, k);
  const double error = mean_error<T>(problem, b, channel.mean, k);
  double d_beta = 0, d_gamma = 0;
  for_each_pixel(p, [&](int64_t n, int64_t h, int64_t w) {
    const int64_t at = problem.output(n, h, w, k);
    (*xhat)[at] = (conv_out_at<T>(problem, b, channel.mean, n, h, w, k) - channel.mean) * channel.inv_std;
    const double du = (*dz)[at] = argument_gradient<T>(p, b, channel, (*xhat)[at], at);
    (*xhat)[at] -= error * channel.inv_std;
    if (b.d_residual != nullptr) store<T>(du, b.d_residual, at);
    d_beta += du;
    d_gamma += du * (*xhat)[at];
  });
  double d_mean = load<Stat>(b.moving_mean_gradient, k), d_variance = load<Stat>(b.moving_variance_gradient, k);
  const double scale = channel.gamma * channel.inv_std, n_inverse = 1 / static_cast<double>(p.pixels());
  const bool batch = uses_batch_statistics(p);
  double constant = 0, slope = 0;  // dz = scale du + constant + slope xhat
  if (batch) {  // z also acts through its own statistics, on the output and on the returned moving ones
    const double decay = 1 - p.momentum;
    constant = n_inverse * (decay * d_mean - scale * d_beta);
    slope = n_inverse * (decay * variance_correction(p) * d_variance * 2 / channel.inv_std - scale * d_gamma);
    d_mean *= p.momentum;
    d_variance *= p.momentum;
  } else if (!p.training) {
    d_mean -= scale * d_beta;
    d_variance -= 0.5 * scale * channel.inv_std * d_gamma;
  }
  for_each_pixel(p, [&](int64_t n, int64_t h, int64_t w) {
    const int64_t at = problem.output(n, h, w, k);
    (*dz)[at] = scale * (*dz)[at] + constant + slope * (*xhat)[at];
  });
  store<Stat>(d_beta, b.d_beta, k);
  store<Stat>(d_gamma, b.d_gamma, k);
  store<Stat>(d_mean, b.d_moving_mean, k);
  store<Stat>(d_variance, b.d_moving_variance, k);
}

// Adds what dz, the gradient of one element of z, contributes to the gradients of inputs and filters.
template <class T>
void add_conv_gradients(const Problem& problem, const BackwardBuffers& b, int64_t n, int64_t out_h, int64_t out_w,
                        int64_t k, double dz, Scratch* d_inputs, Scratch* d_filters) {
  const ConvBnParams& p = problem.p;
  const int64_t first = k / p.group_out() * p.group_in();
  for_each_tap(p, out_h, out_w, [&](int64_t tap, int64_t h, int64_t w) {
    for (int64_t c = 0; c < p.group_in(); ++c) {
      const int64_t input = problem.input(n, h, w, first + c), filter = problem.filter(tap, c, k);
      (*d_inputs)[input] += dz * load<T>(b.filters, filter);
      (*d_filters)[filter] += dz * load<T>(b.inputs, input);
    }
  });
}

template <class T, class Stat>
Status backward(const ConvBnParams& p, const BackwardBuffers& b) {
  const Problem problem(p);
  const int64_t elements = p.pixels() * p.out_channels;
  Scratch xhat(elements), dz(elements), d_inputs(p.batch * p.in_height * p.in_width * p.in_channels),
      d_filters(p.taps() * p.group_in() * p.out_channels);
  if (xhat.empty() || dz.empty() || d_inputs.empty() || d_filters.empty())
    return Status::error("the reference kernel has not enough memory for this problem. Received: " +
                         std::to_string(elements) + " output elements");
  for (int64_t k = 0; k < p.out_channels; ++k) backward_channel<T, Stat>(problem, b, k, &xhat, &dz);
  if (b.d_inputs == nullptr && b.d_filters == nullptr) return Status{};
  for_each_pixel(p, [&](int64_t n, int64_t h, int64_t w) {
    for (int64_t k = 0; k < p.out_channels; ++k)
      add_conv_gradients<T>(problem, b, n, h, w, k, dz[problem.output(n, h, w, k)], &d_inputs, &d_filters);
  });
  if (b.d_inputs != nullptr) d_inputs.store_to<T>(b.d_inputs);
  if (b.d_filters != nullptr) d_filters.store_to<T>(b.d_filters);
  return Status{};
}

}  // namespace

Status reference_forward(const ConvBnParams& params, const ForwardBuffers& buffers) {
  switch (params.dtype) {
    case DType::kFloat32: return forward<float, float>(params, buffers);
    case DType::kFloat64: return forward<double, double>(params, buffers);
    case DType::kFloat16: return forward<Half, float>(params, buffers);
    case DType::kBFloat16: return forward<BFloat16, float>(params, buffers);
  }
  return Status::error("dtype must be float16, bfloat16, float32 or float64");
}

Status reference_backward(const ConvBnParams& params, const BackwardBuffers& buffers) {
  switch (params.dtype) {
    case DType::kFloat32: return backward<float, float>(params, buffers);
    case DType::kFloat64: return backward<double, double>(params, buffers);
    case DType::kFloat16: return backward<Half, float>(params, buffers);
    case DType::kBFloat16: return backward<BFloat16, float>(params, buffers);
  }
  return Status::error("dtype must be float16, bfloat16, float32 or float64");
}

}  // namespace fusedconvbn
