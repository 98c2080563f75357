# The module _cuda. Included where TILEWRIGHT_CUDA is ON or AUTO.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(cuda STREQUAL ON)
    message(FATAL_ERROR "TILEWRIGHT_CUDA=ON needs nvcc, which was not found: put it on PATH, or set CUDACXX to it")
  endif()
  message(STATUS "tilewright: no nvcc, so no CUDA kernels (TILEWRIGHT_CUDA=AUTO)")
  return()
endif()

execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
set(built_for)
foreach(arch ${TILEWRIGHT_CUDA_ARCHITECTURES})
  string(REGEX REPLACE "a$" "" plain "${arch}")  # nvcc lists no sm_90a, but compiles for it where it knows sm_90
  if("sm_${plain}" IN_LIST known)
    list(APPEND built_for ${arch})
  endif()
endforeach()
if(NOT built_for)
  message(FATAL_ERROR "TILEWRIGHT_CUDA_ARCHITECTURES: ${CMAKE_CUDA_COMPILER} knows none of "
    "${TILEWRIGHT_CUDA_ARCHITECTURES}, only ${known}")
endif()
message(STATUS "tilewright: CUDA kernels for ${built_for}")
list(TRANSFORM built_for APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)  # machine code alone
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(cuda_kernels OBJECT
  csrc/cuda/act_mul.cu
  csrc/cuda/attention.cu
  csrc/cuda/attention_backward.cu
  csrc/cuda/attention_decode.cu
  csrc/cuda/attention_forward.cu
  csrc/cuda/attention_grad_bias.cu
  csrc/cuda/attention_grad_keys.cu
  csrc/cuda/attention_grad_queries.cu
  csrc/cuda/attention_wgmma.cu
  csrc/cuda/gather.cu
  csrc/cuda/kv_quant.cu
  csrc/cuda/linear_gemm.cu
  csrc/cuda/linear_gemv.cu
  csrc/cuda/linear_int8.cu
  csrc/cuda/linear_wgmma.cu
  csrc/cuda/norm.cu
  csrc/cuda/rope.cu
  csrc/cuda/sample.cu
)
# The C++ compiler's warnings do not suit nvcc's generated code.
set_target_properties(cuda_kernels PROPERTIES COMPILE_OPTIONS "" CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
target_include_directories(cuda_kernels PRIVATE csrc)
if(90a IN_LIST built_for)
  set_source_files_properties(csrc/cuda/attention_wgmma.cu csrc/cuda/linear_wgmma.cu PROPERTIES COMPILE_DEFINITIONS TILEWRIGHT_CUDA_WGMMA)
endif()

pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda/bindings.cpp csrc/cuda/bindings_attention.cpp csrc/cuda/calls.cpp csrc/cuda/calls_attention.cpp csrc/cuda/calls_cache.cpp csrc/cuda/calls_linear.cpp csrc/torch_tensor.cpp
  $<TARGET_OBJECTS:cuda_kernels>)
target_include_directories(_cuda PRIVATE csrc ${CUDAToolkit_INCLUDE_DIRS})
string(REPLACE ";" "\\;" built_for_text "${built_for}")  # one definition, not a list of them
target_compile_definitions(_cuda PRIVATE "TILEWRIGHT_CUDA_BUILT_FOR=\"${built_for_text}\"")
target_link_libraries(_cuda PRIVATE CUDA::cudart_static Threads::Threads -static-libstdc++ -static-libgcc)
install(TARGETS _cuda DESTINATION tilewright)
