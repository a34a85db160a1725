// The handlers of the custom calls on the CPU: the core's kernels on XLA's intra-op threads.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "../host/memory.h"
#include "../host/pool_threads.h"
#include "../host/workspace_pool.h"
#include "calls.h"
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

class Cpu {
 public:
  static constexpr Plans::Planner plan_forward = fusedconvbn::plan_forward, plan_backward = fusedconvbn::plan_backward;

  explicit Cpu(ffi::ThreadPool* pool) : pool_(pool) {}

  Status describe(const Arrays& arrays, ConvBnParams* params, PlannedBy* by) const {
    params->training = arrays.training();
    if (const char* kernel = std::getenv("FUSEDCONVBN_KERNEL")) by->kernel = kernel;
    const int threads = static_cast<int>(std::max<int64_t>(pool_->num_threads(), 1));
    return detect_device(useful_threads(*params, threads), &by->device);
  }

  // XLA's memory is new in every call of a program.
  static void begin(Arrays* arrays) { arrays->for_results(host::prefer_huge_pages); }

  template <class Buffers>
  ffi::Error run(const Plan& plan, const Buffers& buffers) const {
    XlaThreads threads(pool_, plan.device.threads);
    const host::WorkspacePool::Lease workspace(host::WorkspacePool::global(), plan.workspace_bytes);
    if (workspace.data() == nullptr)
      return ffi::Error(
          ffi::ErrorCode::kResourceExhausted,
          "out of memory: no " + std::to_string(plan.workspace_bytes) + " bytes of workspace for " + plan.describe());
    return invalid(run_cpu(plan, buffers, workspace.data(), &threads));
  }

 private:
  ffi::ThreadPool* const pool_;
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
