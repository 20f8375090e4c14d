#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/paged_decode.h"
#include "kv/grouped/kernels/fp8_unit.h"

namespace rotunda::kv::grouped {

/// The grid that fp8_decode_cuda wants on the current device, which is made ready for it; of `shape` only n_q and head_dim are read.
/// @return cudaErrorInvalidValue for a head_dim or n_q without a kernel
cudaError_t fp8_decode_grid(const kernels::PagedDecode& shape, kernels::PagedDecodeGrid* grid);

/// Decode attention over pages as in GroupedPageLayout, 8 blocks a page, keys and values in 8 bits of e4m3 with one fp16 scale per token
/// and head. fp32 sums; queries and weights enter as two fp16 numbers each. Async on `stream`; allocates nothing.
cudaError_t fp8_decode_cuda(const kernels::PagedDecode& params, const kernels::PagedDecodeGrid& grid, cudaStream_t stream);

}  // namespace rotunda::kv::grouped
