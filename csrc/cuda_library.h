// The CUDA kernels (cuda/api.h), in a library of their own that is opened at run time: what a machine without a GPU
// loads knows nothing of CUDA.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "conv_bn.h"

namespace fusedconvbn {

// Stays open for as long as the process lives: kernels of it may be queued.
class CudaLibrary {
 public:
  static Status open(const std::string& path, std::unique_ptr<CudaLibrary>* library);

  // `_cuda.so` beside the library that calls, or what FUSEDCONVBN_CUDA_LIBRARY names: whether it is there, and itself,
  // opened by the first call; null, and why, if it cannot be.
  static bool is_there();
  static const CudaLibrary* get(Status* status = nullptr);

  // As plan_forward() and plan_backward(): params as validate() of shape.h accepts them. Of second moments of the
  // inputs, which forward may have saved on a CPU, backward makes no use: it computes z again.
  Status plan(const ConvBnParams& params, bool backward, Plan* plan) const;

  // All memory is that of the device that is current. Queues kernels on its stream, and does not wait for them.
  Status run(const Plan& plan, const ForwardBuffers& buffers, void* workspace, void* stream) const {
    return status(forward_(&plan.params, &buffers, workspace, stream));
  }
  Status run(const Plan& plan, const BackwardBuffers& buffers, void* workspace, void* stream) const {
    return status(backward_(&plan.params, &buffers, workspace, stream));
  }

 private:
  using Kernels = const char* (*)(const ConvBnParams*);
  using Workspace = size_t (*)(const ConvBnParams*);
  using Forward = const char* (*)(const ConvBnParams*, const ForwardBuffers*, void*, void*);
  using Backward = const char* (*)(const ConvBnParams*, const BackwardBuffers*, void*, void*);

  static Status status(const char* error) { return error == nullptr ? Status{} : Status::error(error); }

  Kernels kernels_ = nullptr;
  Workspace forward_workspace_ = nullptr, backward_workspace_ = nullptr;
  Forward forward_ = nullptr;
  Backward backward_ = nullptr;
};

}  // namespace fusedconvbn
