// The kernels compiled for the baseline of the architecture.
#define FCB_VECTOR_BYTES 16
#define FCB_TILE_ROWS 6
#define FCB_KERNELS kKernelsGeneric
#include "isa_unit.inl"
