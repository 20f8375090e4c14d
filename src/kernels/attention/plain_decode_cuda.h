#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/decode_attention.h"
#include "kernels/attention/paged_decode.h"

namespace rotunda::kernels {

/// Units of pages in plain_decode_cuda, for paged_decode_units.
inline constexpr int kPlainUnitTokens = 16;

/// The grid that plain_decode_cuda wants on the current device, which is made ready for it; of `shape` only n_q and head_dim are read.
/// @return cudaErrorInvalidValue for a type, head_dim or n_q without a kernel
cudaError_t plain_decode_grid(const PagedDecode& shape, ElementType type, PagedDecodeGrid* grid);

/// Decode attention over pages as in PlainPageLayout of type kBf16 or kFp16, 128 tokens a page. fp32 sums; the query and the
/// probabilities enter as two 16-bit numbers each. Async on `stream`; allocates nothing.
cudaError_t plain_decode_cuda(const PagedDecode& params, ElementType type, const PagedDecodeGrid& grid, cudaStream_t stream);

}  // namespace rotunda::kernels
