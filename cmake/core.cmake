# The kernels. Of csrc/cpu, files named *_avx2.cc, *_avx512.cc and *_amx.cc are compiled for that instruction set.

file(GLOB core_sources CONFIGURE_DEPENDS csrc/*.cc csrc/cpu/*.cc)
file(GLOB avx2_sources CONFIGURE_DEPENDS csrc/cpu/*_avx2.cc)
file(GLOB avx512_sources CONFIGURE_DEPENDS csrc/cpu/*_avx512.cc)
file(GLOB amx_sources CONFIGURE_DEPENDS csrc/cpu/*_amx.cc)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set_source_files_properties(${avx2_sources} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-mprfchw")
  set(avx512_options "-mavx512f;-mavx512vl;-mavx512dq;-mavx512bw;-mfma;-mf16c;-mprefer-vector-width=512")
  set_source_files_properties(${avx512_sources} PROPERTIES COMPILE_OPTIONS "${avx512_options}")
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("-mavx512bf16" compiles_avx512_bf16)  # gcc 10, clang 9
  set_source_files_properties(csrc/cpu/isa_avx512_bf16.cc PROPERTIES COMPILE_OPTIONS "${avx512_options};-mavx512bf16")
  check_cxx_compiler_flag("-mamx-tile -mamx-bf16 -mavx512bf16" compiles_amx)  # gcc 11, clang 12
  set_source_files_properties(${amx_sources} PROPERTIES COMPILE_OPTIONS
                              "${avx512_options};-mavx512bf16;-mamx-tile;-mamx-bf16")
else()
  list(REMOVE_ITEM core_sources ${avx2_sources} ${avx512_sources})
endif()
if(NOT compiles_amx)
  list(REMOVE_ITEM core_sources ${amx_sources})
endif()
if(NOT compiles_avx512_bf16)
  list(REMOVE_ITEM core_sources ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/isa_avx512_bf16.cc)
endif()

add_library(core STATIC ${core_sources})
target_include_directories(core PUBLIC csrc)
if(NOT compiles_amx)
  target_compile_definitions(core PRIVATE FUSEDCONVBN_NO_AMX)
endif()
if(NOT compiles_avx512_bf16)
  target_compile_definitions(core PRIVATE FUSEDCONVBN_NO_AVX512_BF16)
endif()
