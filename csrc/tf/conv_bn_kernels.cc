// The CPU kernels of FusedConvBN and FusedConvBNGrad: they check shapes, allocate, and call the core.
#include <array>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "absl/functional/function_ref.h"
#include "attributes.h"
#include "packed_filters.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensors.h"
#include "thread_pool.h"
#include "workspace_pool.h"

namespace fusedconvbn::tf {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

struct Shapes {
  explicit Shapes(const Problem& problem)
      : inputs(problem.arguments.inputs_shape),
        filters(problem.arguments.filters_shape),
        output(output_shape(problem.params)),
        channels({problem.params.out_channels}) {}
  TensorShape inputs, filters, output, channels;
};

using Planner = Status (*)(const ConvBnParams&, const DeviceInfo&, const std::string&, Plan*);

// What is known of a call before it reads or writes any data.
struct Prepared {
  Shapes shapes;
  Plan plan;
};

class ConvBnKernel : public OpKernel {
 public:
  ConvBnKernel(OpKernelConstruction* context, Planner planner) : OpKernel(context), planner_(planner) {
    OP_REQUIRES_OK(context, read_attributes(context, &problem_));
  }

 protected:
  // Null after an error. Calls with the same shapes share the result of the last one.
  std::shared_ptr<const Prepared> prepare(OpKernelContext* context, bool has_residual, Tensors* tensors) {
    DeviceInfo device;
    tensors->check(to_absl(detect_device(IntraOpThreads::of(context), &device)));
    const char* kernel = std::getenv("FUSEDCONVBN_KERNEL");
    const Key key{
        tensors->sizes("inputs"), tensors->sizes("filters"), tensors->flag("training"), has_residual, device.isa,
        device.threads,           kernel ? kernel : ""};
    if (!tensors->status().ok()) return nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (last_ && key == last_key_) return last_;
    }
    const auto prepared = prepare(key, tensors);
    if (!prepared) return nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    last_key_ = key;
    return last_ = prepared;
  }

  const Problem& attributes() const { return problem_; }

 private:
  // inputs, filters, training, residual; instruction set, threads, forced kernel
  using Key = std::tuple<std::array<int64_t, 4>, std::array<int64_t, 4>, bool, bool, Isa, int, std::string>;

  std::shared_ptr<const Prepared> prepare(const Key& key, Tensors* tensors) const {
    Problem problem = problem_;
    DeviceInfo device;
    std::string kernel;
    std::tie(problem.arguments.inputs_shape, problem.arguments.filters_shape, problem.params.training,
             problem.params.has_residual, device.isa, device.threads, kernel) = key;
    tensors->check(to_absl(resolve(problem.arguments, &problem.params)));
    if (!tensors->status().ok()) return nullptr;
    device.threads = useful_threads(problem.params, device.threads);
    Plan plan;
    tensors->check(to_absl(planner_(problem.params, device, kernel, &plan)));
    return tensors->status().ok() ? std::make_shared<Prepared>(Prepared{Shapes(problem), plan}) : nullptr;
  }

  const Planner planner_;
  Problem problem_;
  std::mutex mutex_;
  Key last_key_;
  std::shared_ptr<const Prepared> last_;
};

using Run = absl::FunctionRef<Status(void* workspace, ParallelFor*)>;

absl::Status run(OpKernelContext* context, const Plan& plan, Run run_plan) {
  IntraOpThreads threads(context, plan.device.threads);
  WorkspacePool::Lease workspace(WorkspacePool::global(), plan.workspace_bytes);
  if (workspace.data() == nullptr)
    return absl::ResourceExhaustedError(
        absl::StrCat("out of memory: no ", plan.workspace_bytes, " bytes of workspace for ", plan.describe()));
  return to_absl(run_plan(workspace.data(), &threads));
}

// There is one residual at the most, though a list input could hold more.
absl::Status at_most_one(OpKernelConstruction* context, const char* name, int* count) {
  TF_RETURN_IF_ERROR(context->GetAttr(name, count));
  return *count <= 1 ? absl::OkStatus() : invalid(absl::StrCat(name, " must be 0 or 1. Received: ", *count));
}

