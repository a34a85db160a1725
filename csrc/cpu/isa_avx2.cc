// The kernels compiled for AVX2, FMA and F16C.
#if defined(__x86_64__)
#define FCB_VECTOR_BYTES 32
#define FCB_TILE_ROWS 6
#define FCB_KERNELS kKernelsAvx2
#include "isa_unit.inl"
#endif
