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

// By an instruction where there is one: the same numbers, but for the payload of NaN.
#ifdef __CUDA_ARCH__
FCB_INLINE float convert(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
FCB_INLINE void convert(float value, Half* to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value)); }
FCB_INLINE void convert(float value, BFloat16* to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(value)); }
#else
FCB_INLINE float convert(Half value) { return to_float(value); }
FCB_INLINE void convert(float value, Half* to) { *to = to_half(value); }
FCB_INLINE void convert(float value, BFloat16* to) { *to = to_bfloat16(value); }
#endif

FCB_INLINE float load(const float* at) { return *at; }
FCB_INLINE double load(const double* at) { return *at; }
FCB_INLINE float load(const Half* at) { return convert(*at); }
FCB_INLINE float load(const BFloat16* at) { return to_float(*at); }

FCB_INLINE void store(float value, float* at) { *at = value; }
FCB_INLINE void store(double value, double* at) { *at = value; }
FCB_INLINE void store(float value, Half* at) { convert(value, at); }
FCB_INLINE void store(float value, BFloat16* at) { convert(value, at); }

// What is read and written at once: 16 bytes, at a multiple of 16.
template <class T>
constexpr int kOfChunk = 16 / static_cast<int>(sizeof(T));
template <class T, int kNumbers = kOfChunk<T>>
struct alignas(16) Chunk {
  T elements[kNumbers];
};
// A chunk's numbers as they are computed with.
template <class T>
using Numbers = Compute<T>[kOfChunk<T>];

template <class T, class C, int kNumbers>
FCB_INLINE void load_chunk(const T* at, C (&to)[kNumbers]) {
  static_assert(kNumbers * sizeof(T) % 16 == 0, "whole chunks");
  const Chunk<T, kNumbers> chunk = *reinterpret_cast<const Chunk<T, kNumbers>*>(at);
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) to[i] = load(&chunk.elements[i]);
}
template <class T, class C, int kNumbers>
FCB_INLINE void store_chunk(const C (&values)[kNumbers], T* at) {
  static_assert(kNumbers * sizeof(T) % 16 == 0, "whole chunks");
  Chunk<T, kNumbers> chunk;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) store(values[i], &chunk.elements[i]);
  *reinterpret_cast<Chunk<T, kNumbers>*>(at) = chunk;
}

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
// In place of the numbers of a chunk.
template <int kNumbers>
struct ActivateChunk {
  template <Activation A, class C>
  FCB_INLINE int of(C* u) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) u[i] = activate<A, C>(u[i]);
    return 0;
  }
};
// gradients[i] times the derivative at arguments[i], or, kOfOutput, where the activation gave that.
template <class C>
struct Chain {
  const C* arguments;
  C* gradients;
};
template <int kNumbers, bool kOfOutput>
struct ChainChunk {
  template <Activation A, class C>
  FCB_INLINE int of(Chain<C> in) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      in.gradients[i] *= kOfOutput ? derivative_of_output<A, C>(in.arguments[i]) : derivative<A, C>(in.arguments[i]);
    return 0;
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
