// The kernels compiled for AMX with bfloat16, and AVX-512 with its conversions to bfloat16.
#if defined(__x86_64__)
#define FCB_VECTOR_BYTES 64
#define FCB_TILE_ROWS 12
#define FCB_KERNELS kKernelsAmx
#include "isa_unit.inl"
#endif
