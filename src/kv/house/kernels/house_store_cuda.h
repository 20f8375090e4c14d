#pragma once

#include <cuda_runtime_api.h>

#include "kv/house/kernels/house_store_params.h"

namespace rotunda::kv::house {

/// Packs tokens into pages, the same bytes as house_store. Async on `stream`; allocates nothing.
/// @return cudaErrorInvalidValue unless head_dim is a multiple of 32 and bits are 2 to 4
cudaError_t house_store_cuda(const HouseStoreBatch& params, cudaStream_t stream);

}  // namespace rotunda::kv::house
