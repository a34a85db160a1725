# fusedconvbn/_core.<abi>.so: the kernels on NumPy arrays.

file(GLOB python_sources CONFIGURE_DEPENDS csrc/python/*.cc)
if(NOT python_sources)
  return()
endif()

execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
                OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "pybind11 is missing: ${Python_EXECUTABLE} -m pip install pybind11")
endif()
find_package(pybind11 CONFIG REQUIRED)

python_add_library(_core MODULE WITH_SOABI ${python_sources})
target_link_libraries(_core PRIVATE core pybind11::headers)
finish_module(_core PyInit__core)
