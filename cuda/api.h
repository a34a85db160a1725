// Entry points of the CUDA library: what runs a problem of conv_bn.h on a GPU. Plain C, so that whoever opens the
// library needs no CUDA header: a stream is an opaque pointer, and comes last. All buffers, and the workspace, are
// device memory. A call queues its kernels on the stream and returns; it neither waits nor allocates. The result is
// null, or says what went wrong: text that the library owns, valid until the thread calls again.
#pragma once

#include "../csrc/conv_bn.h"

#define FCB_CUDA_API extern "C" __attribute__((visibility("default")))

// 256-byte aligned memory that one call needs; params as validate() of csrc/shape.h accepts them. Forward saves for
// backward what asked_for(params) says.
FCB_CUDA_API size_t fcb_cuda_forward_workspace(const fusedconvbn::ConvBnParams* params);
FCB_CUDA_API size_t fcb_cuda_backward_workspace(const fusedconvbn::ConvBnParams* params);

FCB_CUDA_API const char* fcb_cuda_forward(const fusedconvbn::ConvBnParams* params,
                                          const fusedconvbn::ForwardBuffers* buffers, void* workspace, void* stream);
FCB_CUDA_API const char* fcb_cuda_backward(const fusedconvbn::ConvBnParams* params,
                                           const fusedconvbn::BackwardBuffers* buffers, void* workspace, void* stream);
