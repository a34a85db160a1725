// The ops on a GPU, by the CUDA library beside this one. It is opened when the first kernel is made; where the build
// made none, there are no kernels, and TensorFlow places the ops on the CPU.
#include <dlfcn.h>

#include <filesystem>
#include <memory>
#include <string>
#include <system_error>

#include "../cuda_library.h"
#include "conv_bn_kernels.h"
#include "xla/stream_executor/stream.h"

namespace fusedconvbn::tf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

// Where the CUDA library is, if there is one.
std::filesystem::path cuda_path() {
  static const int here = 0;
  Dl_info info;
  if (dladdr(&here, &info) == 0) return {};
  return std::filesystem::absolute(info.dli_fname).parent_path() / "_cuda.so";
}

struct Opened {
  std::unique_ptr<CudaLibrary> library;  // null after an error
  Status status;
};

// Once a process; never closed.
const Opened& cuda() {
  static const Opened* const opened = [] {
    auto* const result = new Opened;
    result->status = CudaLibrary::open(cuda_path(), &result->library);
    return result;
  }();
  return *opened;
}

absl::Status internal(const Status& status) {
  return status.ok() ? absl::OkStatus() : absl::InternalError(status.message);
}

class Gpu {
 public:
  static const char* type() { return tensorflow::DEVICE_GPU; }
  using Tensors = tf::Tensors;

  explicit Gpu(OpKernelConstruction* context) { OP_REQUIRES_OK(context, internal(cuda().status)); }

  static absl::Status describe(OpKernelContext*, Call*) { return absl::OkStatus(); }

  static Status plan_forward(const ConvBnParams& params, const DeviceInfo&, const std::string&, Plan* plan) {
    return cuda().library->plan(params, false, plan);
  }
  static Status plan_backward(const ConvBnParams& params, const DeviceInfo&, const std::string&, Plan* plan) {
    return cuda().library->plan(params, true, plan);
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
    return internal(cuda().library->run(plan, buffers, workspace.data(), stream));
  }
};

[[maybe_unused]] const bool registered = [] {
  std::error_code none;
  return std::filesystem::exists(cuda_path(), none) && register_kernels<Gpu>();
}();

}  // namespace
}  // namespace fusedconvbn::tf
