#pragma once

#include <cuda_runtime_api.h>

#include "kv/rotate/kernels/rotate_store_params.h"

namespace rotunda::kv::rotate {

/// Packs tokens into pages, the same bytes as rotate_store. Async on `stream`; allocates nothing.
/// @return cudaErrorInvalidValue for a layout that RotatePageLayout does not allow, or a token too long for shared memory
cudaError_t rotate_store_cuda(const RotateStoreBatch& params, cudaStream_t stream);

}  // namespace rotunda::kv::rotate
