// The CPU kernels of FusedConvBN and FusedConvBNGrad: they check shapes, allocate, and call the core.
#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/functional/function_ref.h"
#include "attributes.h"
#include "packed_filters.h"
#include "prepared.h"
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

TensorShape saved_shape(const ConvBnParams& params, Saved saved) {
  TensorShape shape;
  for (int64_t size : conv_out_shape(params, saved)) shape.AddDim(size);
  return shape;
}

// What forward put into this tensor: each kind has a rank of its own, or no elements.
Saved saved_in(const Tensor& conv_out) {
  if (conv_out.dims() == 2) return Saved::kMoments;
  if (conv_out.dims() == 1) return Saved::kBFloat16;
  return conv_out.NumElements() == 0 ? Saved::kNothing : Saved::kConv;
}

// The attributes, read once, and what every call begins with.
class ConvBnKernel : public OpKernel {
 public:
  ConvBnKernel(OpKernelConstruction* context, Planner planner) : OpKernel(context) {
    Problem attributes;
    OP_REQUIRES_OK(context, read_attributes(context, &attributes));
    params_ = attributes.params;
    preparation_ = std::make_unique<Preparation>(std::move(attributes), planner);
  }

 protected:
  // Null after an error. `call`: what the tensors that both ops have do not tell.
  std::shared_ptr<const Prepared> prepare(OpKernelContext* context, Call call, Tensors* tensors) {
    const char* kernel = std::getenv("FUSEDCONVBN_KERNEL");
    if (kernel) call.kernel = kernel;
    call.inputs_shape = tensors->sizes(inputs_);
    call.filters_shape = tensors->sizes(filters_);
    call.training = tensors->flag(training_);
    tensors->check(to_absl(detect_device(IntraOpThreads::of(context), &call.device)));
    std::shared_ptr<const Prepared> prepared;
    if (tensors->status().ok()) tensors->check(preparation_->get(call, &prepared));
    return prepared;
  }

  const ConvBnParams& params() const { return params_; }  // without sizes

  const Port inputs_ = input_port(*this, "inputs");
  const Port filters_ = input_port(*this, "filters");
  const Port gamma_ = input_port(*this, "gamma");
  const Port beta_ = input_port(*this, "beta");
  const Port moving_mean_ = input_port(*this, "moving_mean");
  const Port moving_variance_ = input_port(*this, "moving_variance");
  const Port residual_ = input_port(*this, "residual");
  const Port training_ = input_port(*this, "training");

 private:
  ConvBnParams params_;
  std::unique_ptr<Preparation> preparation_;
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
    OP_REQUIRES_OK(context, to_absl(PackedFilters::check_limit()));
  }

  void Compute(OpKernelContext* context) override {
    Tensors tensors(context);
    Call call;
    call.has_residual = tensors.find(residual_) != nullptr;
    const auto prepared = prepare(context, call, &tensors);
    OP_REQUIRES_OK(context, tensors.status());
    const Plan& plan = prepared->plan;
    ForwardBuffers buffers = gather(&tensors, plan, prepared->shapes);
    OP_REQUIRES_OK(context, tensors.status());
    const auto run_plan = [&](void* workspace, ParallelFor* threads) {
      const PackedFilters::Packed packed = packed_filters(*tensors.find(filters_), plan, workspace, threads);
      buffers.packed_filters = packed.get();
      return run_cpu(plan, buffers, workspace, threads);
    };
    OP_REQUIRES_OK(context, run(context, plan, run_plan));
  }

 private:
  // Of earlier calls; null if there are none.
  PackedFilters::Packed packed_filters(const Tensor& filters, const Plan& plan, void* workspace,
                                       ParallelFor* threads) const {
    if (!keep_filters_ || !PackedFilters::may_keep(filters)) return nullptr;
    if (plan.params.training) return PackedFilters::global()->forget(filters), nullptr;
    if (plan.packed_bytes == 0) return nullptr;
    return PackedFilters::global()->get(filters, plan, [&](void* packed) {
      return pack_filters(plan, filters.data(), packed, workspace, threads).ok();
    });
  }

  ForwardBuffers gather(Tensors* t, const Plan& plan, const Shapes& shapes) const {
    ForwardBuffers b;
    b.inputs = t->input(inputs_, shapes.inputs);
    b.filters = t->input(filters_, shapes.filters);
    b.gamma = t->input(gamma_, shapes.channels);
    b.beta = t->input(beta_, shapes.channels);
    b.moving_mean = t->input(moving_mean_, shapes.channels);
    b.moving_variance = t->input(moving_variance_, shapes.channels);
    b.residual = t->input(residual_, shapes.output);
    b.output = plan.params.training ? t->output(output_, shapes.output)  // where z may lie meanwhile
                                    : t->output_in_used_memory(residual_, output_, shapes.output);
    const auto statistic = [&](const Port& port) {
      return plan.params.training ? t->output(port, shapes.channels) : t->output_if_read(port, shapes.channels);
    };
    b.new_moving_mean = statistic(new_moving_mean_);
    b.new_moving_variance = statistic(new_moving_variance_);
    b.batch_mean = statistic(batch_mean_);
    b.inv_std = statistic(inv_std_);
    b.conv_out = plan.saved == Saved::kNothing ? t->empty_output(conv_out_)
                                               : t->output(conv_out_, saved_shape(plan.params, plan.saved));
    return b;
  }

  const Port output_ = output_port(*this, "output");
  const Port new_moving_mean_ = output_port(*this, "new_moving_mean");
  const Port new_moving_variance_ = output_port(*this, "new_moving_variance");
  const Port batch_mean_ = output_port(*this, "batch_mean");
  const Port inv_std_ = output_port(*this, "inv_std");
  const Port conv_out_ = output_port(*this, "conv_out");
  bool keep_filters_ = false;
};

