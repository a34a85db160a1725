// float16 and bfloat16 as storage types: conversions from and to float, rounding to nearest even. By integer
// arithmetic, so that they hold under any floating-point mode (TensorFlow's threads flush subnormals). Internal
// linkage, see inline.h; the scalar definition that vector code agrees with bit by bit.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fusedconvbn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FCB_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FCB_INLINE float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// bits / 2^shift, rounded to nearest, ties to even; shift >= 1.
FCB_INLINE uint32_t shift_round_even(uint32_t bits, uint32_t shift) {
  return (bits + (1u << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift;
}

FCB_INLINE float to_float(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

FCB_INLINE float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31, mantissa = value.bits & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
  return bits_float(sign | float_bits(static_cast<float>(mantissa) * 0x1p-24f));  // zero or subnormal: exact
}

FCB_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = nan ? bits >> 16 | 0x40 : shift_round_even(bits, 16);  // 0x40: quiet, and never infinity
  return {static_cast<uint16_t>(rounded)};
}

FCB_INLINE Half to_half(float value) {
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t exponent = magnitude >> 23;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN: quiet, payload kept
  } else if (magnitude >= 0x477ff000) {
    result = 0x7c00;  // 65520 = the largest finite value and half a unit: rounds to infinity
  } else if (exponent >= 113) {
    result = shift_round_even(magnitude - (112u << 23), 13);
  } else if (exponent >= 102) {
    result = shift_round_even((magnitude & 0x7fffff) | 0x800000, 126 - exponent);  // subnormal, in units of 2^-24
  } else {
    result = 0;  // less than half the smallest subnormal
  }
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace fusedconvbn
