#include "kernels/attention/paged_decode_launch.cuh"
#include "kernels/attention/plain_decode_cuda.h"

namespace rotunda::kernels {

namespace {

constexpr int kStages = 2;

template <typename T, int kHeadDim>
struct PlainPages {
  template <int kSets>
  using Codec = PlainBlock<T, kHeadDim, kSets, true, kPagedTokens>;
};

template <typename T>
cudaError_t dispatch_head_dim(PagedTask task, const PagedDecode& p, PagedDecodeGrid& grid, cudaStream_t stream) {
  const auto run = [&]<int kHeadDim>() {
    return dispatch_size<PlainPages<T, kHeadDim>::template Codec, kHeadDim, kStages>(task, p, grid, stream);
  };
  switch (p.head_dim) {
    case 64: return run.template operator()<64>();
    case 128: return run.template operator()<128>();
    case 256: return run.template operator()<256>();
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
