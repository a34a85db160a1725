# How everything is compiled and linked.

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_SKIP_RPATH ON)  # TensorFlow's library is loaded before ours: no path of this machine in the binaries

# No -ffast-math: NaN and infinity must come out as they go in. No -march: kernels for newer instruction sets are
# files of their own (core.cmake), chosen at run time. Vector types are passed between inlined functions only: no ABI.
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wno-psabi;-fno-math-errno;-ffunction-sections>"
                    "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=>")

if(FUSEDCONVBN_SANITIZE)
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${FUSEDCONVBN_SANITIZE};-fno-sanitize-recover=all>"
                      "$<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer;-g;-O1>")  # -O3 takes minutes a file
  add_link_options("-fsanitize=${FUSEDCONVBN_SANITIZE}")
endif()

# A module that exports nothing but what `exports` names, stripped.
function(finish_module target exports)
  set(script "${CMAKE_BINARY_DIR}/${target}.version")
  if(exports)
    file(CONFIGURE OUTPUT "${script}" CONTENT "{ global: ${exports}; local: *; };\n")
  else()
    file(CONFIGURE OUTPUT "${script}" CONTENT "{ local: *; };\n")
  endif()
  target_link_options(${target} PRIVATE "-Wl,--version-script=${script}" -Wl,--gc-sections)
  if(NOT FUSEDCONVBN_SANITIZE)
    target_link_options(${target} PRIVATE -s)
  endif()
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${FUSEDCONVBN_OUTPUT}")
endfunction()