class FusedConvBNGrad : public ConvBnKernel {
 public:
  explicit FusedConvBNGrad(OpKernelConstruction* context) : ConvBnKernel(context, plan_backward) {
    OP_REQUIRES_OK(context, context->GetAttr("has_residual", &has_residual_));
    OP_REQUIRES_OK(context, context->GetAttr("needs_inputs", &needs_inputs_));
    OP_REQUIRES_OK(context, context->GetAttr("needs_filters", &needs_filters_));
    OP_REQUIRES_OK(context, at_most_one(context, "num_residual_gradient", &residual_gradients_));
    ConvBnParams params = this->params();
    params.has_residual = has_residual_;
    OP_REQUIRES_OK(context, check_count(context, "num_residual", needs_residual(params), needs_residual(params)));
    OP_REQUIRES_OK(context,
                   check_count(context, "num_output", needs_output(params), derivative_from_output(params.activation)));
  }

  void Compute(OpKernelContext* context) override {
    Tensors tensors(context);
    Call call;
    call.has_residual = has_residual_;
    call.has_output = tensors.find(output_) != nullptr;
    if (const Tensor* conv_out = tensors.find(conv_out_)) call.saved = saved_in(*conv_out);
    const auto prepared = prepare(context, call, &tensors);
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
  static absl::Status check_count(OpKernelConstruction* context, const char* name, bool needed, bool allowed) {
    int count = 0;
    TF_RETURN_IF_ERROR(context->GetAttr(name, &count));
    if (count >= (needed ? 1 : 0) && count <= (allowed ? 1 : 0)) return absl::OkStatus();
    return invalid(absl::StrCat(name, " must be ", needed || !allowed ? absl::StrCat(needed ? 1 : 0) : "0 or 1",
                                " for this activation. Received: ", count));
  }

  void gather_inputs(Tensors* t, const ConvBnParams& params, const Shapes& shapes, BackwardBuffers* b) const {
    b->output_gradient = t->input(output_gradient_, shapes.output);
    b->moving_mean_gradient = t->input(moving_mean_gradient_, shapes.channels);
    b->moving_variance_gradient = t->input(moving_variance_gradient_, shapes.channels);
    b->inputs = t->input(inputs_, shapes.inputs);
    b->filters = t->input(filters_, shapes.filters);
    b->gamma = t->input(gamma_, shapes.channels);
    b->beta = t->input(beta_, shapes.channels);
    b->moving_mean = t->input(moving_mean_, shapes.channels);
    b->moving_variance = t->input(moving_variance_, shapes.channels);
    b->residual = t->input(residual_, shapes.output);
    b->output = t->input(output_, shapes.output);
    b->batch_mean = t->input(batch_mean_, shapes.channels);
    b->inv_std = t->input(inv_std_, shapes.channels);
    if (params.training && params.saved != Saved::kNothing)
      b->conv_out = t->input(conv_out_, saved_shape(params, params.saved));
  }

  void gather_outputs(Tensors* t, const Shapes& shapes, BackwardBuffers* b) const {
    b->d_inputs = needs_inputs_ ? t->output(d_inputs_, shapes.inputs) : t->empty_output(d_inputs_);
    b->d_filters = needs_filters_ ? t->output(d_filters_, shapes.filters) : t->empty_output(d_filters_);
    b->d_gamma = t->output(d_gamma_, shapes.channels);
    b->d_beta = t->output(d_beta_, shapes.channels);
    b->d_moving_mean = t->output(d_moving_mean_, shapes.channels);
    b->d_moving_variance = t->output(d_moving_variance_, shapes.channels);
    if (residual_gradients_ > 0) b->d_residual = t->output(d_residual_, shapes.output);
  }

  const Port output_gradient_ = input_port(*this, "output_gradient");
  const Port moving_mean_gradient_ = input_port(*this, "moving_mean_gradient");
  const Port moving_variance_gradient_ = input_port(*this, "moving_variance_gradient");
  const Port output_ = input_port(*this, "output");
  const Port batch_mean_ = input_port(*this, "batch_mean");
  const Port inv_std_ = input_port(*this, "inv_std");
  const Port conv_out_ = input_port(*this, "conv_out");
  const Port d_inputs_ = output_port(*this, "d_inputs");
  const Port d_filters_ = output_port(*this, "d_filters");
  const Port d_gamma_ = output_port(*this, "d_gamma");
  const Port d_beta_ = output_port(*this, "d_beta");
  const Port d_moving_mean_ = output_port(*this, "d_moving_mean");
  const Port d_moving_variance_ = output_port(*this, "d_moving_variance");
  const Port d_residual_ = output_port(*this, "d_residual");
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
