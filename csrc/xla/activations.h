// Activations and their derivatives in XLA's own ops, as activation.h has them.
#pragma once

#include "../activation.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"

namespace fusedconvbn::xla {

using ::xla::ScalarLike;
using ::xla::XlaOp;

inline XlaOp relu6(XlaOp u) { return ::xla::Clamp(ScalarLike(u, 0.0), u, ScalarLike(u, 6.0)); }

// Keeps NaN, which is neither positive nor negative.
inline XlaOp positive_part(XlaOp u) { return ::xla::Max(u, ScalarLike(u, 0.0)); }

inline XlaOp normal_distribution(XlaOp u) {
  return ScalarLike(u, 0.5) * (ScalarLike(u, 1.0) + ::xla::Erf(u * ScalarLike(u, kInvSqrt2)));
}

inline XlaOp activate(Activation activation, XlaOp u) {
  const XlaOp zero = ScalarLike(u, 0.0);
  switch (activation) {
    case Activation::kNone: return u;
    case Activation::kRelu: return positive_part(u);
    case Activation::kRelu6: return relu6(u);
    case Activation::kLeakyRelu: return ::xla::Select(::xla::Gt(u, zero), u, u * ScalarLike(u, kLeakySlope));
    case Activation::kElu: return ::xla::Select(::xla::Lt(u, zero), ::xla::Expm1(u), u);
    case Activation::kSilu: return u * ::xla::Logistic(u);
    case Activation::kHardSwish: return u * relu6(u + ScalarLike(u, 3.0)) * ScalarLike(u, 1.0 / 6);
    case Activation::kGelu: return u * normal_distribution(u);
  }
  return u;
}

// From y = activation(u), where derivative_from_output() says that it can be had so.
inline XlaOp derivative_of_output(Activation activation, XlaOp y) {
  const XlaOp zero = ScalarLike(y, 0.0), one = ScalarLike(y, 1.0);
  switch (activation) {
    case Activation::kRelu: return ::xla::Select(::xla::Gt(y, zero), one, zero);
    case Activation::kRelu6:
      return ::xla::Select(::xla::And(::xla::Gt(y, zero), ::xla::Lt(y, ScalarLike(y, 6.0))), one, zero);
    case Activation::kLeakyRelu: return ::xla::Select(::xla::Gt(y, zero), one, ScalarLike(y, kLeakySlope));
    case Activation::kElu: return ::xla::Select(::xla::Lt(y, zero), y + one, one);
    default: return one;
  }
}

inline XlaOp derivative(Activation activation, XlaOp u) {
  const XlaOp zero = ScalarLike(u, 0.0), one = ScalarLike(u, 1.0), three = ScalarLike(u, 3.0);
  switch (activation) {
    case Activation::kSilu: {
      const XlaOp s = ::xla::Logistic(u);
      return s * (one + u * (one - s));
    }
    case Activation::kHardSwish:
      return ::xla::Select(::xla::Le(u, -three), zero,
                           ::xla::Select(::xla::Ge(u, three), one, (u + u + three) * ScalarLike(u, 1.0 / 6)));
    case Activation::kGelu: {
      const XlaOp density = ::xla::Exp(u * u * ScalarLike(u, -0.5)) * ScalarLike(u, kInvSqrt2Pi);
      return normal_distribution(u) + u * density;
    }
    default: return derivative_of_output(activation, activate(activation, u));
  }
}

}  // namespace fusedconvbn::xla
