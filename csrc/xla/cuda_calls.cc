// The handlers of the custom calls on a GPU: the CUDA library's kernels, queued on XLA's stream.
#include <string>

#include "../cuda_library.h"
#include "calls.h"
#include "handlers.h"

namespace fusedconvbn::xla {
namespace {

class Cuda {
 public:
  static Status plan_forward(const ConvBnParams& params, const DeviceInfo&, const std::string&, Plan* plan) {
    return plan_cuda_call(params, false, plan);
  }
  static Status plan_backward(const ConvBnParams& params, const DeviceInfo&, const std::string&, Plan* plan) {
    return plan_cuda_call(params, true, plan);
  }

  explicit Cuda(void* stream) : stream_(stream) {}

  // `training` of the attributes holds: the operand is in the GPU's memory.
  static Status describe(const Arrays&, ConvBnParams*, PlannedBy*) { return {}; }

  void begin(Arrays* arrays) { workspace_ = arrays->next_result(&workspace_bytes_); }

  template <class Buffers>
  ffi::Error run(const Plan& plan, const Buffers& buffers) const {
    if (workspace_bytes_ < plan.workspace_bytes)
      return ffi::Error::InvalidArgument("FUSEDCONVBN_GPU_TILES must be what it was when XLA compiled the program");
    const Status status = CudaLibrary::get()->run(plan, buffers, workspace_, stream_);
    return status.ok() ? ffi::Error::Success() : ffi::Error::Internal(status.message);
  }

 private:
  void* const stream_;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
};

template <class Buffers>
ffi::Error on_gpu(void* stream, ffi::RemainingArgs operands, ffi::RemainingRets results, Integers integers,
                  Numbers numbers) {
  return handle<Buffers>(Cuda(stream), operands, results, integers, numbers);
}

auto binding() { return with_attributes(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>()); }

XLA_FFI_DEFINE_HANDLER(kForwardHandler, on_gpu<ForwardBuffers>, binding());
XLA_FFI_DEFINE_HANDLER(kBackwardHandler, on_gpu<BackwardBuffers>, binding());

}  // namespace

Status plan_cuda_call(const ConvBnParams& params, bool backward, Plan* plan) {
  Status status;
  const CudaLibrary* const library = CudaLibrary::get(&status);
  return status.ok() ? library->plan(params, backward, plan) : status;
}

Status register_cuda_calls() {
  const Status status = register_handler(kCudaForward, "CUDA", kForwardHandler);
  return status.ok() ? register_handler(kCudaBackward, "CUDA", kBackwardHandler) : status;
}

}  // namespace fusedconvbn::xla
