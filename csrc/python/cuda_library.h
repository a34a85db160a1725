// fusedconvbn._core.CudaLibrary: the entry points of cuda/api.h, opened at run time, on memory given by its address.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedconvbn::python {

void define_cuda_library(pybind11::module_* m);

}  // namespace fusedconvbn::python
