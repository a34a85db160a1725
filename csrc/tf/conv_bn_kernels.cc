// The CPU kernels of FusedConvBN and FusedConvBNGrad: they check shapes, allocate, and call the core.
#include <initializer_list>
#include <string>

#include "attributes.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "thread_pool.h"
#include "workspace_pool.h"

namespace fusedconvbn::tf {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// The op's tensors as the core's pointers, each checked by its name. The first error stays; after one, nothing that
// was handed out may be used.
class Tensors {
 public:
  explicit Tensors(OpKernelContext* context) : context_(context) {}

  const absl::Status& status() const { return status_; }
  void check(const absl::Status& status) { status_.Update(status); }

  // Null if the op has no such input.
  const Tensor* find(const char* name) {
    tensorflow::OpInputList list;
    check(context_->input_list(name, &list));
    return status_.ok() && list.size() > 0 ? &list[0] : nullptr;
  }

  const void* input(const char* name, const TensorShape& shape) {
    const Tensor* tensor = find(name);
    if (tensor == nullptr) return nullptr;
    if (tensor->shape() != shape)
      check(invalid(absl::StrCat(name, " must be of shape ", shape.DebugString(), ". Received: shape ",
                                 tensor->shape().DebugString())));
    return pointer(*tensor);
  }

  void* output(const char* name, const TensorShape& shape) {
    Tensor* tensor = nullptr;
    if (status_.ok()) check(context_->allocate_output(name, shape, &tensor));
    return tensor ? pointer(*tensor) : nullptr;
  }

  // An output that is there for nobody.
  void* empty_output(const char* name) { return output(name, TensorShape({0, 0, 0, 0})), nullptr; }

  bool flag(const char* name) {
    const Tensor* tensor = find(name);
    if (tensor == nullptr) return false;
    if (tensor->dims() == 0) return tensor->scalar<bool>()();
    check(invalid(absl::StrCat(name, " must be a scalar. Received: shape ", tensor->shape().DebugString())));
    return false;
  }

  std::array<int64_t, 4> sizes(const char* name) {
    std::array<int64_t, 4> result{};
    const Tensor* tensor = find(name);
    if (tensor != nullptr && tensor->dims() == 4)
      for (int i = 0; i < 4; ++i) result[i] = tensor->dim_size(i);
    else if (tensor != nullptr)
      check(
          invalid(absl::StrCat(name, " must be a tensor of rank 4. Received: shape ", tensor->shape().DebugString())));
    return result;
  }

 private:
  // A tensor without elements has no memory, but to the core null means "not there".
  static void* pointer(const Tensor& tensor) {
    alignas(64) static char nothing[64];
    return tensor.NumElements() > 0 ? tensor.data() : nothing;
  }

  OpKernelContext* context_;
  absl::Status status_;
};

TensorShape saved_shape(const ConvBnParams& params, Saved saved) {
  TensorShape shape;
  for (int64_t size : conv_out_shape(params, saved)) shape.AddDim(size);
  return shape;
}

// What forward put into this tensor: each kind has a rank of its own, or no elements.
Saved saved_in(const Tensor& conv_out) {
  if (conv_out.dims() == 2) return Saved::kMoments;
  return conv_out.NumElements() == 0 ? Saved::kNothing : Saved::kConv;
}

struct Shapes {
  explicit Shapes(const Problem& problem)
      : inputs(problem.arguments.inputs_shape),
        filters(problem.arguments.filters_shape),
        output(output_shape(problem.params)),
        channels({problem.params.out_channels}) {}
  TensorShape inputs, filters, output, channels;
};

class ConvBnKernel : public OpKernel {
 public:
  explicit ConvBnKernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, read_attributes(context, &problem_));
  }

 protected:
  // The problem that this call's tensors make of the attributes.
  Problem describe(Tensors* tensors, bool has_residual) const {
    Problem problem = problem_;
    problem.arguments.inputs_shape = tensors->sizes("inputs");
    problem.arguments.filters_shape = tensors->sizes("filters");
    problem.params.training = tensors->flag("training");
    problem.params.has_residual = has_residual;
    if (tensors->status().ok()) tensors->check(to_absl(resolve(problem.arguments, &problem.params)));
    return problem;
  }

  const Problem& attributes() const { return problem_; }

 private:
  Problem problem_;
};

using Planner = Status (*)(const ConvBnParams&, const DeviceInfo&, const std::string&, Plan*);

