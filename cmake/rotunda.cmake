# How this project declares its targets: one library per room, tests and benches by name.

set(ROTUNDA_WARNINGS -Wall -Wextra -Werror)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC 12 and 13 warn without reason about "text" + std::string (GCC bug 105651).
  list(APPEND ROTUNDA_WARNINGS -Wno-restrict -Wno-stringop-overflow)
endif()

function(_rotunda_configure target)
  target_compile_options(${target} PRIVATE ${ROTUNDA_WARNINGS})
  target_include_directories(${target} PUBLIC "${PROJECT_SOURCE_DIR}/src")
  if(ROTUNDA_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${ROTUNDA_SANITIZE} -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${ROTUNDA_SANITIZE})
  endif()
  if(ROTUNDA_BUILD_FUZZERS)
    target_compile_options(${target} PRIVATE -fsanitize=fuzzer-no-link)
  endif()
endfunction()

# rotunda_add_library(<room> SOURCES <files...> [PUBLIC <targets...>] [PRIVATE <targets...>] [TORCH])
# Makes rotunda_<room> (alias rotunda::<room>). With TORCH it links torch::cpu and shares the torch precompiled header.
function(rotunda_add_library room)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(rotunda_${room} STATIC ${ARG_SOURCES})
  add_library(rotunda::${room} ALIAS rotunda_${room})
  _rotunda_configure(rotunda_${room})
  target_link_libraries(rotunda_${room} PUBLIC ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
  if(ARG_TORCH)
    target_link_libraries(rotunda_${room} PUBLIC torch::cpu)
    _rotunda_use_torch_pch(rotunda_${room})
  endif()
endfunction()

# rotunda_add_cuda_library(<room> SOURCES <files...> [PUBLIC <targets...>])
# Kernels of a room for GPUs, torch-free: rotunda_<room>.
function(rotunda_add_cuda_library room)
  if(NOT ROTUNDA_CUDA)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC" ${ARGN})
  add_library(rotunda_${room} STATIC ${ARG_SOURCES})
  add_library(rotunda::${room} ALIAS rotunda_${room})
  target_include_directories(rotunda_${room} PUBLIC "${PROJECT_SOURCE_DIR}/src")
  # Line numbers for profilers and compute-sanitizer cost nothing at run time.
  target_compile_options(rotunda_${room} PRIVATE -lineinfo --expt-relaxed-constexpr -Werror=all-warnings -Xcompiler=-Wall,-Wextra)
  target_link_libraries(rotunda_${room} PUBLIC ${ARG_PUBLIC} CUDA::cudart)
  rotunda_add_to_cuda_half(rotunda_${room})
endfunction()

# Target cuda_half builds everything that needs the CUDA toolkit.
function(rotunda_add_to_cuda_half target)
  if(NOT TARGET cuda_half)
    add_custom_target(cuda_half)
  endif()
  add_dependencies(cuda_half ${target})
endfunction()

# ATen's headers cost seconds per source; one precompiled header per build pays them once.
function(_rotunda_use_torch_pch target)
  if(NOT TARGET rotunda_torch_pch)
    add_library(rotunda_torch_pch OBJECT "${PROJECT_SOURCE_DIR}/cmake/torch_pch.cpp")
    _rotunda_configure(rotunda_torch_pch)
    target_link_libraries(rotunda_torch_pch PUBLIC torch::cpu)
    target_compile_options(rotunda_torch_pch PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fpch-preprocess>)
    target_precompile_headers(rotunda_torch_pch PRIVATE "${PROJECT_SOURCE_DIR}/cmake/torch_pch.h")
  endif()
  # CMake compiles an executable with -fPIE, and the header was made with -fPIC: they must agree.
  get_target_property(type ${target} TYPE)
  if(type STREQUAL EXECUTABLE)
    set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
    target_compile_options(${target} PRIVATE -fPIC)
  endif()
  target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fpch-preprocess>)
  target_precompile_headers(${target} REUSE_FROM rotunda_torch_pch)
endfunction()

