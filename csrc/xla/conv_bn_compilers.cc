// What XLA compiles FusedConvBN and FusedConvBNGrad to: calls of our kernels, or XLA's own ops.
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cuda_library.h"
#include "../tf/attributes.h"
#include "call_sites.h"
#include "calls.h"
#include "lowering.h"
#include "tensorflow/compiler/tf2xla/shape_util.h"
#include "tensorflow/compiler/tf2xla/xla_compiler.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"

namespace fusedconvbn::xla {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::TensorShape;
using tensorflow::XlaOpKernelContext;
using tf::invalid;
using tf::to_absl;

enum class By { kCpuCalls, kCudaCalls, kOps };

// The attributes, read once, and what every compilation begins with.
class ConvBnCompiler : public tensorflow::XlaOpKernel {
 public:
  explicit ConvBnCompiler(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, tf::read_attributes(context, &attributes_));
  }

 protected:
  tf::Problem& attributes() { return attributes_; }

  // The problem of the inputs' shapes. A `training` that only run time tells counts as true: that needs all results.
  absl::Status resolve_problem(XlaOpKernelContext* context, ConvBnParams* params) const {
    ConvArguments arguments = attributes_.arguments;
    TF_RETURN_IF_ERROR(read_sizes(context, "inputs", &arguments.inputs_shape));
    TF_RETURN_IF_ERROR(read_sizes(context, "filters", &arguments.filters_shape));
    TF_RETURN_IF_ERROR(check_shape(context, "training", {}));
    *params = attributes_.params;
    ::xla::Literal value;
    params->training = !context->ConstantInput("training", &value).ok() || value.Get<bool>({});
    return to_absl(resolve(arguments, params));
  }

  // What computes the op: calls of our kernels; XLA's own ops on a GPU for which none were built. FUSEDCONVBN_XLA asks
  // for another one.
  static absl::Status choose(XlaOpKernelContext* context, By* by) {
    const auto device = context->compiler()->options().device_type.type_string();
    const bool on_cpu = device == tensorflow::DEVICE_CPU_XLA_JIT;
    *by = on_cpu ? By::kCpuCalls : CudaLibrary::is_there() ? By::kCudaCalls : By::kOps;
    const char* const asked = std::getenv("FUSEDCONVBN_XLA");
    if (asked == nullptr || *asked == '\0') return absl::OkStatus();
    if (std::string(asked) != "hlo" && std::string(asked) != "cuda")
      return invalid(absl::StrCat("FUSEDCONVBN_XLA must be hlo or cuda. Received: ", asked));
    *by = asked[0] == 'h' ? By::kOps : By::kCudaCalls;
    return absl::OkStatus();
  }

  // Without it, `training` is known now.
  static std::optional<::xla::XlaOp> training_switch(XlaOpKernelContext* context) {
    ::xla::Literal unused;
    if (context->ConstantInput("training", &unused).ok()) return std::nullopt;
    return context->Input("training");
  }

  // Of a list, which holds one tensor at the most.
  static std::optional<::xla::XlaOp> first_of(XlaOpKernelContext* context, const char* name) {
    int begin = 0, end = 0;
    if (!context->op_kernel().InputRange(name, &begin, &end).ok() || begin == end) return std::nullopt;
    return context->Input(begin);
  }

  static ::xla::XlaOp nothing(XlaOpKernelContext* context, int output) {
    return ::xla::Broadcast(::xla::Zero(context->builder(), context->output_xla_type(output)), {0, 0, 0, 0});
  }

  // Of those among the names that the op has.
  static absl::Status check_shapes(XlaOpKernelContext* context, std::initializer_list<const char*> names,
                                   const TensorShape& shape) {
    for (const char* name : names) TF_RETURN_IF_ERROR(check_shape(context, name, shape));
    return absl::OkStatus();
  }

  static absl::Status check_shape(XlaOpKernelContext* context, const char* name, const TensorShape& wanted) {
    int begin = 0, end = 0;  // it may be a list
    TF_RETURN_IF_ERROR(context->op_kernel().InputRange(name, &begin, &end));
    for (int i = begin; i < end; ++i) {
      TensorShape shape;
      TF_RETURN_IF_ERROR(input_shape(context, i, &shape));
      if (shape != wanted)
        return invalid(
            absl::StrCat(name, " must be of shape ", wanted.DebugString(), ". Received: shape ", shape.DebugString()));
    }
    return absl::OkStatus();
  }

  static absl::Status input_shape(XlaOpKernelContext* context, const char* name, TensorShape* shape) {
    int begin = 0, end = 0;
    TF_RETURN_IF_ERROR(context->op_kernel().InputRange(name, &begin, &end));
    return input_shape(context, begin, shape);
  }

  static absl::Status read_sizes(XlaOpKernelContext* context, const char* name, std::array<int64_t, 4>* sizes) {
    TensorShape shape;
    TF_RETURN_IF_ERROR(input_shape(context, name, &shape));
    if (shape.dims() != 4)
      return invalid(absl::StrCat(name, " must be a tensor of rank 4. Received: shape ", shape.DebugString()));
    for (int i = 0; i < 4; ++i) (*sizes)[i] = shape.dim_size(i);
    return absl::OkStatus();
  }

