# LibTorch as the PyPI wheel carries it: target torch::cpu (libtorch_cpu and libc10), and with ROTUNDA_CUDA torch::cuda.
# The wheel's own TorchConfig.cmake insists on a CUDA toolkit, which a CPU build does not have.
#
# Looks in ROTUNDA_TORCH_DIR, else in the project's .venv.

set(ROTUNDA_TORCH_DIR "" CACHE PATH "The torch folder of an installed wheel (.../site-packages/torch)")
set(_torch_dir "${ROTUNDA_TORCH_DIR}")
if(NOT _torch_dir)
  file(GLOB _torch_candidates "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch")
  if(_torch_candidates)
    list(GET _torch_candidates 0 _torch_dir)
  endif()
endif()

set(LibTorch_VERSION "")
if(_torch_dir AND EXISTS "${_torch_dir}/version.py")
  file(STRINGS "${_torch_dir}/version.py" _torch_version REGEX "^__version__")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" LibTorch_VERSION "${_torch_version}")
endif()

find_library(LibTorch_CPU_LIBRARY torch_cpu PATHS "${_torch_dir}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_C10_LIBRARY c10 PATHS "${_torch_dir}/lib" NO_DEFAULT_PATH)
find_file(LibTorch_GOMP_LIBRARY libgomp.so.1 PATHS "${_torch_dir}/lib" NO_DEFAULT_PATH)
find_path(LibTorch_INCLUDE_DIR ATen/core/TensorBody.h PATHS "${_torch_dir}/include" NO_DEFAULT_PATH)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_GOMP_LIBRARY LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "run `make setup` first, or set ROTUNDA_TORCH_DIR")

if(LibTorch_FOUND AND NOT TARGET torch::cpu)
  # The wheel's include folder also carries fmt and protobuf, in versions other than the system's: on the include path they
  # would stand in front of those that spdlog and SentencePiece were built with. So: a folder of links to the rest.
  set(_torch_include_dir "${CMAKE_BINARY_DIR}/libtorch-include")
  file(REMOVE_RECURSE "${_torch_include_dir}")
  file(MAKE_DIRECTORY "${_torch_include_dir}")
  file(GLOB _torch_headers RELATIVE "${LibTorch_INCLUDE_DIR}" "${LibTorch_INCLUDE_DIR}/*")
  list(REMOVE_ITEM _torch_headers fmt google)
  foreach(_entry IN LISTS _torch_headers)
    file(CREATE_LINK "${LibTorch_INCLUDE_DIR}/${_entry}" "${_torch_include_dir}/${_entry}" SYMBOLIC)
  endforeach()
  add_library(torch::c10 SHARED IMPORTED)
  set_target_properties(torch::c10 PROPERTIES IMPORTED_LOCATION "${LibTorch_C10_LIBRARY}")
  target_include_directories(torch::c10 SYSTEM INTERFACE "${_torch_include_dir}")
  add_library(torch::cpu SHARED IMPORTED)
  set_target_properties(torch::cpu PROPERTIES IMPORTED_LOCATION "${LibTorch_CPU_LIBRARY}")
  target_include_directories(torch::cpu SYSTEM INTERFACE
    "${_torch_include_dir}" "${_torch_include_dir}/torch/csrc/api/include")
  # at::parallel_for is a header: it runs on threads only in sources compiled with OpenMP. The pool is that of the wheel's own
  # libgomp, named here as a file, since a second libgomp beside it would be a second pool. (Clang's OpenMP is another
  # library; clang builds the fuzzers alone, which may be serial.)
  target_compile_options(torch::cpu INTERFACE $<$<CXX_COMPILER_ID:GNU>:-fopenmp>)
  target_link_libraries(torch::cpu INTERFACE torch::c10 Threads::Threads
    $<$<CXX_COMPILER_ID:GNU>:${LibTorch_GOMP_LIBRARY}>)
endif()
if(LibTorch_FOUND AND ROTUNDA_CUDA AND NOT TARGET torch::cuda)
  add_library(torch::cuda INTERFACE IMPORTED)
  # By name, since nothing refers to libtorch_cuda by symbol: it registers its kernels when it is loaded. What it needs in turn
  # (cuBLAS, cuDNN, NCCL, ...) are wheels of their own, found where they lie at run time and not needed to link.
  target_link_libraries(torch::cuda INTERFACE torch::cpu CUDA::cudart
    -Wl,--no-as-needed "${_torch_dir}/lib/libtorch_cuda.so" -Wl,--as-needed "${_torch_dir}/lib/libc10_cuda.so"
    -Wl,--allow-shlib-undefined)
endif()
# Where programs find the wheel's libraries at run time. The CUDA runtime is a wheel beside it, newer than many a toolkit's; what LibTorch's
# own libraries need they find by themselves.
get_filename_component(ROTUNDA_TORCH_RPATH "${LibTorch_CPU_LIBRARY}" DIRECTORY)
get_filename_component(_torch_site_dir "${_torch_dir}" DIRECTORY)
list(APPEND ROTUNDA_TORCH_RPATH "${_torch_site_dir}/nvidia/cu13/lib")
mark_as_advanced(LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY LibTorch_GOMP_LIBRARY LibTorch_INCLUDE_DIR)