# rotunda_add_test(<name> SOURCES <files...> LINK <targets...> [LABELS <labels...>] [TORCH] [TIMEOUT <seconds>])
# Every test carries the label `cpu` unless it says otherwise. A *_test.cpp that no call lists fails the configure
# step (see rotunda_check_all_tests_listed).
function(rotunda_add_test name)
  if(NOT ROTUNDA_BUILD_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "TORCH" "TIMEOUT" "SOURCES;LINK;LABELS" ${ARGN})
  if(NOT ARG_LABELS)
    set(ARG_LABELS cpu)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  _rotunda_configure(${name})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/tests")
  target_compile_definitions(${name} PRIVATE
    ROTUNDA_SOURCE_DIR="${PROJECT_SOURCE_DIR}" ROTUNDA_TEST_DATA_DIR="${PROJECT_SOURCE_DIR}/tests/data")
  target_link_libraries(${name} PRIVATE ${ARG_LINK} GTest::gmock GTest::gtest GTest::gtest_main)
  if(ARG_TORCH)
    _rotunda_use_torch_pch(${name})
  endif()
  add_test(NAME ${name} COMMAND ${name})
  # ctest runs several tests at once and their tensors are tiny: more threads each would only wait for one another. What is
  # about threads calls at::set_num_threads itself.
  set(environment OMP_NUM_THREADS=1)
  if(ROTUNDA_SANITIZE)
    # LeakSanitizer stays on, without suppressions: LibTorch leaves nothing that it would report.
    list(APPEND environment UBSAN_OPTIONS=print_stacktrace=1)
  endif()
  # COST: what may take longest starts first, so that no long test runs on alone at the end.
  set_tests_properties(${name} PROPERTIES
    LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT} COST ${ARG_TIMEOUT} ENVIRONMENT "${environment}")
  if("gpu" IN_LIST ARG_LABELS)
    rotunda_add_to_cuda_half(${name})
  endif()
  foreach(source IN LISTS ARG_SOURCES)
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" NORMALIZE)
    set_property(GLOBAL APPEND PROPERTY ROTUNDA_TEST_SOURCES "${source}")
  endforeach()
endfunction()

# rotunda_use_cuda_emulation(<test>): CUDA kernels that the test includes run on the CPU, see tests/cuda_emulation/warps.h.
function(rotunda_use_cuda_emulation name)
  if(TARGET ${name})
    target_include_directories(${name} BEFORE PRIVATE "${PROJECT_SOURCE_DIR}/tests/cuda_emulation")
    target_compile_options(${name} PRIVATE -Wno-unknown-pragmas)
  endif()
endfunction()

# Fails the configure step for a *_test.cpp below `directory` that no rotunda_add_test names.
function(rotunda_check_all_tests_listed directory)
  get_property(listed GLOBAL PROPERTY ROTUNDA_TEST_SOURCES)
  file(GLOB_RECURSE found CONFIGURE_DEPENDS "${directory}/*_test.cpp")
  if(NOT ROTUNDA_CUDA)
    list(FILTER found EXCLUDE REGEX "_gpu_test\\.cpp$")
  endif()
  foreach(source IN LISTS found)
    if(NOT source IN_LIST listed)
      message(FATAL_ERROR "${source} is in no rotunda_add_test: list it in the CMakeLists.txt beside it")
    endif()
  endforeach()
endfunction()

# rotunda_add_bench(<name> SOURCES <files...> LINK <targets...> [TORCH])
function(rotunda_add_bench name)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  _rotunda_configure(${name})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/bench")
  target_link_libraries(${name} PRIVATE ${ARG_LINK} benchmark::benchmark)
  if(ARG_TORCH)
    _rotunda_use_torch_pch(${name})
  endif()
  set_property(GLOBAL APPEND PROPERTY ROTUNDA_BENCHES "$<TARGET_FILE:${name}>")
endfunction()

