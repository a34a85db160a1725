// The kernels of FusedConvBN and FusedConvBNGrad: they check shapes, allocate, and call what a device has for them.
//
// A device is a class, one object to a kernel, made with it, with
//   type()                    TensorFlow's name of it
//   Tensors                   how it allocates
//   plan_forward, plan_backward
//   describe(context, call)   what of it and of the environment decides a plan
//   run(context, plan, filters, ForwardBuffers), run(context, plan, BackwardBuffers)
#pragma once

#include <memory>
#include <utility>

#include "attributes.h"
#include "prepared.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensors.h"

namespace fusedconvbn::tf {

// The attributes, read once, and what every call begins with.
template <class Device>
class ConvBnKernel : public tensorflow::OpKernel {
 public:
  ConvBnKernel(tensorflow::OpKernelConstruction* context, Planner planner) : OpKernel(context), device_(context) {
    Problem attributes;
    OP_REQUIRES_OK(context, read_attributes(context, &attributes));
    params_ = attributes.params;
    preparation_ = std::make_unique<Preparation>(std::move(attributes), planner);
  }

 protected:
  // Null after an error. `call`: what the tensors that both ops have do not tell.
  std::shared_ptr<const Prepared> prepare(tensorflow::OpKernelContext* context, Call call, Tensors* tensors) {
    call.inputs_shape = tensors->sizes(inputs_);
    call.filters_shape = tensors->sizes(filters_);
    call.training = tensors->flag(training_);
    tensors->check(Device::describe(context, &call));
    std::shared_ptr<const Prepared> prepared;
    if (tensors->status().ok()) tensors->check(preparation_->get(call, &prepared));
    return prepared;
  }

  const ConvBnParams& params() const { return params_; }  // without sizes
  const Device& device() const { return device_; }

  const Port inputs_ = input_port(*this, "inputs");
  const Port filters_ = input_port(*this, "filters");
  const Port gamma_ = input_port(*this, "gamma");
  const Port beta_ = input_port(*this, "beta");
  const Port moving_mean_ = input_port(*this, "moving_mean");
  const Port moving_variance_ = input_port(*this, "moving_variance");
  const Port residual_ = input_port(*this, "residual");
  const Port training_ = input_port(*this, "training");

 private:
  const Device device_;
  ConvBnParams params_;
  std::unique_ptr<Preparation> preparation_;
};

template <class Device>
class FusedConvBN : public ConvBnKernel<Device> {
 public:
  explicit FusedConvBN(tensorflow::OpKernelConstruction* context)
      : ConvBnKernel<Device>(context, Device::plan_forward) {
    ConvBnParams unused = this->params();
    OP_REQUIRES_OK(context, read_forward_attributes(context, &unused));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    typename Device::Tensors tensors(context);
    Call call;
    call.has_residual = tensors.find(this->residual_) != nullptr;
    const auto prepared = this->prepare(context, call, &tensors);
    OP_REQUIRES_OK(context, tensors.status());
    const ForwardBuffers buffers = gather(&tensors, prepared->plan, prepared->shapes);
    OP_REQUIRES_OK(context, tensors.status());
    OP_REQUIRES_OK(context, this->device().run(context, prepared->plan, *tensors.find(this->filters_), buffers));
  }

 private:
  ForwardBuffers gather(Tensors* t, const Plan& plan, const Shapes& shapes) const {
    ForwardBuffers b;
    b.inputs = t->input(this->inputs_, shapes.inputs);
    b.filters = t->input(this->filters_, shapes.filters);
    b.gamma = t->input(this->gamma_, shapes.channels);
    b.beta = t->input(this->beta_, shapes.channels);
    b.moving_mean = t->input(this->moving_mean_, shapes.channels);
    b.moving_variance = t->input(this->moving_variance_, shapes.channels);
    b.residual = t->input(this->residual_, shapes.output);
    b.output = plan.params.training ? t->output(output_, shapes.output)  // where z may lie meanwhile
                                    : t->output_over(this->residual_, output_, shapes.output);
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
};

template <class Device>
class FusedConvBNGrad : public ConvBnKernel<Device> {
 public:
  explicit FusedConvBNGrad(tensorflow::OpKernelConstruction* context)
      : ConvBnKernel<Device>(context, Device::plan_backward) {
    ConvBnParams params = this->params();
    OP_REQUIRES_OK(context, read_backward_attributes(context, &params, &wanted_));
    has_residual_ = params.has_residual;
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    typename Device::Tensors tensors(context);
    Call call;
    call.has_residual = has_residual_;
    call.has_output = tensors.find(output_) != nullptr;
    if (const tensorflow::Tensor* conv_out = tensors.find(conv_out_)) call.saved = saved_in(conv_out->shape());
    const auto prepared = this->prepare(context, call, &tensors);
    OP_REQUIRES_OK(context, tensors.status());
    BackwardBuffers buffers;
    gather_inputs(&tensors, prepared->plan.params, prepared->shapes, &buffers);
    gather_outputs(&tensors, prepared->shapes, &buffers);
    OP_REQUIRES_OK(context, tensors.status());
    OP_REQUIRES_OK(context, this->device().run(context, prepared->plan, buffers));
  }