class FusedConvBN : public ConvBnKernel {
 public:
  explicit FusedConvBN(OpKernelConstruction* context) : ConvBnKernel(context, plan_forward) {
    int residuals = 0;
    OP_REQUIRES_OK(context, at_most_one(context, "num_residual", &residuals));
    OP_REQUIRES_OK(context, context->GetAttr("keep_filters", &keep_filters_));
  }

  void Compute(OpKernelContext* context) override {
    Tensors tensors(context);
    const auto prepared = prepare(context, tensors.find("residual") != nullptr, &tensors);
    OP_REQUIRES_OK(context, tensors.status());
    const Plan& plan = prepared->plan;
    ForwardBuffers buffers = gather(&tensors, plan.params, prepared->shapes);
    OP_REQUIRES_OK(context, tensors.status());
    const auto run_plan = [&](void* workspace, ParallelFor* threads) {
      const PackedFilters::Packed packed = packed_filters(*tensors.find("filters"), plan, workspace, threads);
      buffers.packed_filters = packed.get();
      return run_cpu(plan, buffers, workspace, threads);
    };
    OP_REQUIRES_OK(context, run(context, plan, run_plan));
  }

 private:
  // Of earlier calls; null if there are none.
  PackedFilters::Packed packed_filters(const Tensor& filters, const Plan& plan, void* workspace,
                                       ParallelFor* threads) const {
    if (!keep_filters_ || plan.packed_bytes == 0) return nullptr;
    if (plan.params.training) return PackedFilters::global()->forget(filters), nullptr;
    if (!PackedFilters::may_keep(filters)) return nullptr;
    return PackedFilters::global()->get(filters, plan, [&](void* packed) {
      return pack_filters(plan, filters.data(), packed, workspace, threads).ok();
    });
  }

  static ForwardBuffers gather(Tensors* t, const ConvBnParams& params, const Shapes& shapes) {
    ForwardBuffers b;
    b.inputs = t->input("inputs", shapes.inputs);
    b.filters = t->input("filters", shapes.filters);
    b.gamma = t->input("gamma", shapes.channels);
    b.beta = t->input("beta", shapes.channels);
    b.moving_mean = t->input("moving_mean", shapes.channels);
    b.moving_variance = t->input("moving_variance", shapes.channels);
    b.residual = t->input("residual", shapes.output);
    b.output = t->output("output", shapes.output);
    b.new_moving_mean = t->output("new_moving_mean", shapes.channels);
    b.new_moving_variance = t->output("new_moving_variance", shapes.channels);
    b.batch_mean = t->output("batch_mean", shapes.channels);
    b.inv_std = t->output("inv_std", shapes.channels);
    b.conv_out = params.training ? t->output("conv_out", shapes.output) : t->empty_output("conv_out");
    return b;
  }

  bool keep_filters_ = false;
};

class FusedConvBNGrad : public ConvBnKernel {
 public:
  explicit FusedConvBNGrad(OpKernelConstruction* context) : ConvBnKernel(context, plan_backward) {
    OP_REQUIRES_OK(context, context->GetAttr("has_residual", &has_residual_));
    OP_REQUIRES_OK(context, context->GetAttr("needs_inputs", &needs_inputs_));
    OP_REQUIRES_OK(context, context->GetAttr("needs_filters", &needs_filters_));
    OP_REQUIRES_OK(context, at_most_one(context, "num_residual_gradient", &residual_gradients_));
    ConvBnParams params = attributes().params;
    params.has_residual = has_residual_;
    OP_REQUIRES_OK(context, check_count(context, "num_residual", needs_residual(params)));
    OP_REQUIRES_OK(context, check_count(context, "num_output", needs_output(params)));
  }

