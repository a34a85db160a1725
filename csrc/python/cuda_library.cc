#include "../cuda_library.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda_library.h"

namespace fusedconvbn::python {
namespace {

namespace py = pybind11;
using Address = uintptr_t;  // 0: null

void* at(Address address) { return reinterpret_cast<void*>(address); }

std::unique_ptr<CudaLibrary> open(const std::string& path) {
  std::unique_ptr<CudaLibrary> library;
  if (const Status opened = CudaLibrary::open(path, &library); !opened.ok())
    throw py::import_error(opened.message.c_str());
  return library;
}

Plan make_plan(const CudaLibrary& library, const ConvBnParams& params, bool backward) {
  Plan plan;
  if (const Status planned = library.plan(params, backward, &plan); !planned.ok())
    throw py::value_error(planned.message);
  return plan;
}

template <class Buffers>
void run(const CudaLibrary& library, const Plan& plan, const Buffers& buffers, Address workspace, Address stream) {
  const Status ran = library.run(plan, buffers, at(workspace), at(stream));
  if (!ran.ok()) throw std::runtime_error(ran.message);
}

void forward(const CudaLibrary& library, const Plan& plan, const std::array<Address, 13>& buffers, Address workspace,
             Address stream) {
  ForwardBuffers b;
  size_t i = 0;
  for (const void** from : {&b.inputs, &b.filters, &b.gamma, &b.beta, &b.moving_mean, &b.moving_variance, &b.residual})
    *from = at(buffers[i++]);
  for (void** to : {&b.output, &b.new_moving_mean, &b.new_moving_variance, &b.batch_mean, &b.inv_std, &b.conv_out})
    *to = at(buffers[i++]);
  run(library, plan, b, workspace, stream);
}

void backward(const CudaLibrary& library, const Plan& plan, const std::array<Address, 21>& buffers, Address workspace,
              Address stream) {
  BackwardBuffers b;
  size_t i = 0;
  for (const void** from :
       {&b.output_gradient, &b.moving_mean_gradient, &b.moving_variance_gradient, &b.inputs, &b.filters, &b.gamma,
        &b.beta, &b.moving_mean, &b.moving_variance, &b.residual, &b.output, &b.batch_mean, &b.inv_std, &b.conv_out})
    *from = at(buffers[i++]);
  for (void** to :
       {&b.d_inputs, &b.d_filters, &b.d_gamma, &b.d_beta, &b.d_moving_mean, &b.d_moving_variance, &b.d_residual})
    *to = at(buffers[i++]);
  run(library, plan, b, workspace, stream);
}

}  // namespace

void define_cuda_library(py::module_* m) {
  py::class_<CudaLibrary>(*m, "CudaLibrary")
      .def(py::init(&open), py::arg("path"))
      .def("plan", &make_plan, py::arg("params"), py::arg("backward"))
      // Addresses in the order of ForwardBuffers (without packed filters) and BackwardBuffers; 0: null.
      .def("forward", &forward, py::arg("plan"), py::arg("buffers"), py::arg("workspace"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>())
      .def("backward", &backward, py::arg("plan"), py::arg("buffers"), py::arg("workspace"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace fusedconvbn::python
