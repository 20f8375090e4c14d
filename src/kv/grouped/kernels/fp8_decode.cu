#include "kernels/attention/paged_decode_launch.cuh"
#include "kv/grouped/kernels/fp8_decode_cuda.h"
#include "kv/grouped/kernels/fp8_page_codec.cuh"

namespace rotunda::kv::grouped {

namespace {

constexpr int kStages = 3;

template <int kHeadDim>
struct Fp8Pages {
  template <int kSets>
  using Codec = Fp8PageCodec<kHeadDim, kSets>;
};

cudaError_t dispatch(kernels::PagedTask task, const PagedDecode& p, kernels::PagedDecodeGrid& grid, cudaStream_t stream) {
  const auto run = [&]<int kHeadDim>() {
    return kernels::dispatch_size<Fp8Pages<kHeadDim>::template Codec, kHeadDim, kStages>(task, p, grid, stream);
  };
  switch (p.head_dim) {
    case 64: return run.template operator()<64>();
    case 128: return run.template operator()<128>();
    case 256: return run.template operator()<256>();
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t fp8_decode_grid(const PagedDecode& shape, kernels::PagedDecodeGrid* grid) {
  return dispatch(kernels::PagedTask::kGrid, shape, *grid, nullptr);
}

cudaError_t fp8_decode_cuda(const PagedDecode& params, const kernels::PagedDecodeGrid& grid, cudaStream_t stream) {
  kernels::PagedDecodeGrid same = grid;
  return dispatch(kernels::PagedTask::kLaunch, params, same, stream);
}

}  // namespace rotunda::kv::grouped
