#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/paged_decode.h"
#include "kv/house/kernels/shift_query_params.h"
#include "kv/house/kernels/house_unit.h"

namespace rotunda::kv::house {

/// The grid that house_decode_cuda wants on the current device, which is made ready for it; of `shape` only n_q and head_dim are read.
/// @return cudaErrorInvalidValue for bits, a head_dim or n_q without a kernel
cudaError_t house_decode_grid(const kernels::PagedDecode& shape, int key_bits, int value_bits, kernels::PagedDecodeGrid* grid);

/// Decode attention over pages as in HousePageLayout, 8 blocks a page. Queries enter with 13 bits and a sign (one step
/// per head), weights times value scales with 14 bits (one step per half page and head), sums are exact in 32 bits, the softmax is fp32.
/// Async on `stream`; allocates nothing.
cudaError_t house_decode_cuda(const kernels::PagedDecode& params, int key_bits, int value_bits, const kernels::PagedDecodeGrid& grid,
                              cudaStream_t stream);

/// Reckons the queries' part of the shift, once a layer, before house_decode_cuda. Async on `stream`.
/// @return cudaErrorInvalidValue unless head_dim is 64, 128 or 256 and n_q 1 to 8
cudaError_t shift_query_cuda(const ShiftQueries& params, cudaStream_t stream);

}  // namespace rotunda::kv::house
