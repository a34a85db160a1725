// The handlers of the custom calls on the CPU: the core's kernels on XLA's intra-op threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../host/pool_threads.h"
#include "../host/workspace_pool.h"
#include "cpu_calls.h"
#include "plans.h"
#include "xla/ffi/api/ffi.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // of libtensorflow_cc; its header takes in half of XLA
}

namespace fusedconvbn::xla {
namespace {

namespace ffi = ::xla::ffi;
using Integers = ffi::Span<const int64_t>;
using Numbers = ffi::Span<const double>;

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

// A call's arrays as the core's pointers, in their order.
class Arrays {
 public:
  Arrays(ffi::RemainingArgs operands, ffi::RemainingRets results) : operands_(operands), results_(results) {}

  const void* next_operand() { return data(*operands_.get<ffi::AnyBuffer>(operand_++)); }
  const void* next_operand_if(bool there) { return there ? next_operand() : nullptr; }

  void* next_result() { return data(**results_.get<ffi::AnyBuffer>(result_++)); }
  // Null unless it has that shape, as a result has that somebody wants.
  void* next_result_if(const std::vector<int64_t>& shape) { return is_next(shape) ? next_result() : skip(); }

  bool is_next(const std::vector<int64_t>& shape) const {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> found = results_.get<ffi::AnyBuffer>(result_);
    const auto sizes = (**found).dimensions();
    return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  }

  size_t operands() const { return operands_.size(); }
  bool training() const { return *operands_.get<ffi::AnyBuffer>(operands_.size() - 1)->typed_data<bool>(); }

 private:
  void* skip() { return ++result_, nullptr; }

  // An array without elements may have no memory, but to the core null means "not there".
  static void* data(const ffi::AnyBuffer& array) {
    alignas(64) static char nothing[64];
    return array.element_count() > 0 ? array.untyped_data() : nothing;
  }

