// The CUDA kernels as C++ (fibers.h).
#include "../run.cu"
