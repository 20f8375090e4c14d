#include "kernels/attention/paged_decode_launch.cuh"
#include "kernels/attention/plain_decode_cuda.h"

namespace rotunda::kernels {

namespace {

constexpr int kStages = 3;

template <typename T, int kHeadDim>
struct PlainPages {
  template <int kSets>
  using Codec = PlainBlock<T, kHeadDim, kSets, true, kPagedTokens>;
};

template <typename T>
cudaError_t dispatch_head_dim(PagedTask task, const PagedDecode& p, PagedDecodeGrid& grid, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return dispatch_size<PlainPages<T, 64>::template Codec, 64, kStages>(task, p, grid, stream);
    case 128: return dispatch_size<PlainPages<T, 128>::template Codec, 128, kStages>(task, p, grid, stream);
    case 256: return dispatch_size<PlainPages<T, 256>::template Codec, 256, kStages>(task, p, grid, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t dispatch(PagedTask task, const PagedDecode& p, ElementType type, PagedDecodeGrid& grid, cudaStream_t stream) {
  switch (type) {
    case ElementType::kBf16: return dispatch_head_dim<__nv_bfloat16>(task, p, grid, stream);
    case ElementType::kFp16: return dispatch_head_dim<__half>(task, p, grid, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t plain_decode_grid(const PagedDecode& shape, ElementType type, PagedDecodeGrid* grid) {
  return dispatch(PagedTask::kGrid, shape, type, *grid, nullptr);
}

cudaError_t plain_decode_cuda(const PagedDecode& params, ElementType type, const PagedDecodeGrid& grid, cudaStream_t stream) {
  PagedDecodeGrid same = grid;
  return dispatch(PagedTask::kLaunch, params, type, same, stream);
}

}  // namespace rotunda::kernels
