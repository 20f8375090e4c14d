#include "kernels/attention/paged_decode_launch.cuh"
#include "kv/rotate/kernels/rotate_decode_cuda.h"
#include "kv/rotate/kernels/rotate_page_codec.cuh"

namespace rotunda::kv::rotate {

namespace {

// 16 tokens by 512 channels take 128 registers of a thread: no more warps than have 255 each.
constexpr int kWarps = 8;
constexpr int kStages = 3;

struct Kernel : kernels::PagedDecodeKernel<RotatePageCodec, RotatePageCodec::Exact, kRotateHeadDim, kRotateHeads, kWarps, kStages, 128> {
  static constexpr bool kLarge = true;
};
static_assert(Kernel::kSharedBytes <= kernels::kLargeShared);

}  // namespace

int rotate_decode_shared_bytes() { return Kernel::kSharedBytes; }

cudaError_t rotate_decode_grid(kernels::PagedDecodeGrid* grid) {
  return kernels::run_task<Kernel>(kernels::PagedTask::kGrid, {}, *grid, nullptr);
}

int64_t rotate_decode_workspace_bytes(const kernels::PagedDecodeGrid& grid, int batch, int n_kv_heads) {
  return kernels::paged_decode_workspace_bytes(grid, batch, n_kv_heads / kRotateHeads, kRotateHeads * kRotateQueries, kRotateHeadDim);
}

cudaError_t rotate_decode_cuda(const kernels::PagedDecode& params, const kernels::PagedDecodeGrid& grid, cudaStream_t stream) {
  if (params.n_kv_heads % kRotateHeads != 0 || params.n_q != kRotateQueries || params.head_dim != kRotateHeadDim ||
      params.rotate.n_quant_groups > kRotateMostGroups)
    return cudaErrorInvalidValue;
  kernels::PagedDecodeGrid same = grid;
  return kernels::run_task<Kernel>(kernels::PagedTask::kLaunch, rotate_of_groups(params), same, stream);
}

}  // namespace rotunda::kv::rotate
