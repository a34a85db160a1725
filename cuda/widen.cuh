// Images of few channels on tensor cores: copies of the inputs and the filters, with zeros for the channels that eights
// lack, and of the gradients without them.
#pragma once

#include "problem.h"

namespace fusedconvbn::cuda {

// Three channels take 2.7 times the products; one or two are as quickly done without tensor cores.
constexpr int64_t kFewestWidened = 3;

inline ConvBnParams widened(const ConvBnParams& p) {
  ConvBnParams wide = p;
  wide.in_channels = ceil_div(p.in_channels, kEight) * kEight;
  return wide;
}
inline bool is_widened(const ConvBnParams& p) {
  return p.groups == 1 && p.in_channels >= kFewestWidened && p.in_channels % kEight != 0 &&
         input_elements(widened(p)) < INT32_MAX && suits_tensor_cores(widened(p));
}

// [outer][from_size][inner] to [outer][to_size][inner]: zeros beyond from_size, or without what is beyond to_size.
template <class T>
__global__ void __launch_bounds__(kThreads)
    resize(const T* from, int from_size, Divisor to_size, Divisor inner, int elements, T* to) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int line = inner.quotient(i), place = inner.rest(i, line), outer = to_size.quotient(line),
            number = to_size.rest(line, outer);
  T value{};
  if (number < from_size) value = from[(int64_t{outer} * from_size + number) * inner.divisor + place];
  to[i] = value;
}

template <class T>
void resize_axis(const void* from, int64_t outer, int64_t from_size, int64_t to_size, int64_t inner, void* to,
                 void* stream) {
  const int64_t elements = outer * to_size * inner;
  launch(resize<T>, blocks_for(elements), stream, static_cast<const T*>(from), static_cast<int>(from_size),
         Divisor(to_size), Divisor(inner), static_cast<int>(elements), static_cast<T*>(to));
}

// The copies of a problem; the pointers are null where only sizes count.
template <class T>
struct Widened {
  const ConvBnParams& p;
  ConvBnParams wide = widened(p);
  T *inputs = nullptr, *filters = nullptr, *d_inputs = nullptr, *d_filters = nullptr;

  void carve(Carver* carver, bool backward) {
    const int64_t image = input_elements(wide), of_filters = filter_elements(wide);
    inputs = carver->take<T>(image), filters = carver->take<T>(of_filters);
    d_inputs = carver->take<T>(backward ? image : 0), d_filters = carver->take<T>(backward ? of_filters : 0);
  }
  void copy_in(const void* narrow_inputs, const void* narrow_filters, void* stream) const {
    resize_axis<T>(narrow_inputs, pixels(), p.in_channels, wide.in_channels, 1, inputs, stream);
    resize_axis<T>(narrow_filters, p.taps(), p.in_channels, wide.in_channels, p.out_channels, filters, stream);
  }
  void copy_out(void* narrow_d_inputs, void* narrow_d_filters, void* stream) const {
    if (narrow_d_inputs != nullptr)
      resize_axis<T>(d_inputs, pixels(), wide.in_channels, p.in_channels, 1, narrow_d_inputs, stream);
    if (narrow_d_filters != nullptr)
      resize_axis<T>(d_filters, p.taps(), wide.in_channels, p.in_channels, p.out_channels, narrow_d_filters, stream);
  }

 private:
  int64_t pixels() const { return p.batch * p.in_height * p.in_width; }
};

}  // namespace fusedconvbn::cuda
