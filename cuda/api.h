// Entry points of the CUDA library: what runs a problem of conv_bn.h on a GPU. Plain C, so that whoever opens the
// library needs no CUDA header: a stream is an opaque pointer, and comes last. All buffers, and the workspace, are
// memory of the device that is current, to which the stream belongs. A call queues its kernels on the stream and
// returns: it neither waits nor allocates, but for the first use of each kernel, which CUDA then loads. The result is
// null, or says what went wrong: text that the library owns, valid until the thread calls again.
#pragma once

#include "../csrc/conv_bn.h"

#define FCB_CUDA_API extern "C" __attribute__((visibility("default")))

namespace fusedconvbn {
// Differs where the structs of the contract do.
inline size_t contract_layout() {
  return (sizeof(ConvBnParams) << 20) + (sizeof(ForwardBuffers) << 10) + sizeof(BackwardBuffers);
}
}  // namespace fusedconvbn

// The library's contract_layout(): whoever has another one must not call it.
FCB_CUDA_API size_t fcb_cuda_layout();

// 256-byte aligned memory that one call needs; params as validate() of csrc/shape.h accepts them. Forward saves for
// backward what asked_for(params) says.
FCB_CUDA_API size_t fcb_cuda_forward_workspace(const fusedconvbn::ConvBnParams* params);
FCB_CUDA_API size_t fcb_cuda_backward_workspace(const fusedconvbn::ConvBnParams* params);

// Which kernels convolve: "tensor cores" (or that, and how), "depthwise" or "plain". Buffers that begin at no multiple
// of 16 bytes make tensor cores give way to "plain".
FCB_CUDA_API const char* fcb_cuda_kernels(const fusedconvbn::ConvBnParams* params);

FCB_CUDA_API const char* fcb_cuda_forward(const fusedconvbn::ConvBnParams* params,
                                          const fusedconvbn::ForwardBuffers* buffers, void* workspace, void* stream);
FCB_CUDA_API const char* fcb_cuda_backward(const fusedconvbn::ConvBnParams* params,
                                           const fusedconvbn::BackwardBuffers* buffers, void* workspace, void* stream);
