#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/paged_decode.h"
#include "kv/rotate/kernels/rotate_decode_shape.h"
#include "kv/rotate/kernels/rotate_page.h"

namespace rotunda::kv::rotate {

/// Whether rotate_decode_cuda knows pages of this layout.
constexpr bool rotate_decode_known(const RotatePageLayout& l) {
  return l.bits == 2 && l.head_dim == kRotateHeadDim && l.heads_per_group == kRotateHeads &&
         l.group_size % l.head_dim == 0 && l.n_quant_groups() <= kRotateMostGroups;
}

/// Shared memory that a block wants; there are GPUs, all before Hopper among them, that have less.
int rotate_decode_shared_bytes();

/// The grid that rotate_decode_cuda wants on the current device.
cudaError_t rotate_decode_grid(kernels::PagedDecodeGrid* grid);

/// Bytes of PagedDecode::workspace, more than other kernels need; zeroed once when it is allocated.
int64_t rotate_decode_workspace_bytes(const kernels::PagedDecodeGrid& grid, int batch, int n_kv_heads);

/// Decode attention over pages as in RotatePageLayout, 8 blocks a page. Keys are fp16 from the scaled code to the score, queries and
/// weights enter as two fp16 numbers each, scores and sums are fp32. Async on `stream`; allocates nothing.
/// @param params with `rotate`; q_pages times the attention factor once more, since packed keys have none
cudaError_t rotate_decode_cuda(const kernels::PagedDecode& params, const kernels::PagedDecodeGrid& grid, cudaStream_t stream);

}  // namespace rotunda::kv::rotate
