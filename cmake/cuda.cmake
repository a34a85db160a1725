# fusedconvbn/_cuda.so: the CUDA kernels, a library of their own that whoever runs a kernel on a GPU opens. And the same
# sources by the C++ compiler, for tests on machines without a GPU: cuda_host, built when asked for by name.

set(FUSEDCONVBN_CUDA AUTO CACHE STRING "Build the CUDA kernels: OFF, AUTO (if there is an nvcc) or FULL (all GPUs)")

add_library(cuda_host MODULE EXCLUDE_FROM_ALL cuda/host/kernels.cc cuda/host/fibers.cc)
target_compile_options(cuda_host PRIVATE -O1 -Wno-unknown-pragmas)  # -O3 takes twice as long
finish_module(cuda_host "fcb_cuda_*")

if(NOT FUSEDCONVBN_CUDA MATCHES "^(OFF|AUTO|FULL)$")
  message(FATAL_ERROR "FUSEDCONVBN_CUDA must be OFF, AUTO or FULL. Received: ${FUSEDCONVBN_CUDA}")
endif()
if(NOT FUSEDCONVBN_CUDA STREQUAL OFF)
  if(FUSEDCONVBN_CUDA STREQUAL FULL)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90)
  elseif(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES 80)  # Ampere, and as PTX what comes after it
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # there may be one by now
  endif()
  include(CheckLanguage)
  check_language(CUDA)
endif()
if(FUSEDCONVBN_CUDA STREQUAL OFF OR NOT CMAKE_CUDA_COMPILER)
  file(REMOVE "${FUSEDCONVBN_OUTPUT}/_cuda.so")  # an earlier build's
  if(FUSEDCONVBN_CUDA STREQUAL FULL)
    message(FATAL_ERROR "FUSEDCONVBN_CUDA=FULL, but there is no nvcc that works: see docs/building.md")
  elseif(FUSEDCONVBN_CUDA STREQUAL AUTO)
    message(NOTICE "There is no nvcc that works: the CUDA kernels are not built")
  endif()
  return()
endif()
enable_language(CUDA)

file(GLOB cuda_sources CONFIGURE_DEPENDS cuda/*.cu)
add_library(_cuda MODULE ${cuda_sources})
set_target_properties(_cuda PROPERTIES PREFIX "" CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden
                                       CUDA_RUNTIME_LIBRARY Static)
finish_module(_cuda "fcb_cuda_*")