# rotunda_add_fuzzer(<name> SOURCES <files...> LINK <targets...> [TORCH])
# A libFuzzer program, build/cpu-fuzz/bin/<name>; seeds in tests/fuzz/corpus/<name>/. `make fuzz` and `make fuzz-smoke` run all.
function(rotunda_add_fuzzer name)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} EXCLUDE_FROM_ALL ${ARG_SOURCES})
  _rotunda_configure(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LINK})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
  if(ARG_TORCH)
    _rotunda_use_torch_pch(${name})
  endif()
  if(NOT TARGET fuzz_targets)
    add_custom_target(fuzz_targets)
  endif()
  add_dependencies(fuzz_targets ${name})
  set_property(GLOBAL APPEND PROPERTY ROTUNDA_FUZZERS ${name})
endfunction()

# Writes <build>/benches.txt and <build>/fuzz_targets.txt, one a line, for scripts/bench.sh and scripts/fuzz.sh.
function(rotunda_write_lists)
  get_property(benches GLOBAL PROPERTY ROTUNDA_BENCHES)
  get_property(fuzzers GLOBAL PROPERTY ROTUNDA_FUZZERS)
  foreach(list IN ITEMS benches fuzzers)
    list(JOIN ${list} "\n" ${list}_text)
    if(${list}_text)
      string(APPEND ${list}_text "\n")
    endif()
  endforeach()
  file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/benches.txt" CONTENT "${benches_text}")
  file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/fuzz_targets.txt" CONTENT "${fuzzers_text}")
endfunction()

# rotunda_check_headers_self_contained(LINK <targets...>)
# Compiles every header below src/ alone: target headers_self_contained, an OBJECT library of one source per header. Without the
# precompiled header, which would lend a header what it forgot to include (and saves nothing over narrow includes: 1.5 s
# against 2.0 s for ops/rope.h). `*-inl.h` (Highway, included once per instruction set) is left out, and, in a build without CUDA,
# `*_cuda.h`, which include the toolkit's.
function(rotunda_check_headers_self_contained)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}/src" "${PROJECT_SOURCE_DIR}/src/*.h")
  list(FILTER headers EXCLUDE REGEX "-inl\\.h$")
  if(NOT ROTUNDA_CUDA)
    list(FILTER headers EXCLUDE REGEX "_cuda\\.h$")
  endif()
  set(sources "")
  foreach(header IN LISTS headers)
    string(REPLACE "/" "__" stem "${header}")
    set(source "${CMAKE_BINARY_DIR}/generated/headers/${stem}.cpp")
    file(CONFIGURE OUTPUT "${source}" @ONLY CONTENT "#include \"${header}\"\n")
    list(APPEND sources "${source}")
  endforeach()
  add_library(headers_self_contained OBJECT ${sources})
  _rotunda_configure(headers_self_contained)
  target_include_directories(headers_self_contained PRIVATE "${CMAKE_BINARY_DIR}/generated")
  target_link_libraries(headers_self_contained PRIVATE ${ARG_LINK})
endfunction()

# rotunda_discover(<target> <namespace> <registry type> <header>)
# A folder of the current one that holds a register.cpp is one format, method or family: its CMakeLists.txt is added (it
# puts the folder's files into the target with target_sources), and <build>/generated/<header> declares
# register_<folder>(<registry type>&) for each, and register_all, which calls them in the order of names. So a new one is a
# folder and no edit elsewhere.
function(rotunda_discover target namespace registry_type header)
  file(GLOB children CONFIGURE_DEPENDS RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" "${CMAKE_CURRENT_SOURCE_DIR}/*/register.cpp")
  list(SORT children)
  set(declarations "")
  set(calls "")
  foreach(child IN LISTS children)
    get_filename_component(name "${child}" DIRECTORY)
    add_subdirectory(${name})
    string(APPEND declarations "void register_${name}(${registry_type}& registry);\n")
    string(APPEND calls "  register_${name}(registry);\n")
  endforeach()
  file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/generated/${header}" @ONLY CONTENT
"// Generated by CMake from the sub-folders found; do not edit. Include it after the registry's own header.
#pragma once

namespace ${namespace} {

${declarations}
inline void register_all(${registry_type}& registry) {
${calls}}

}  // namespace ${namespace}
")
  target_include_directories(${target} PRIVATE "${CMAKE_BINARY_DIR}/generated")
endfunction()
