// Numbers as kernels read, compute and write them. To be included before all else of ours: activation.h finds exp_of()
// and erf_of() where it is first included.
#pragma once

#include <cmath>
#include <cstdint>

#include "../csrc/inline.h"

namespace fusedconvbn {

FCB_INLINE float exp_of(float x) { return expf(x); }
FCB_INLINE double exp_of(double x) { return exp(x); }
FCB_INLINE float erf_of(float x) { return erff(x); }
FCB_INLINE double erf_of(double x) { return erf(x); }

}  // namespace fusedconvbn

#include "../csrc/activation.h"
#include "../csrc/conv_bn.h"
#include "../csrc/half.h"

namespace fusedconvbn::cuda {

// float for data of 16 bits and float, else double. Statistics are of this type, too.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

FCB_INLINE float load(const float* at) { return *at; }
FCB_INLINE double load(const double* at) { return *at; }
FCB_INLINE float load(const Half* at) { return to_float(*at); }
FCB_INLINE float load(const BFloat16* at) { return to_float(*at); }

FCB_INLINE void store(float value, float* at) { *at = value; }
FCB_INLINE void store(double value, double* at) { *at = value; }
FCB_INLINE void store(float value, Half* at) { *at = to_half(value); }
FCB_INLINE void store(float value, BFloat16* at) { *at = to_bfloat16(value); }

// Function::of<A>(value) of the activation that is known at run time: a kernel for each would be eight times as many,
// and they wait for memory.
template <class Function, class C>
FCB_INLINE auto of_activation(Activation a, C value) {
  switch (a) {
    case Activation::kRelu: return Function::template of<Activation::kRelu>(value);
    case Activation::kRelu6: return Function::template of<Activation::kRelu6>(value);
    case Activation::kLeakyRelu: return Function::template of<Activation::kLeakyRelu>(value);
    case Activation::kElu: return Function::template of<Activation::kElu>(value);
    case Activation::kSilu: return Function::template of<Activation::kSilu>(value);
    case Activation::kHardSwish: return Function::template of<Activation::kHardSwish>(value);
    case Activation::kGelu: return Function::template of<Activation::kGelu>(value);
    case Activation::kNone: break;
  }
  return Function::template of<Activation::kNone>(value);
}

struct Activate {
  template <Activation A, class C>
  FCB_INLINE C of(C u) {
    return activate<A, C>(u);
  }
};
struct Derivative {
  template <Activation A, class C>
  FCB_INLINE C of(C u) {
    return derivative<A, C>(u);
  }
};
struct DerivativeOfOutput {
  template <Activation A, class C>
  FCB_INLINE C of(C y) {
    return derivative_of_output<A, C>(y);
  }
};
struct Piece {
  template <Activation A, class C>
  FCB_INLINE int of(C u) {
    return piece<A, C>(u);
  }
};

}  // namespace fusedconvbn::cuda
