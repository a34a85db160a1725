// The ops on the CPU.
#include <cstdlib>

#include "../host/packed_filters.h"
#include "../host/workspace_pool.h"
#include "absl/functional/function_ref.h"
#include "conv_bn_kernels.h"
#include "host_tensors.h"
#include "known_tensor.h"
#include "thread_pool.h"

namespace fusedconvbn::tf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

using PackedFilters = host::PackedFilters<KnownTensor>;

class Cpu {
 public:
  static const char* type() { return tensorflow::DEVICE_CPU; }
  using Tensors = HostTensors;
  static constexpr Planner plan_forward = fusedconvbn::plan_forward, plan_backward = fusedconvbn::plan_backward;

  explicit Cpu(OpKernelConstruction* context) {
    if (!context->HasAttr("keep_filters")) return;  // forward's
    OP_REQUIRES_OK(context, context->GetAttr("keep_filters", &keep_filters_));
    size_t unused = 0;
    OP_REQUIRES_OK(context, to_absl(host::read_packed_limit(&unused)));
  }

  static absl::Status describe(OpKernelContext* context, Call* call) {
    if (const char* kernel = std::getenv("FUSEDCONVBN_KERNEL")) call->kernel = kernel;
    return to_absl(detect_device(IntraOpThreads::of(context), &call->device));
  }

  absl::Status run(OpKernelContext* context, const Plan& plan, const Tensor& filters, ForwardBuffers buffers) const {
    return in_workspace(context, plan, [&](void* workspace, ParallelFor* threads) {
      const PackedFilters::Packed packed = packed_filters(filters, plan, workspace, threads);
      buffers.packed_filters = packed.get();
      return run_cpu(plan, buffers, workspace, threads);
    });
  }

  absl::Status run(OpKernelContext* context, const Plan& plan, const BackwardBuffers& buffers) const {
    return in_workspace(context, plan, [&](void* workspace, ParallelFor* threads) {
      return run_cpu(plan, buffers, workspace, threads);
    });
  }

 private:
  using Run = absl::FunctionRef<Status(void* workspace, ParallelFor*)>;

  static absl::Status in_workspace(OpKernelContext* context, const Plan& plan, Run run_plan) {
    IntraOpThreads threads(context, plan.device.threads);
    host::WorkspacePool::Lease workspace(host::WorkspacePool::global(), plan.workspace_bytes);
    if (workspace.data() == nullptr)
      return absl::ResourceExhaustedError(
          absl::StrCat("out of memory: no ", plan.workspace_bytes, " bytes of workspace for ", plan.describe()));
    return to_absl(run_plan(workspace.data(), &threads));
  }

  // Of earlier calls; null if there are none.
  PackedFilters::Packed packed_filters(const Tensor& filters, const Plan& plan, void* workspace,
                                       ParallelFor* threads) const {
    if (!keep_filters_ || !KnownTensor::may_keep(filters)) return nullptr;
    if (plan.params.training) return PackedFilters::global()->forget(filters.data()), nullptr;
    if (plan.packed_bytes == 0) return nullptr;
    return PackedFilters::global()->get(filters.data(), {filters}, plan, [&](void* packed) {
      return pack_filters(plan, filters.data(), packed, workspace, threads).ok();
    });
  }

  bool keep_filters_ = false;
};

[[maybe_unused]] const bool registered = register_kernels<Cpu>();

}  // namespace
}  // namespace fusedconvbn::tf
