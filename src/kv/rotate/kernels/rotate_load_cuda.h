#pragma once

#include <cuda_runtime_api.h>

#include "kv/rotate/kernels/rotate_load_params.h"

namespace rotunda::kv::rotate {

/// Unpacks pages. Async on `stream`; allocates nothing. @return cudaErrorInvalidValue for a number of bits that there is not
cudaError_t rotate_load_cuda(const RotateLoadBatch& params, cudaStream_t stream);

}  // namespace rotunda::kv::rotate
