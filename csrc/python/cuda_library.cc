#include "cuda_library.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../cuda/api.h"

namespace fusedconvbn::python {
namespace {

namespace py = pybind11;
using Address = uintptr_t;  // 0: null

// Stays open for as long as the process lives: kernels of it may be queued.
class CudaLibrary {
 public:
  explicit CudaLibrary(const std::string& path) : library_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw py::import_error(dlerror());
    decltype(&fcb_cuda_layout) layout = nullptr;
    find("fcb_cuda_layout", &layout);
    if (layout() != contract_layout()) throw py::import_error("the CUDA library is of another build: " + path);
    find("fcb_cuda_forward_workspace", &forward_workspace_);
    find("fcb_cuda_backward_workspace", &backward_workspace_);
    find("fcb_cuda_forward", &forward_);
    find("fcb_cuda_backward", &backward_);
  }

  size_t workspace_bytes(const ConvBnParams& params, bool backward) const {
    return (backward ? backward_workspace_ : forward_workspace_)(&params);
  }

  void forward(const ConvBnParams& params, const std::array<Address, 13>& buffers, Address workspace,
               Address stream) const {
    ForwardBuffers b;
    size_t i = 0;
    for (const void** from :
         {&b.inputs, &b.filters, &b.gamma, &b.beta, &b.moving_mean, &b.moving_variance, &b.residual})
      *from = at(buffers[i++]);
    for (void** to : {&b.output, &b.new_moving_mean, &b.new_moving_variance, &b.batch_mean, &b.inv_std, &b.conv_out})
      *to = at(buffers[i++]);
    raise_if(forward_(&params, &b, at(workspace), at(stream)));
  }

  void backward(const ConvBnParams& params, const std::array<Address, 21>& buffers, Address workspace,
                Address stream) const {
    BackwardBuffers b;
    size_t i = 0;
    for (const void** from :
         {&b.output_gradient, &b.moving_mean_gradient, &b.moving_variance_gradient, &b.inputs, &b.filters, &b.gamma,
          &b.beta, &b.moving_mean, &b.moving_variance, &b.residual, &b.output, &b.batch_mean, &b.inv_std, &b.conv_out})
      *from = at(buffers[i++]);
    for (void** to :
         {&b.d_inputs, &b.d_filters, &b.d_gamma, &b.d_beta, &b.d_moving_mean, &b.d_moving_variance, &b.d_residual})
      *to = at(buffers[i++]);
    raise_if(backward_(&params, &b, at(workspace), at(stream)));
  }

 private:
  static void* at(Address address) { return reinterpret_cast<void*>(address); }
  static void raise_if(const char* error) {
    if (error != nullptr) throw std::runtime_error(error);
  }

  template <class Function>
  void find(const char* name, Function** function) const {
    *function = reinterpret_cast<Function*>(dlsym(library_, name));
    if (*function == nullptr) throw py::import_error(std::string("the CUDA library has no ") + name);
  }

  void* const library_;
  decltype(&fcb_cuda_forward_workspace) forward_workspace_ = nullptr, backward_workspace_ = nullptr;
  decltype(&fcb_cuda_forward) forward_ = nullptr;
  decltype(&fcb_cuda_backward) backward_ = nullptr;
};

}  // namespace

void define_cuda_library(py::module_* m) {
  py::class_<CudaLibrary>(*m, "CudaLibrary")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def("workspace_bytes", &CudaLibrary::workspace_bytes, py::arg("params"), py::arg("backward"))
      // Addresses in the order of ForwardBuffers (without packed filters) and BackwardBuffers; 0: null.
      .def("forward", &CudaLibrary::forward, py::arg("params"), py::arg("buffers"), py::arg("workspace"),
           py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def("backward", &CudaLibrary::backward, py::arg("params"), py::arg("buffers"), py::arg("workspace"),
           py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace fusedconvbn::python