absl::Status make_plan(const IntraOpThreads& threads, Planner planner, const ConvBnParams& params, Plan* plan) {
  DeviceInfo device;
  TF_RETURN_IF_ERROR(to_absl(detect_device(threads.threads(), &device)));
  return to_absl(planner(params, device, "", plan));
}

template <class Buffers>
absl::Status run(const Plan& plan, const Buffers& buffers, IntraOpThreads* threads) {
  WorkspacePool::Lease workspace(WorkspacePool::global(), plan.workspace_bytes);
  if (workspace.data() == nullptr)
    return absl::ResourceExhaustedError(
        absl::StrCat("out of memory: no ", plan.workspace_bytes, " bytes of workspace for ", plan.describe()));
  return to_absl(run_cpu(plan, buffers, workspace.data(), threads));
}

// There is one residual at the most, though a list input could hold more.
absl::Status at_most_one(OpKernelConstruction* context, const char* name, int* count) {
  TF_RETURN_IF_ERROR(context->GetAttr(name, count));
  return *count <= 1 ? absl::OkStatus() : invalid(absl::StrCat(name, " must be 0 or 1. Received: ", *count));
}

class FusedConvBN : public ConvBnKernel {
 public:
  explicit FusedConvBN(OpKernelConstruction* context) : ConvBnKernel(context) {
    int residuals = 0;
    OP_REQUIRES_OK(context, at_most_one(context, "num_residual", &residuals));
  }

  void Compute(OpKernelContext* context) override {
    Tensors tensors(context);
    const Problem problem = describe(&tensors, tensors.find("residual") != nullptr);
    OP_REQUIRES_OK(context, tensors.status());
    IntraOpThreads threads(context);
    Plan plan;
    OP_REQUIRES_OK(context, make_plan(threads, plan_forward, problem.params, &plan));
    const ForwardBuffers buffers = gather(&tensors, plan, Shapes(problem));
    OP_REQUIRES_OK(context, tensors.status());
    OP_REQUIRES_OK(context, run(plan, buffers, &threads));
  }

 private:
  static ForwardBuffers gather(Tensors* t, const Plan& plan, const Shapes& shapes) {
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
    b.conv_out = plan.saved == Saved::kNothing ? t->empty_output("conv_out")
                                               : t->output("conv_out", saved_shape(plan.params, plan.saved));
    return b;
  }
};

class FusedConvBNGrad : public ConvBnKernel {
 public:
  explicit FusedConvBNGrad(OpKernelConstruction* context) : ConvBnKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("has_residual", &has_residual_));
    OP_REQUIRES_OK(context, context->GetAttr("needs_inputs", &needs_inputs_));
    OP_REQUIRES_OK(context, context->GetAttr("needs_filters", &needs_filters_));
    OP_REQUIRES_OK(context, at_most_one(context, "num_residual_gradient", &residual_gradients_));
    ConvBnParams params = attributes().params;
    params.has_residual = has_residual_;
    OP_REQUIRES_OK(context, check_count(context, "num_residual", needs_residual(params), needs_residual(params)));
    OP_REQUIRES_OK(context, check_count(context, "num_output", needs_output(params),
                                        derivative_from_output(params.activation)));
  }

  void Compute(OpKernelContext* context) override {
    Tensors tensors(context);
    Problem problem = describe(&tensors, has_residual_);
    OP_REQUIRES_OK(context, tensors.status());
    problem.params.saved = saved_in(*tensors.find("conv_out"));
    problem.params.has_output = tensors.find("output") != nullptr;
    BackwardBuffers buffers;
    gather_inputs(&tensors, problem.params, Shapes(problem), &buffers);
    gather_outputs(&tensors, Shapes(problem), &buffers);
    OP_REQUIRES_OK(context, tensors.status());
    IntraOpThreads threads(context);
    Plan plan;
    OP_REQUIRES_OK(context, make_plan(threads, plan_backward, problem.params, &plan));
    OP_REQUIRES_OK(context, run(plan, buffers, &threads));
  }

 private:
  static absl::Status check_count(OpKernelConstruction* context, const char* name, bool needed, bool allowed) {
    int count = 0;
    TF_RETURN_IF_ERROR(context->GetAttr(name, &count));
    if (count >= (needed ? 1 : 0) && count <= (allowed ? 1 : 0)) return absl::OkStatus();
    return invalid(absl::StrCat(name, " must be ", needed || !allowed ? absl::StrCat(needed ? 1 : 0) : "0 or 1",
                                " for this activation. Received: ", count));
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
    if (params.training && params.saved != Saved::kNothing)
      b->conv_out = t->input("conv_out", saved_shape(params, params.saved));
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
