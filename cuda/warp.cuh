// What a warp does together on Ampere and later: copies past the registers, matrices of 8 x 8 from shared memory, and
// products of matrices of 16 bits with sums in float. On the host the same by the definitions of the instructions.
#pragma once

#include "element.h"
#include "launch.h"

namespace fusedconvbn::cuda {

constexpr int kWarp = 32;

constexpr int kEight = 8;
using Eight = Chunk<uint16_t>;  // what a copy brings; a row of a matrix

#ifdef __CUDACC__

FCB_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Queues a copy into shared memory; from null: zeros. `anywhere`: an address that may be read.
FCB_DEVICE void copy_async(Eight* to, const void* from, const void* anywhere) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from == nullptr ? anywhere : from), "r"(from == nullptr ? 0 : 16)
               : "memory");
}
FCB_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all groups of the thread's but the last ones.
template <int kButTheLast>
FCB_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kButTheLast) : "memory");
}

// Four matrices, of whose rows lane i names the i-th of all 32. Of each a lane gets elements (lane / 4, 2 (lane % 4))
// and the next one of that row; transposed: (2 (lane % 4), lane / 4) and the next one of that column.
template <bool kTransposed>
FCB_DEVICE void load_matrices(uint32_t (&to)[4], const Eight* row) {
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums [16][8] += a [16][16] b [16][8]. A lane has of the sums (lane / 4, 2 (lane % 4)), the next one, and both of row
// + 8; of a the matrices (0, 0), (8, 0), (0, 8), (8, 8), of b (0, 0), (8, 0) transposed.
FCB_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FCB_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The sum of `value` over the lanes that differ in the bits of `lanes` alone, for each of them.
FCB_DEVICE float sum_over(float value, int lanes) {
  for (int bit = 1; bit < kWarp; bit *= 2)
    if (lanes & bit) value += __shfl_xor_sync(0xffffffffu, value, bit);
  return value;
}

#else

inline float sum_over(float value, int lanes) {
  for (int bit = 1; bit < kWarp; bit *= 2)
    if (lanes & bit) value += host::all_of_warp(value)[threadIdx.x % kWarp ^ bit];
  return value;
}

inline void copy_async(Eight* to, const void* from, const void*) { host::copy_async(to, from); }
inline void commit_copies() { host::commit_copies(); }
template <int kButTheLast>
void wait_for_copies() {
  host::wait_for_copies(kButTheLast);
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const Eight* row) {
  const Eight* const* const rows = host::all_of_warp(row);
  const int lane = threadIdx.x % kWarp, major = lane / 4, minor = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const Eight* const* const matrix = rows + 8 * i;
    const uint32_t low = kTransposed ? matrix[minor]->elements[major] : matrix[major]->elements[minor];
    const uint32_t high = kTransposed ? matrix[minor + 1]->elements[major] : matrix[major]->elements[minor + 1];
    to[i] = low | high << 16;
  }
}

struct Factors {
  uint32_t a[4], b[2];
};

template <class T>
float half_of(uint32_t pair, int i) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * i)});
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  const Factors* const lanes = host::all_of_warp(Factors{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, low_rows = i / 2, col = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t factor = lanes[row * 4 + k % 8 / 2].a[low_rows + k / 8 * 2],
                     of = lanes[col * 4 + k % 8 / 2].b[k / 8];
      sums[i] += half_of<T>(factor, k % 2) * half_of<T>(of, k % 2);
    }
  }
}

#endif

}  // namespace fusedconvbn::cuda
