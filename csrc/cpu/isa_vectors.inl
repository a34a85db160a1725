// What a unit of an instruction set (isa_*.cc) begins with: its vectors. Only intrinsics, C headers and our plain
// structs, all with internal linkage: a standard template instantiated here could replace another unit's copy at link
// time and run on a machine that lacks the instructions.
#include <stdint.h>
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 says so of its own intrinsics
#endif
#include <immintrin.h>
#endif

#include "../half.h"
#include "../inline.h"

namespace fusedconvbn {
namespace {
#include "simd.inl"
}  // namespace
}  // namespace fusedconvbn
