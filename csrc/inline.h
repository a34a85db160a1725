// How small functions are declared that several back ends compile: always inlined, with internal linkage, so that no
// copy that was compiled for one instruction set can be linked into code for another.
#pragma once

#ifdef __CUDACC__
#define FCB_INLINE_MEMBER __host__ __device__ __forceinline__
#else
#define FCB_INLINE_MEMBER inline __attribute__((always_inline))  // of a class of internal linkage
#endif
#define FCB_INLINE static FCB_INLINE_MEMBER
