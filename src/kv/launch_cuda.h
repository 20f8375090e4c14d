#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "base/check.h"
#include "kernels/attention/exact_tokens_cuda.h"

namespace rotunda::kv {

/// @throws Error{kBug} where a kernel could not be launched
inline void check_launch(cudaError_t error, const char* kernel) {
  ROTUNDA_ASSERT(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

/// @throws Error{kBug} for another type
inline kernels::CudaElement cuda_element(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return kernels::CudaElement::kFp32;
    case at::kBFloat16: return kernels::CudaElement::kBf16;
    case at::kHalf: return kernels::CudaElement::kFp16;
    default: ROTUNDA_ASSERT(false, "element type ", c10::toString(type));
  }
}

}  // namespace rotunda::kv
