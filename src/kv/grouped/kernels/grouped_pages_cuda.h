#pragma once

#include <cuda_runtime_api.h>

#include "kv/grouped/kernels/grouped_pages_params.h"

namespace rotunda::kv::grouped {

/// Heads that grouped_store_cuda has shared memory for.
inline constexpr int kMaxStoredHeadDim = 1024;

/// Packs tokens into pages, the same bytes as grouped_store. Async on `stream`; allocates nothing.
/// @return cudaErrorInvalidValue unless head_dim is a multiple of 16 up to kMaxStoredHeadDim
cudaError_t grouped_store_cuda(const GroupedStoreBatch& params, cudaStream_t stream);

/// Unpacks pages. Async on `stream`; allocates nothing.
/// @return cudaErrorInvalidValue unless head_dim is a multiple of 16
cudaError_t grouped_load_cuda(const GroupedLoadPages& params, cudaStream_t stream);

}  // namespace rotunda::kv::grouped
