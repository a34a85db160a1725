// fusedconvbn._core: the contract of conv_bn.h for fusedconvbn/raw.py, which checks arrays and makes the results. Enums
// come as their numbers, null pointers as None. A Status becomes a ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../conv_bn.h"
#include "../cpu/dispatch.h"
#include "../shape.h"
#include "cuda_library.h"
#include "thread_pool.h"

namespace fusedconvbn::python {
namespace {

namespace py = pybind11;
using Array = std::optional<py::array>;

void raise_if(const Status& status) {
  if (!status.ok()) throw py::value_error(status.message);
}

ConvBnParams make_params(const std::array<int64_t, 4>& inputs_shape, const std::array<int64_t, 4>& filters_shape,
                         const std::array<int64_t, 2>& strides, const std::array<int64_t, 2>& dilations, int padding,
                         const std::array<int64_t, 4>& explicit_padding, int dtype, int data_format, int activation,
                         bool residual, bool training, bool unbiased_moving_variance, double epsilon, double momentum,
                         int algorithm, int save, int saved, bool has_output) {
  ConvBnParams p;
  p.dtype = static_cast<DType>(dtype);
  p.data_format = static_cast<DataFormat>(data_format);
  p.activation = static_cast<Activation>(activation);
  p.has_residual = residual;
  p.training = training;
  p.unbiased_moving_variance = unbiased_moving_variance;
  p.epsilon = epsilon;
  p.momentum = momentum;
  p.algorithm = static_cast<Algorithm>(algorithm);
  p.save = static_cast<Save>(save);
  p.saved = static_cast<Saved>(saved);
  p.has_output = has_output;
  raise_if(
      resolve({inputs_shape, filters_shape, strides, dilations, static_cast<Padding>(padding), explicit_padding}, &p));
  return p;
}

std::string isas_up_to(Isa best) {
  std::string names;
  for (Isa isa : kIsas)
    if (has_rows(best, isa)) names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  return names;
}

// What this machine offers, up to `isa`; empty: all of it.
DeviceInfo make_device(const std::string& isa, int threads) {
  DeviceInfo device;
  raise_if(detect_device(threads, &device));
  if (isa.empty()) return device;
  for (Isa candidate : kIsas) {
    if (isa != name_of(candidate) || !has_rows(device.isa, candidate)) continue;
    device.isa = candidate;
    return device;
  }
  throw py::value_error("`isa` must be one that this machine has and FUSEDCONVBN_ISA allows: " +
                        isas_up_to(device.isa) + ". Received: " + isa);
}

Plan make_plan(const ConvBnParams& params, bool backward, const std::string& isa, const std::string& kernel,
               int threads) {
  Plan plan;
  const DeviceInfo device = make_device(isa, threads);
  raise_if((backward ? plan_backward : plan_forward)(params, device, kernel, &plan));
  return plan;
}

const char* name_of(Saved saved) {
  switch (saved) {
    case Saved::kNothing: return "nothing";
    case Saved::kConv: return "conv";
    case Saved::kMoments: return "moments";
    case Saved::kBFloat16: return "bfloat16";
  }
  return "";
}

std::vector<std::string> kernel_names(const Plan& plan) {
  std::vector<std::string> names;
  for (const Kernel* kernel : plan.stages) names.emplace_back(kernel->name);
  return names;
}

py::list estimates(const Plan& plan) {
  py::list all;
  for (const Comparison& each : plan.comparisons()) {
    py::dict microseconds;
    for (const Estimate& estimate : each.estimates)
      microseconds[py::str(estimate.algorithm)] = estimate.nanoseconds / 1e3;
    all.append(py::make_tuple(each.stage, microseconds));
  }
  return all;
}

// What decides how pack_filters() lays filters out: row, shape, groups, dtype and, where a row has several ways, bytes.
py::tuple packed_form(const Plan& plan) {
  if (plan.stages.empty()) return py::tuple();  // for a GPU
  const ConvBnParams& p = plan.params;
  const auto shape = py::make_tuple(p.filter_height, p.filter_width, p.group_in(), p.out_channels);
  return py::make_tuple(plan.stages.at(0)->name, shape, p.groups, static_cast<int>(p.dtype), plan.packed_bytes);
}

// [(name, stage, isa, available)]
py::list kernels() {
  const DeviceInfo device = make_device("", 1);
  py::list rows;
  for (const KernelInfo& row : list_kernels())
    rows.append(py::make_tuple(row.name, row.stage, name_of(row.isa), has_rows(device.isa, row.isa)));
  return rows;
}

const void* read(const Array& array) { return array ? array->data() : nullptr; }
void* write(Array* array) { return *array ? (*array)->mutable_data() : nullptr; }

// The op's own arguments, which forward and backward both read.
template <class Buffers>
void read_arguments(const Array& inputs, const Array& filters, const Array& gamma, const Array& beta,
                    const Array& moving_mean, const Array& moving_variance, const Array& residual, Buffers* b) {
  b->inputs = read(inputs);
  b->filters = read(filters);
  b->gamma = read(gamma);
  b->beta = read(beta);
  b->moving_mean = read(moving_mean);
  b->moving_variance = read(moving_variance);
  b->residual = read(residual);
}

struct FreeAligned {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

// call(workspace, threads) without the GIL: it reads and writes arrays that the caller holds. A workspace that is null
// is allocated here.
template <class Call>
void run(const Plan& plan, void* workspace, Call call) {
  Status status;
  {
    const py::gil_scoped_release release;
    std::unique_ptr<char[], FreeAligned> own;
    if (workspace == nullptr) {
      own.reset(new (std::align_val_t{64}, std::nothrow) char[std::max<size_t>(plan.workspace_bytes, 1)]);
      if (own == nullptr) throw std::bad_alloc();
      workspace = own.get();
    }
    ThreadPool threads(plan.device.threads);
    status = call(workspace, &threads);
  }
  raise_if(status);
}

void pack(const Plan& plan, const Array& filters, Array packed, Array workspace) {
  const void* from = read(filters);
  void* to = write(&packed);
  run(plan, write(&workspace),
      [&](void* memory, ParallelFor* threads) { return pack_filters(plan, from, to, memory, threads); });
}

void forward(const Plan& plan, const Array& inputs, const Array& filters, const Array& gamma, const Array& beta,
             const Array& moving_mean, const Array& moving_variance, const Array& residual, const Array& packed_filters,
             Array output, Array new_moving_mean, Array new_moving_variance, Array batch_mean, Array inv_std,
             Array conv_out, Array workspace) {
  ForwardBuffers b;
  read_arguments(inputs, filters, gamma, beta, moving_mean, moving_variance, residual, &b);
  b.packed_filters = read(packed_filters);
  b.output = write(&output);
  b.new_moving_mean = write(&new_moving_mean);
  b.new_moving_variance = write(&new_moving_variance);
  b.batch_mean = write(&batch_mean);
  b.inv_std = write(&inv_std);
  b.conv_out = write(&conv_out);
  run(plan, write(&workspace), [&](void* memory, ParallelFor* threads) { return run_cpu(plan, b, memory, threads); });
}

void backward(const Plan& plan, const Array& output_gradient, const Array& moving_mean_gradient,
              const Array& moving_variance_gradient, const Array& inputs, const Array& filters, const Array& gamma,
              const Array& beta, const Array& moving_mean, const Array& moving_variance, const Array& residual,
              const Array& output, const Array& batch_mean, const Array& inv_std, const Array& conv_out, Array d_inputs,
              Array d_filters, Array d_gamma, Array d_beta, Array d_moving_mean, Array d_moving_variance,
              Array d_residual, Array workspace) {
  BackwardBuffers b;
  b.output_gradient = read(output_gradient);
  b.moving_mean_gradient = read(moving_mean_gradient);
  b.moving_variance_gradient = read(moving_variance_gradient);
  read_arguments(inputs, filters, gamma, beta, moving_mean, moving_variance, residual, &b);
  b.output = read(output);
  b.batch_mean = read(batch_mean);
  b.inv_std = read(inv_std);
  b.conv_out = read(conv_out);
  b.d_inputs = write(&d_inputs);
  b.d_filters = write(&d_filters);
  b.d_gamma = write(&d_gamma);
  b.d_beta = write(&d_beta);
  b.d_moving_mean = write(&d_moving_mean);
  b.d_moving_variance = write(&d_moving_variance);
  b.d_residual = write(&d_residual);
  run(plan, write(&workspace), [&](void* memory, ParallelFor* threads) { return run_cpu(plan, b, memory, threads); });
}

void define_plan(py::module_* m) {
  py::class_<ConvBnParams>(*m, "Params")
      .def(py::init(&make_params), py::kw_only(), py::arg("inputs_shape"), py::arg("filters_shape"), py::arg("strides"),
           py::arg("dilations"), py::arg("padding"), py::arg("explicit_padding"), py::arg("dtype"),
           py::arg("data_format"), py::arg("activation"), py::arg("residual"), py::arg("training"),
           py::arg("unbiased_moving_variance"), py::arg("epsilon"), py::arg("momentum"), py::arg("algorithm"),
           py::arg("save"), py::arg("saved"), py::arg("has_output"))
      .def_property_readonly("output_shape", &output_shape)
      .def_property_readonly(
          "conv_out_shape", [](const ConvBnParams& p) { return conv_out_shape(p, p.saved); },
          "Backward: the shape of what forward left.")
      .def_property_readonly("needs_output", &needs_output)
      .def_property_readonly("needs_residual", &needs_residual);
  py::class_<Plan>(*m, "Plan", "Which kernels run, in order, and the memory that they need beside their arguments.")
      .def(py::init(&make_plan), py::arg("params"), py::kw_only(), py::arg("backward"), py::arg("isa"),
           py::arg("kernel"), py::arg("threads"))
      .def_property_readonly("kernels", &kernel_names, "Names of the kernels, in the order of execution.")
      .def_readonly("gpu", &Plan::gpu, "The kernels of the CUDA library, in a word; empty: a plan for the CPU.")
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("packed_bytes", &Plan::packed_bytes)
      .def_property_readonly("packed_form", &packed_form)
      .def_property_readonly("useful_threads",
                             [](const Plan& plan) { return useful_threads(plan.params, plan.device.threads); })
      .def_property_readonly(
          "saved", [](const Plan& plan) { return name_of(plan.saved); },
          "Forward: what it leaves for backward: 'nothing', 'conv', 'moments' or 'bfloat16'.")
      .def_property_readonly(
          "conv_out_shape", [](const Plan& plan) { return conv_out_shape(plan.params, plan.saved); },
          "Forward: the shape of what it leaves; empty if that is nothing.")
      .def_property_readonly("estimates", &estimates,
                             "What was compared: stages with microseconds on one thread by algorithm.")
      .def("__str__", &Plan::explain)
      .def("__repr__", [](const Plan& plan) { return "<Plan: " + plan.describe() + ">"; });
}

PYBIND11_MODULE(_core, m) {
  define_plan(&m);
  define_cuda_library(&m);
  m.def("kernels", &kernels);
  // All arguments are arrays or None, positional: what is read, then what is written, in the order of ForwardBuffers
  // and BackwardBuffers; last a workspace. This and packed filters are aligned to 64 bytes.
  m.def("pack_filters", &pack);
  m.def("forward", &forward);
  m.def("backward", &backward);
}

}  // namespace
}  // namespace fusedconvbn::python
