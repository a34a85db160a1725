# fusedconvbn/_ops.so: the TensorFlow ops, compiled and linked as the installed TensorFlow asks for.

set(tensorflow_version None)
file(GLOB tensorflow_sources CONFIGURE_DEPENDS csrc/tf/*.cc)
if(FUSEDCONVBN_TF STREQUAL OFF OR NOT tensorflow_sources)
  file(REMOVE "${FUSEDCONVBN_OUTPUT}/_ops.so" "${FUSEDCONVBN_OUTPUT}/_xla.so")  # an earlier build's
  return()
endif()

# Importing TensorFlow takes seconds, so its answer is kept until another one is installed.
set(ask "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/cmake/tensorflow_flags.py")
execute_process(COMMAND ${ask} key OUTPUT_VARIABLE key OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(key STREQUAL "" AND FUSEDCONVBN_TF STREQUAL ON)
  message(FATAL_ERROR "FUSEDCONVBN_TF=ON, but TensorFlow is not installed for ${Python_EXECUTABLE}")
elseif(key STREQUAL "")
  message(NOTICE "TensorFlow is not installed for ${Python_EXECUTABLE}: its ops are not built")
  file(REMOVE "${FUSEDCONVBN_OUTPUT}/_ops.so" "${FUSEDCONVBN_OUTPUT}/_xla.so")
  return()
endif()
if(NOT key STREQUAL "${FUSEDCONVBN_TF_KEY}")
  execute_process(COMMAND ${ask} flags OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
                  ERROR_VARIABLE log RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "TensorFlow is installed for ${Python_EXECUTABLE} but cannot be imported:\n${log}")
  endif()
  set(FUSEDCONVBN_TF_FLAGS "${flags}" CACHE INTERNAL "version, include folder, compile flags, link flags")
  set(FUSEDCONVBN_TF_KEY "${key}" CACHE INTERNAL "the installation that FUSEDCONVBN_TF_FLAGS are of")
endif()

list(GET FUSEDCONVBN_TF_FLAGS 0 version)
list(GET FUSEDCONVBN_TF_FLAGS 1 include)
list(GET FUSEDCONVBN_TF_FLAGS 2 compile_flags)
list(GET FUSEDCONVBN_TF_FLAGS 3 link_flags)
separate_arguments(compile_flags UNIX_COMMAND "${compile_flags}")
separate_arguments(link_flags UNIX_COMMAND "${link_flags}")
message(STATUS "TensorFlow ${version}: ${include}")
set(tensorflow_version "\"${version}\"")

add_library(_ops MODULE ${tensorflow_sources})
set_target_properties(_ops PROPERTIES PREFIX "")
target_include_directories(_ops SYSTEM PRIVATE "${include}")
target_compile_options(_ops PRIVATE ${compile_flags} "-ffile-prefix-map=${include}/=")
target_link_libraries(_ops PRIVATE core ${link_flags})
target_link_options(_ops PRIVATE -Wl,-z,defs)  # what TensorFlow lacks is an error here, not when it is loaded
finish_module(_ops "")

# fusedconvbn/_xla.so: the ops in programs that XLA compiles. A library of its own: TensorFlow promises nothing of what
# it uses, and where it does not load, the ops still do.
file(GLOB xla_sources CONFIGURE_DEPENDS csrc/xla/*.cc)
add_library(_xla MODULE ${xla_sources})
set_target_properties(_xla PROPERTIES PREFIX "")
target_include_directories(_xla SYSTEM PRIVATE "${include}" "${include}/external/highwayhash"
                           "${include}/external/farmhash_archive/src")
target_compile_options(_xla PRIVATE ${compile_flags} "-ffile-prefix-map=${include}/=")
target_link_libraries(_xla PRIVATE core ${link_flags})  # the rest is in libtensorflow_cc, which TensorFlow has loaded
finish_module(_xla fusedconvbn_xla_error)

# What tests run kernels for a GPU with; built when asked for by name.
foreach(harness kernel_harness xla_harness)
  add_library(${harness} MODULE EXCLUDE_FROM_ALL csrc/harness/${harness}.cc)
  target_include_directories(${harness} SYSTEM PRIVATE "${include}")
  target_compile_options(${harness} PRIVATE ${compile_flags} -O1)
  target_link_libraries(${harness} PRIVATE ${link_flags})
  finish_module(${harness} "harness_*")
endforeach()
