#pragma once

#include <cuda_runtime_api.h>

#include "kv/house/kernels/house_store_params.h"

namespace rotunda::kv::house {

/// Packs tokens into pages, the same bytes as house_store. Async on `stream`; allocates nothing. Two kernels, one for whole pages and one
/// for a few tokens of many pages (a decode step), chosen by HouseStoreBatch::n_rows.
/// @return cudaErrorInvalidValue unless head_dim is a multiple of 32, bits are 2 to 4, and a head's feedback has room in shared memory
/// (head_dim 256: since Hopper)
cudaError_t house_store_cuda(const HouseStoreBatch& params, cudaStream_t stream);

}  // namespace rotunda::kv::house
