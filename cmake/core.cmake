# The kernels. Of csrc/cpu, files named *_avx2.cc and *_avx512.cc are compiled for that instruction set.

file(GLOB core_sources CONFIGURE_DEPENDS csrc/*.cc csrc/cpu/*.cc)
file(GLOB avx2_sources CONFIGURE_DEPENDS csrc/cpu/*_avx2.cc)
file(GLOB avx512_sources CONFIGURE_DEPENDS csrc/cpu/*_avx512.cc)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set_source_files_properties(${avx2_sources} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(
    ${avx512_sources} PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512vl;-mavx512dq;-mavx512bw;-mfma;-mf16c;-mprefer-vector-width=512")
else()
  list(REMOVE_ITEM core_sources ${avx2_sources} ${avx512_sources})
endif()

add_library(core STATIC ${core_sources})
target_include_directories(core PUBLIC csrc)