  // Sets the outputs to the results, of these shapes, of a call of one of our kernels with all inputs.
  static absl::Status call(XlaOpKernelContext* context, By by, bool backward, const ConvBnParams& params,
                           const std::vector<TensorShape>& results) {
    CallSite site;
    site.backward = backward;
    for (int i = 0; i < context->num_inputs(); ++i) {
      TensorShape shape;
      TF_RETURN_IF_ERROR(input_shape(context, i, &shape));
      site.operands.push_back(context->Input(i));
      site.operand_shapes.push_back(row_major(context->input_xla_type(i), shape));
    }
    for (int i = 0; i < context->num_outputs(); ++i)
      site.result_shapes.push_back(row_major(context->output_xla_type(i), results[i]));
    absl::StatusOr<std::vector<::xla::XlaOp>> made =
        by == By::kCpuCalls ? call_on_cpu(params, site) : call_on_gpu(params, site, training_switch(context));
    if (!made.ok()) return made.status();
    for (int i = 0; i < context->num_outputs(); ++i) context->SetOutput(i, (*made)[i]);
    return absl::OkStatus();
  }

 private:
  static absl::Status input_shape(XlaOpKernelContext* context, int index, TensorShape* shape) {
    const absl::StatusOr<::xla::Shape> found = context->InputXlaShape(index);
    if (!found.ok()) return found.status();
    if (!found->is_static())
      return absl::UnimplementedError(absl::StrCat("inputs whose sizes XLA learns at run time only. Received: ",
                                                   ::xla::ShapeUtil::HumanString(*found)));
    return tensorflow::XLAShapeToTensorShape(*found, shape);
  }

  static ::xla::Shape row_major(::xla::PrimitiveType type, const TensorShape& shape) {
    const auto sizes = shape.dim_sizes();
    return ::xla::ShapeUtil::MakeShapeWithDescendingLayout(type, absl::MakeConstSpan(sizes.data(), sizes.size()));
  }

  tf::Problem attributes_;
};

TensorShape vector_of(const ConvBnParams& params) { return TensorShape({params.out_channels}); }
TensorShape no_elements() { return TensorShape({0, 0, 0, 0}); }

class Forward : public ConvBnCompiler {
 public:
  explicit Forward(OpKernelConstruction* context) : ConvBnCompiler(context) {
    OP_REQUIRES_OK(context, tf::read_forward_attributes(context, &attributes().params));
  }

  void Compile(XlaOpKernelContext* context) override {
    ConvBnParams params;
    OP_REQUIRES_OK(context, resolve_problem(context, &params));
    const TensorShape channels = vector_of(params), output(output_shape(params));
    OP_REQUIRES_OK(context, check_shapes(context, {"gamma", "beta", "moving_mean", "moving_variance"}, channels));
    OP_REQUIRES_OK(context, check_shapes(context, {"residual"}, output));
    By by;
    OP_REQUIRES_OK(context, choose(context, &by));
    if (by == By::kOps) return lower(context, params);
    TensorShape conv_out = no_elements();
    OP_REQUIRES_OK(context, plan_conv_out(params, by, &conv_out));
    OP_REQUIRES_OK(context,
                   call(context, by, false, params, {output, channels, channels, channels, channels, conv_out}));
  }

 private:
  // z is saved wherever the user lets the op save it: XLA drops what the gradient does not read.
  static void lower(XlaOpKernelContext* context, const ConvBnParams& params) {
    ForwardOps ops;
    ops.inputs = context->Input("inputs");
    ops.filters = context->Input("filters");
    ops.gamma = context->Input("gamma");
    ops.beta = context->Input("beta");
    ops.moving_mean = context->Input("moving_mean");
    ops.moving_variance = context->Input("moving_variance");
    ops.residual = first_of(context, "residual");
    ops.training = training_switch(context);
    std::vector<::xla::XlaOp> results = lower_forward(params, ops);
    if (asked_for(params) != Saved::kConv) results[5] = nothing(context, 5);
    for (int i = 0; i < context->num_outputs(); ++i) context->SetOutput(i, results[i]);
  }

  // Of what the plan saves, which does not depend on the number of threads.
  static absl::Status plan_conv_out(const ConvBnParams& params, By by, TensorShape* shape) {
    Plan plan;
    TF_RETURN_IF_ERROR(
        to_absl(by == By::kCpuCalls ? plan_on_cpu(params, &plan) : plan_cuda_call(params, false, &plan)));
    if (plan.saved != Saved::kNothing) *shape = tf::saved_shape(plan.params, plan.saved);
    return absl::OkStatus();
  }

