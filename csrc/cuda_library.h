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

  // Memory for a call; params as validate() of shape.h accepts them, of which `algorithm` is ignored.
  size_t workspace_bytes(const ConvBnParams& params, bool backward) const {
    return (backward ? backward_workspace_ : forward_workspace_)(&params);
  }

  // All memory is that of the device that is current. Forward saves what asked_for(params) says.
  Status run(const ConvBnParams& params, const ForwardBuffers& buffers, void* workspace, void* stream) const {
    return status(forward_(&params, &buffers, workspace, stream));
  }
  Status run(const ConvBnParams& params, const BackwardBuffers& buffers, void* workspace, void* stream) const {
    return status(backward_(&params, &buffers, workspace, stream));
  }

 private:
  using Workspace = size_t (*)(const ConvBnParams*);
  using Forward = const char* (*)(const ConvBnParams*, const ForwardBuffers*, void*, void*);
  using Backward = const char* (*)(const ConvBnParams*, const BackwardBuffers*, void*, void*);

  static Status status(const char* error) { return error == nullptr ? Status{} : Status::error(error); }

  Workspace forward_workspace_ = nullptr, backward_workspace_ = nullptr;
  Forward forward_ = nullptr;
  Backward backward_ = nullptr;
};

}  // namespace fusedconvbn
