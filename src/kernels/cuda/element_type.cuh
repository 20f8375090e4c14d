#pragma once

#include "kernels/attention/decode_attention.h"
#include "kernels/cuda/sixteen_bit.cuh"

namespace rotunda::kernels {

/// run(T()) with the type that an ElementType names. @return what it returns
template <typename Run>
cudaError_t with_type(ElementType type, const Run& run) {
  switch (type) {
    case ElementType::kFp32: return run(float());
    case ElementType::kBf16: return run(__nv_bfloat16());
    case ElementType::kFp16: return run(__half());
  }
  return cudaErrorInvalidValue;
}

}  // namespace rotunda::kernels