  const ffi::RemainingArgs operands_;
  const ffi::RemainingRets results_;
  size_t operand_ = 0, result_ = 0;
};

ffi::Error invalid(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(status.message);
}

// What each handler begins with: the problem of this call, and its plan.
struct Call {
  ConvBnParams params;
  std::shared_ptr<const Plan> plan;
};

// `operand_count`: how many a problem has.
ffi::Error begin(Plans* plans, const ffi::ThreadPool& pool, const Arrays& arrays, Integers integers, Numbers numbers,
                 size_t (*operand_count)(const ConvBnParams&), Call* call) {
  ConvBnParams& params = call->params;
  if (!read_params(integers, numbers, &params) || arrays.operands() != operand_count(params))
    return ffi::Error::Internal("a call of fusedconvbn that it did not write");
  params.training = arrays.training();
  const int threads = static_cast<int>(std::max<int64_t>(pool.num_threads(), 1));
  DeviceInfo device;
  if (const Status status = detect_device(useful_threads(params, threads), &device); !status.ok())
    return invalid(status);
  const char* const kernel = std::getenv("FUSEDCONVBN_KERNEL");
  return invalid(plans->get(params, device, kernel == nullptr ? "" : kernel, &call->plan));
}

template <class Buffers>
ffi::Error run(const Plan& plan, const Buffers& buffers, ffi::ThreadPool* pool) {
  XlaThreads threads(pool, plan.device.threads);
  const host::WorkspacePool::Lease workspace(host::WorkspacePool::global(), plan.workspace_bytes);
  if (workspace.data() == nullptr)
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory: no " + std::to_string(plan.workspace_bytes) +
                                                              " bytes of workspace for " + plan.describe());
  return invalid(run_cpu(plan, buffers, workspace.data(), &threads));
}

ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results, Integers integers,
                   Numbers numbers) {
  static Plans* const plans = new Plans(plan_forward);
  const auto count = [](const ConvBnParams& p) -> size_t { return 7 + p.has_residual; };
  Arrays arrays(operands, results);
  Call call;
  if (ffi::Error error = begin(plans, pool, arrays, integers, numbers, count, &call); error.failure()) return error;
  const auto& [params, plan] = call;
  ForwardBuffers b;
  b.inputs = arrays.next_operand();
  b.filters = arrays.next_operand();
  b.gamma = arrays.next_operand();
  b.beta = arrays.next_operand();
  b.moving_mean = arrays.next_operand();
  b.moving_variance = arrays.next_operand();
  b.residual = arrays.next_operand_if(params.has_residual);
  b.output = arrays.next_result();
  b.new_moving_mean = arrays.next_result();
  b.new_moving_variance = arrays.next_result();
  b.batch_mean = arrays.next_result();
  b.inv_std = arrays.next_result();
  if (plan->saved != Saved::kNothing) {
    b.conv_out = arrays.next_result_if(conv_out_shape(plan->params, plan->saved));
    if (b.conv_out == nullptr)
      return ffi::Error::InvalidArgument(
          "FUSEDCONVBN_ISA, FUSEDCONVBN_KERNEL and FUSEDCONVBN_STRICT must be what they were when XLA compiled the "
          "program");
  }
  return run(*plan, b, &pool);
}

ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results, Integers integers,
                    Numbers numbers) {
  static Plans* const plans = new Plans(plan_backward);
  const auto count = [](const ConvBnParams& p) -> size_t { return 13 + needs_residual(p) + p.has_output; };
  Arrays arrays(operands, results);
  Call call;
  if (ffi::Error error = begin(plans, pool, arrays, integers, numbers, count, &call); error.failure()) return error;
  const auto& [params, plan] = call;
  BackwardBuffers b;
  b.output_gradient = arrays.next_operand();
  b.moving_mean_gradient = arrays.next_operand();
  b.moving_variance_gradient = arrays.next_operand();
  b.inputs = arrays.next_operand();
  b.filters = arrays.next_operand();
  b.gamma = arrays.next_operand();
  b.beta = arrays.next_operand();
  b.moving_mean = arrays.next_operand();
  b.moving_variance = arrays.next_operand();
  b.residual = arrays.next_operand_if(needs_residual(params));
  b.output = arrays.next_operand_if(params.has_output);
  b.batch_mean = arrays.next_operand();
  b.inv_std = arrays.next_operand();
  const void* const conv_out = arrays.next_operand();
  if (params.training && params.saved != Saved::kNothing) b.conv_out = conv_out;
  const bool nchw = params.data_format == DataFormat::kNCHW;
  const int64_t n = params.batch, h = params.in_height, w = params.in_width, c = params.in_channels;
  b.d_inputs = arrays.next_result_if(nchw ? std::vector<int64_t>{n, c, h, w} : std::vector<int64_t>{n, h, w, c});
  b.d_filters =
      arrays.next_result_if({params.filter_height, params.filter_width, params.group_in(), params.out_channels});
  b.d_gamma = arrays.next_result();
  b.d_beta = arrays.next_result();
  b.d_moving_mean = arrays.next_result();
  b.d_moving_variance = arrays.next_result();
  if (results.size() == 7) b.d_residual = arrays.next_result();
  return run(*plan, b, &pool);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<Integers>(kIntegers)
      .Attr<Numbers>(kNumbers);
}

XLA_FFI_DEFINE_HANDLER(kForwardHandler, forward, binding());
XLA_FFI_DEFINE_HANDLER(kBackwardHandler, backward, binding());

}  // namespace

// Fails where another copy of this library is loaded.
Status register_cpu_calls() {
  const XLA_FFI_Api* const api = ffi::GetXlaFfiApi();
  for (const auto& [name, handler] : {std::pair(kForward, kForwardHandler), std::pair(kBackward, kBackwardHandler)}) {
    XLA_FFI_Error* const error = ffi::Ffi::RegisterStaticHandler(api, name, "Host", handler);
    if (error == nullptr) continue;
    Status status = Status::error(ffi::internal::GetErrorMessage(api, error));
    ffi::internal::DestroyError(api, error);
    return status;
  }
  return Status{};
}

}  // namespace fusedconvbn::xla
