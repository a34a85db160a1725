// The handlers of the custom calls on the CPU: the core's kernels on XLA's intra-op threads.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "../host/memory.h"
#include "../host/packed_filters.h"
#include "../host/pool_threads.h"
#include "../host/workspace_pool.h"
#include "calls.h"
#include "fingerprint.h"
#include "handlers.h"

namespace fusedconvbn::xla {
namespace {

class XlaThreads : public host::PoolThreads {
 public:
  XlaThreads(ffi::ThreadPool* pool, int threads) : PoolThreads(kAnyPool, threads), pool_(pool) {}

 protected:
  void schedule(Job job) override { pool_->Schedule(std::move(job)); }

 private:
  // Handlers are not told which pool is theirs. TensorFlow has one a device.
  static constexpr const char* kAnyPool = "XLA";

  ffi::ThreadPool* const pool_;
};

using PackedFilters = host::PackedFilters<Fingerprint>;
using Packed = PackedFilters::Packed;

// Packed filters that are kept take a hash of the unpacked ones in each call, which those do without that are read
// where they lie.
Status plan_with_least_packing(const ConvBnParams& params, const DeviceInfo& device, const std::string& kernel,
                               Plan* plan) {
  ConvBnParams once = params;
  once.keeps_filters = false;
  const Status status = plan_forward(once, device, kernel, plan);
  return !status.ok() || plan->packed_bytes == 0 ? status : plan_forward(params, device, kernel, plan);
}

class Cpu {
 public:
  static constexpr Plans::Planner plan_forward = plan_with_least_packing, plan_backward = fusedconvbn::plan_backward;

  explicit Cpu(ffi::ThreadPool* pool) : pool_(pool) {}

  Status describe(const Arrays& arrays, ConvBnParams* params, PlannedBy* by) const {
    params->training = arrays.training();
    if (const char* kernel = std::getenv("FUSEDCONVBN_KERNEL")) by->kernel = kernel;
    size_t unused = 0;
    if (const Status status = host::read_packed_limit(&unused); !status.ok()) return status;
    const int threads = static_cast<int>(std::max<int64_t>(pool_->num_threads(), 1));
    return detect_device(useful_threads(*params, threads), &by->device);
  }

  void begin(Arrays* arrays) {
    // XLA's memory is new in every call of a program, and most results lie side by side.
    arrays->for_results(host::prefer_huge_pages_around);
    filter_bytes_ = arrays->operand_bytes(1);
  }

  template <class Buffers>
  ffi::Error run(const Plan& plan, Buffers buffers) const {
    XlaThreads threads(pool_, plan.device.threads);
    const host::WorkspacePool::Lease workspace(host::WorkspacePool::global(), plan.workspace_bytes);
    if (workspace.data() == nullptr)
      return ffi::Error(
          ffi::ErrorCode::kResourceExhausted,
          "out of memory: no " + std::to_string(plan.workspace_bytes) + " bytes of workspace for " + plan.describe());
    const Packed packed = packed_filters(plan, &buffers, workspace.data(), &threads);
    return invalid(run_cpu(plan, buffers, workspace.data(), &threads));
  }

 private:
  // Of earlier calls; null if there are none.
  Packed packed_filters(const Plan& plan, ForwardBuffers* b, void* workspace, ParallelFor* threads) const {
    if (plan.params.training || plan.packed_bytes == 0) return nullptr;
    const Fingerprint fingerprint(b->filters, filter_bytes_, threads);
    Packed packed = PackedFilters::global()->get(b->filters, fingerprint, plan, [&](void* memory) {
      return pack_filters(plan, b->filters, memory, workspace, threads).ok();
    });
    b->packed_filters = packed.get();
    return packed;
  }
  static Packed packed_filters(const Plan&, BackwardBuffers*, void*, ParallelFor*) { return nullptr; }

  ffi::ThreadPool* const pool_;
  size_t filter_bytes_ = 0;  // forward
};

template <class Buffers>
ffi::Error on_cpu(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results, Integers integers,
                  Numbers numbers) {
  return handle<Buffers>(Cpu(&pool), operands, results, integers, numbers);
}

auto binding() { return with_attributes(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()); }

XLA_FFI_DEFINE_HANDLER(kForwardHandler, on_cpu<ForwardBuffers>, binding());
XLA_FFI_DEFINE_HANDLER(kBackwardHandler, on_cpu<BackwardBuffers>, binding());

}  // namespace

Status register_cpu_calls() {
  const Status status = register_handler(kForward, "Host", kForwardHandler);
  return status.ok() ? register_handler(kBackward, "Host", kBackwardHandler) : status;
}

}  // namespace fusedconvbn::xla
