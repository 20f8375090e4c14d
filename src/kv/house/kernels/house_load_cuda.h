#pragma once

#include <cuda_runtime_api.h>

#include "kv/house/kernels/house_load_params.h"

namespace rotunda::kv::house {

/// Unpacks pages. Async on `stream`; allocates nothing.
/// @return cudaErrorInvalidValue unless head_dim is a multiple of 16 up to 512 and bits are 2 to 4
cudaError_t house_load_cuda(const HouseLoadPages& params, cudaStream_t stream);

}  // namespace rotunda::kv::house
