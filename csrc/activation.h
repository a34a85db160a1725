// Every activation with its derivative, once, for each back end and the reference.
//
// The functions take any type V with arithmetic, comparison and ?: element by element: float, double, and vectors of
// them in the compiler's vector extension; S is V's element type, so that a constant never widens V. exp_of(V) and
// erf_of(V) are found by overload: whoever instantiates for V declares them, in this namespace, before this header.
#pragma once

#include "inline.h"

namespace fusedconvbn {

enum class Activation { kNone, kRelu, kRelu6, kLeakyRelu, kElu, kSilu, kHardSwish, kGelu };
constexpr int kActivationCount = 8;

// True where activation'(u) is a function of activation(u) alone.
FCB_INLINE constexpr bool derivative_from_output(Activation a) {
  return a == Activation::kRelu || a == Activation::kRelu6 || a == Activation::kLeakyRelu || a == Activation::kElu;
}

constexpr double kLeakySlope = 0.2;  // tf.nn.leaky_relu's and Keras's default
constexpr double kInvSqrt2 = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;

// Comparisons are written so that NaN takes the branch that returns it.
template <Activation A, class S, class V>
FCB_INLINE V activate(V u) {
  const V zero{};
  if constexpr (A == Activation::kRelu) {  // max(u, 0)
    return u < zero ? zero : u;
  } else if constexpr (A == Activation::kRelu6) {  // min(max(u, 0), 6)
    const V six = zero + S(6), low = u < zero ? zero : u;
    return low > six ? six : low;
  } else if constexpr (A == Activation::kLeakyRelu) {  // u > 0 ? u : 0.2 u
    return u > zero ? u : u * S(kLeakySlope);
  } else if constexpr (A == Activation::kElu) {  // u >= 0 ? u : exp(u) - 1
    return u < zero ? exp_of(u) - S(1) : u;
  } else if constexpr (A == Activation::kSilu) {  // u sigmoid(u)
    return u / (exp_of(-u) + S(1));
  } else if constexpr (A == Activation::kHardSwish) {  // u min(max(u + 3, 0), 6) / 6
    return u * (activate<Activation::kRelu6, S>(u + S(3)) * S(1.0 / 6));
  } else if constexpr (A == Activation::kGelu) {  // u Phi(u), Phi the normal distribution function
    return u * S(0.5) * (erf_of(u * S(kInvSqrt2)) + S(1));
  } else {
    return u;
  }
}

// activation'(u) from y = activation(u), where derivative_from_output(A).
template <Activation A, class S, class V>
FCB_INLINE V derivative_of_output(V y) {
  const V zero{}, one = zero + S(1);
  if constexpr (A == Activation::kRelu) {
    return y > zero ? one : zero;
  } else if constexpr (A == Activation::kRelu6) {
    return (y > zero) & (y < zero + S(6)) ? one : zero;
  } else if constexpr (A == Activation::kLeakyRelu) {
    return y > zero ? one : zero + S(kLeakySlope);
  } else {  // kElu: exp(u) = y + 1 for u < 0
    return y < zero ? y + S(1) : one;
  }
}

// activation'(u). Where TensorFlow picks a side of a kink, so do we.
template <Activation A, class S, class V>
FCB_INLINE V derivative(V u) {
  const V zero{}, one = zero + S(1);
  if constexpr (A == Activation::kElu) {
    return derivative_of_output<A, S>(activate<A, S>(u));
  } else if constexpr (derivative_from_output(A)) {  // u and y are on the same side of each kink
    return derivative_of_output<A, S>(u);
  } else if constexpr (A == Activation::kSilu) {  // s (1 + u (1 - s)), s = sigmoid(u)
    const V s = one / (exp_of(-u) + S(1));
    return s * (u * (one - s) + S(1));
  } else if constexpr (A == Activation::kHardSwish) {  // 0 | (2 u + 3) / 6 | 1
    const V inner = (u * S(2) + S(3)) * S(1.0 / 6);
    const V right = u >= zero + S(3) ? one : inner;
    return u <= zero - S(3) ? zero : right;
  } else if constexpr (A == Activation::kGelu) {  // Phi(u) + u phi(u)
    return (erf_of(u * S(kInvSqrt2)) + S(1)) * S(0.5) + u * exp_of(u * u * S(-0.5)) * S(kInvSqrt2Pi);
  } else {
    return one;
  }
}

// True where activation' jumps; piece() tells apart what lies on two sides of a jump.
FCB_INLINE constexpr bool derivative_jumps(Activation a) {
  return a == Activation::kRelu || a == Activation::kRelu6 || a == Activation::kLeakyRelu ||
         a == Activation::kHardSwish;
}
template <Activation A, class S, class V>
FCB_INLINE auto piece(V u) {
  const V zero{};
  if constexpr (A == Activation::kRelu6) {
    return (u > zero) + (u < zero + S(6));
  } else if constexpr (A == Activation::kHardSwish) {
    return (u > zero - S(3)) - (u < zero + S(3));
  } else {
    return u > zero;
  }
}

}  // namespace fusedconvbn