  void Compute(OpKernelContext* context) override {
    Tensors tensors(context);
    const auto prepared = prepare(context, has_residual_, &tensors);
    OP_REQUIRES_OK(context, tensors.status());
    const Plan& plan = prepared->plan;
    BackwardBuffers buffers;
    gather_inputs(&tensors, plan.params, prepared->shapes, &buffers);
    gather_outputs(&tensors, prepared->shapes, &buffers);
    OP_REQUIRES_OK(context, tensors.status());
    const auto run_plan = [&](void* workspace, ParallelFor* threads) {
      return run_cpu(plan, buffers, workspace, threads);
    };
    OP_REQUIRES_OK(context, run(context, plan, run_plan));
  }

 private:
  static absl::Status check_count(OpKernelConstruction* context, const char* name, bool needed) {
    int count = 0;
    TF_RETURN_IF_ERROR(context->GetAttr(name, &count));
    if (count == (needed ? 1 : 0)) return absl::OkStatus();
    return invalid(absl::StrCat(name, " must be ", needed ? 1 : 0, " for this activation. Received: ", count));
  }

  static void gather_inputs(Tensors* t, const ConvBnParams& params, const Shapes& shapes, BackwardBuffers* b) {
    b->output_gradient = t->input("output_gradient", shapes.output);
    b->moving_mean_gradient = t->input("moving_mean_gradient", shapes.channels);
    b->moving_variance_gradient = t->input("moving_variance_gradient", shapes.channels);
    b->inputs = t->input("inputs", shapes.inputs);
    b->filters = t->input("filters", shapes.filters);
    b->gamma = t->input("gamma", shapes.channels);
    b->beta = t->input("beta", shapes.channels);
    b->moving_mean = t->input("moving_mean", shapes.channels);
    b->moving_variance = t->input("moving_variance", shapes.channels);
    b->residual = t->input("residual", shapes.output);
    b->output = t->input("output", shapes.output);
    b->batch_mean = t->input("batch_mean", shapes.channels);
    b->inv_std = t->input("inv_std", shapes.channels);
    if (params.training) b->conv_out = t->input("conv_out", shapes.output);
  }

  void gather_outputs(Tensors* t, const Shapes& shapes, BackwardBuffers* b) const {
    b->d_inputs = needs_inputs_ ? t->output("d_inputs", shapes.inputs) : t->empty_output("d_inputs");
    b->d_filters = needs_filters_ ? t->output("d_filters", shapes.filters) : t->empty_output("d_filters");
    b->d_gamma = t->output("d_gamma", shapes.channels);
    b->d_beta = t->output("d_beta", shapes.channels);
    b->d_moving_mean = t->output("d_moving_mean", shapes.channels);
    b->d_moving_variance = t->output("d_moving_variance", shapes.channels);
    if (residual_gradients_ > 0) b->d_residual = t->output("d_residual", shapes.output);
  }

  bool has_residual_ = false, needs_inputs_ = true, needs_filters_ = true;
  int residual_gradients_ = 0;
};

template <class Kernel>
void register_kernel(const char* name, tensorflow::DataType data, tensorflow::DataType stat) {
  const auto* definition = tensorflow::KernelDefBuilder(name)
                               .Device(tensorflow::DEVICE_CPU)
                               .HostMemory("training")
                               .TypeConstraint("T", data)
                               .TypeConstraint("U", stat)
                               .Build();
  tensorflow::kernel_factory::OpKernelRegistrar(
      definition, name, [](OpKernelConstruction* context) -> OpKernel* { return new Kernel(context); });
}

// Not by REGISTER_KERNEL_BUILDER: with a second copy of this library in the process (two installations, a test), each
// kernel would be there twice, and TensorFlow would refuse to choose.
[[maybe_unused]] const bool registered = [] {
  if (tensorflow::GetRegisteredKernelsForOp("FusedConvBN").kernel_size() > 0) return false;
  for (auto data : {tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE, tensorflow::DT_HALF, tensorflow::DT_BFLOAT16}) {
    const auto stat = data == tensorflow::DT_DOUBLE ? data : tensorflow::DT_FLOAT;
    register_kernel<FusedConvBN>("FusedConvBN", data, stat);
    register_kernel<FusedConvBNGrad>("FusedConvBNGrad", data, stat);
  }
  return true;
}();

}  // namespace
}  // namespace fusedconvbn::tf
