// The kernels compiled for AVX-512 (F, VL, DQ, BW).
#if defined(__x86_64__)
#define FCB_VECTOR_BYTES 64
#define FCB_TILE_ROWS 12
#define FCB_KERNELS kKernelsAvx512
#include "isa_unit.inl"
#endif
