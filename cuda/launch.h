// Launches kernels: by CUDA, or, where g++ compiles, on the host (host/fibers.h), which tests use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../csrc/inline.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "host/fibers.h"
#endif

#define FCB_DEVICE_MEMBER __device__ __forceinline__  // of device code alone
#define FCB_DEVICE static FCB_DEVICE_MEMBER

namespace fusedconvbn::cuda {

constexpr int kThreads = 256;  // of a block, of every kernel

// A kernel's grid is one-dimensional, as the second and third dimensions end at 65535. `shared`: bytes of dynamic
// shared memory, which a kernel declares by FCB_DYNAMIC_SHARED(type, name).
#ifdef __CUDACC__
#define FCB_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
template <class... Parameters, class... Arguments>
void launch_with_shared(void (*kernel)(Parameters...), int64_t blocks, size_t shared, void* stream,
                        Arguments... arguments) {
  constexpr size_t kUnasked = size_t{48} << 10;
  if (blocks <= 0) return;
  if (shared > kUnasked)  // of each GPU: not once for the process; what fails here fails the launch, too
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
}
#else
#define FCB_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(host::dynamic_shared())
template <class... Parameters, class... Arguments>
void launch_with_shared(void (*kernel)(Parameters...), int64_t blocks, size_t shared, void*, Arguments... arguments) {
  host::run_blocks(blocks, kThreads, shared, [=] { kernel(arguments...); });
}
#endif
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments... arguments) {
  launch_with_shared(kernel, blocks, 0, stream, arguments...);
}

FCB_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the launches since the last call went wrong with; null: nothing.
#ifdef __CUDACC__
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
inline const char* launch_error() { return nullptr; }
#endif

// Blocks for a thread an element.
constexpr int64_t blocks_for(int64_t elements) { return ceil_div(elements, kThreads); }

}  // namespace fusedconvbn::cuda
