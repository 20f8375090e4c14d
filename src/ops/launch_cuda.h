#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "base/check.h"
#include "kernels/attention/decode_attention.h"

/// Between tensors and kernels of our own on a GPU.
namespace rotunda::ops {

/// @throws Error{kBug} where a kernel could not be launched
inline void check_launch(cudaError_t error, const char* kernel) {
  ROTUNDA_ASSERT(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }

/// Of tensors on the current GPU.
inline at::TensorOptions on_gpu(at::ScalarType type) { return at::TensorOptions().device(at::kCUDA).dtype(type); }

/// What kernels call it. @throws Error{kBug} for a type that they have no name for
inline kernels::ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return kernels::ElementType::kFp32;
    case at::kBFloat16: return kernels::ElementType::kBf16;
    case at::kHalf: return kernels::ElementType::kFp16;
    default: ROTUNDA_ASSERT(false, "element type ", c10::toString(type));
  }
}

inline at::ScalarType scalar_type(kernels::ElementType type) {
  switch (type) {
    case kernels::ElementType::kFp32: return at::kFloat;
    case kernels::ElementType::kBf16: return at::kBFloat16;
    case kernels::ElementType::kFp16: return at::kHalf;
  }
  ROTUNDA_ASSERT(false, "element type ", static_cast<int>(type));
}

}  // namespace rotunda::ops
