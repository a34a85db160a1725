// The ops on a GPU, by the CUDA library beside this one. It is opened when the first kernel is made; where the build
// made none, there are no kernels, and TensorFlow places the ops on the CPU.
#include <string>

#include "../cuda_library.h"
#include "conv_bn_kernels.h"
#include "xla/stream_executor/stream.h"

namespace fusedconvbn::tf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

absl::Status internal(const Status& status) {
  return status.ok() ? absl::OkStatus() : absl::InternalError(status.message);
}

class Gpu {
 public:
  static const char* type() { return tensorflow::DEVICE_GPU; }
  using Tensors = tf::Tensors;

  explicit Gpu(OpKernelConstruction* context) {
    Status status;
    CudaLibrary::get(&status);
    OP_REQUIRES_OK(context, internal(status));
  }

  static absl::Status describe(OpKernelContext*, Call*) { return absl::OkStatus(); }

  static Status plan_forward(const ConvBnParams& params, const DeviceInfo&, const std::string&, Plan* plan) {
    return CudaLibrary::get()->plan(params, false, plan);
  }
  static Status plan_backward(const ConvBnParams& params, const DeviceInfo&, const std::string&, Plan* plan) {
    return CudaLibrary::get()->plan(params, true, plan);
  }

  absl::Status run(OpKernelContext* context, const Plan& plan, const Tensor&, const ForwardBuffers& buffers) const {
    return run(context, plan, buffers);
  }

  // Queues the kernels on the context's stream, and does not wait for them.
  template <class Buffers>
  absl::Status run(OpKernelContext* context, const Plan& plan, const Buffers& buffers) const {
    Tensor workspace;
    const tensorflow::TensorShape shape({static_cast<int64_t>(plan.workspace_bytes)});
    TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_INT8, shape, &workspace));
    void* const stream = context->op_device_context()->stream()->platform_specific_handle().stream;
    return internal(CudaLibrary::get()->run(plan, buffers, workspace.data(), stream));
  }
};

[[maybe_unused]] const bool registered = CudaLibrary::is_there() && register_kernels<Gpu>();

}  // namespace
}  // namespace fusedconvbn::tf