  static Status plan_on_cpu(const ConvBnParams& params, Plan* plan) {
    DeviceInfo device;
    if (const Status status = detect_device(1, &device); !status.ok()) return status;
    const char* const kernel = std::getenv("FUSEDCONVBN_KERNEL");
    return plan_forward(params, device, kernel == nullptr ? "" : kernel, plan);
  }
};

class Backward : public ConvBnCompiler {
 public:
  explicit Backward(OpKernelConstruction* context) : ConvBnCompiler(context) {
    OP_REQUIRES_OK(context, tf::read_backward_attributes(context, &attributes().params, &wanted_));
  }

  void Compile(XlaOpKernelContext* context) override {
    ConvBnParams params;
    OP_REQUIRES_OK(context, resolve_problem(context, &params));
    TensorShape inputs, filters, conv_out;
    OP_REQUIRES_OK(context, input_shape(context, "inputs", &inputs));
    OP_REQUIRES_OK(context, input_shape(context, "filters", &filters));
    OP_REQUIRES_OK(context, input_shape(context, "conv_out", &conv_out));
    params.saved = tf::saved_in(conv_out);
    const TensorShape channels = vector_of(params), output(output_shape(params));
    OP_REQUIRES_OK(context, check_shapes(context,
                                         {"moving_mean_gradient", "moving_variance_gradient", "gamma", "beta",
                                          "moving_mean", "moving_variance", "batch_mean", "inv_std"},
                                         channels));
    OP_REQUIRES_OK(context, check_shapes(context, {"output_gradient", "residual", "output"}, output));
    By by;
    OP_REQUIRES_OK(context, choose(context, &by));
    if (by == By::kOps) return lower(context, params);
    std::vector<TensorShape> results{wanted_.inputs ? inputs : no_elements(),
                                     wanted_.filters ? filters : no_elements(),
                                     channels,
                                     channels,
                                     channels,
                                     channels};
    if (wanted_.residual) results.push_back(output);
    OP_REQUIRES_OK(context, call(context, by, true, params, results));
  }

 private:
  void lower(XlaOpKernelContext* context, const ConvBnParams& params) const {
    BackwardOps ops;
    ops.output_gradient = context->Input("output_gradient");
    ops.moving_mean_gradient = context->Input("moving_mean_gradient");
    ops.moving_variance_gradient = context->Input("moving_variance_gradient");
    ops.inputs = context->Input("inputs");
    ops.filters = context->Input("filters");
    ops.gamma = context->Input("gamma");
    ops.beta = context->Input("beta");
    ops.batch_mean = context->Input("batch_mean");
    ops.inv_std = context->Input("inv_std");
    ops.residual = first_of(context, "residual");
    ops.output = first_of(context, "output");
    ops.training = training_switch(context);
    if (params.saved == Saved::kConv) ops.z = context->Input("conv_out");
    std::vector<::xla::XlaOp> results = lower_backward(params, ops);
    if (!wanted_.inputs) results[0] = nothing(context, 0);
    if (!wanted_.filters) results[1] = nothing(context, 1);
    for (int i = 0; i < context->num_outputs(); ++i) context->SetOutput(i, results[i]);
  }

  tf::Wanted wanted_;
};

// As register_kernels() of ../tf/conv_bn_kernels.h. Not by REGISTER_XLA_OP, which does nothing once TensorFlow has
// made its devices.
template <class Compiler>
void register_compiler(const char* name, const char* device) {
  for (auto data : {tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE, tensorflow::DT_HALF, tensorflow::DT_BFLOAT16}) {
    const auto* definition = tensorflow::KernelDefBuilder(name)
                                 .Device(device)
                                 .TypeConstraint("T", data)
                                 .TypeConstraint("U", data == tensorflow::DT_DOUBLE ? data : tensorflow::DT_FLOAT)
                                 .Build();
    tensorflow::kernel_factory::OpKernelRegistrar(
        definition, name, [](OpKernelConstruction* context) -> tensorflow::OpKernel* { return new Compiler(context); });
  }
}

bool another_copy_compiles() {
  const tensorflow::KernelList all = tensorflow::GetRegisteredKernelsForOp("FusedConvBN");
  for (const auto& kernel : all.kernel())
    if (kernel.device_type() == tensorflow::DEVICE_CPU_XLA_JIT) return true;
  return false;
}

// When the library is loaded. XLA may refuse the handlers; then there is nothing to compile.
const Status registered = [] {
  if (another_copy_compiles()) return Status{};
  for (const Status& status : {register_cpu_calls(), register_cuda_calls()})
    if (!status.ok()) return status;
  for (const char* device : {tensorflow::DEVICE_CPU_XLA_JIT, tensorflow::DEVICE_GPU_XLA_JIT}) {
    register_compiler<Forward>("FusedConvBN", device);
    register_compiler<Backward>("FusedConvBNGrad", device);
  }
  return Status{};
}();

}  // namespace
}  // namespace fusedconvbn::xla

// Why XLA cannot compile the ops; empty if it can.
extern "C" __attribute__((visibility("default"))) const char* fusedconvbn_xla_error() {
  return fusedconvbn::xla::registered.message.c_str();
}