 private:
  void gather_inputs(Tensors* t, const ConvBnParams& params, const Shapes& shapes, BackwardBuffers* b) const {
    b->output_gradient = t->input(output_gradient_, shapes.output);
    b->moving_mean_gradient = t->input(moving_mean_gradient_, shapes.channels);
    b->moving_variance_gradient = t->input(moving_variance_gradient_, shapes.channels);
    b->inputs = t->input(this->inputs_, shapes.inputs);
    b->filters = t->input(this->filters_, shapes.filters);
    b->gamma = t->input(this->gamma_, shapes.channels);
    b->beta = t->input(this->beta_, shapes.channels);
    b->moving_mean = t->input(this->moving_mean_, shapes.channels);
    b->moving_variance = t->input(this->moving_variance_, shapes.channels);
    b->residual = t->input(this->residual_, shapes.output);
    b->output = t->input(output_, shapes.output);
    b->batch_mean = t->input(batch_mean_, shapes.channels);
    b->inv_std = t->input(inv_std_, shapes.channels);
    if (params.training && params.saved != Saved::kNothing)
      b->conv_out = t->input(conv_out_, saved_shape(params, params.saved));
  }

  void gather_outputs(Tensors* t, const Shapes& shapes, BackwardBuffers* b) const {
    b->d_inputs = wanted_.inputs ? t->output(d_inputs_, shapes.inputs) : t->empty_output(d_inputs_);
    b->d_filters = wanted_.filters ? t->output(d_filters_, shapes.filters) : t->empty_output(d_filters_);
    b->d_gamma = t->output(d_gamma_, shapes.channels);
    b->d_beta = t->output(d_beta_, shapes.channels);
    b->d_moving_mean = t->output(d_moving_mean_, shapes.channels);
    b->d_moving_variance = t->output(d_moving_variance_, shapes.channels);
    if (wanted_.residual) b->d_residual = t->output(d_residual_, shapes.output);
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
  bool has_residual_ = false;
  Wanted wanted_;
};

template <class Kernel>
void register_kernel(const char* name, const char* device, tensorflow::DataType data) {
  const auto* definition = tensorflow::KernelDefBuilder(name)
                               .Device(device)
                               .HostMemory("training")
                               .TypeConstraint("T", data)
                               .TypeConstraint("U", data == tensorflow::DT_DOUBLE ? data : tensorflow::DT_FLOAT)
                               .Build();
  tensorflow::kernel_factory::OpKernelRegistrar(
      definition, name,
      [](tensorflow::OpKernelConstruction* context) -> tensorflow::OpKernel* { return new Kernel(context); });
}

// Not by REGISTER_KERNEL_BUILDER: with a second copy of this library in the process (two installations, a test), each
// kernel would be there twice, and TensorFlow would refuse to choose.
template <class Device>
bool register_kernels() {
  const tensorflow::KernelList all = tensorflow::GetRegisteredKernelsForOp("FusedConvBN");
  for (const auto& kernel : all.kernel())
    if (kernel.device_type() == Device::type()) return false;
  for (auto data : {tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE, tensorflow::DT_HALF, tensorflow::DT_BFLOAT16}) {
    register_kernel<FusedConvBN<Device>>("FusedConvBN", Device::type(), data);
    register_kernel<FusedConvBNGrad<Device>>("FusedConvBNGrad", Device::type(), data);
  }
  return true;
}

}  // namespace fusedconvbn::tf
