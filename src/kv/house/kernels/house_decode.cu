#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_decode_dispatch.cuh"
#include "kv/house/kernels/house_query.cuh"

namespace rotunda::kv::house {

namespace {

cudaError_t dispatch(kernels::PagedTask task, const PagedDecode& p, int key_bits, int value_bits, kernels::PagedDecodeGrid& grid,
                     cudaStream_t stream) {
  switch (key_bits) {
    case 2: return house_dispatch_value_bits<2>(task, p, value_bits, grid, stream);
    case 3: return house_dispatch_value_bits<3>(task, p, value_bits, grid, stream);
    case 4: return house_dispatch_value_bits<4>(task, p, value_bits, grid, stream);
    default: return cudaErrorInvalidValue;
  }
}

constexpr int kQueryWarps = 4;

template <int kHeadDim>
__global__ void __launch_bounds__(kQueryWarps * kernels::kWarp) query_kernel(const __grid_constant__ HouseQueries p) {
  house_query_warps<kHeadDim>(p, kQueryWarps);
}

}  // namespace

cudaError_t house_decode_grid(const PagedDecode& shape, int key_bits, int value_bits, kernels::PagedDecodeGrid* grid) {
  return dispatch(kernels::PagedTask::kGrid, shape, key_bits, value_bits, *grid, nullptr);
}

cudaError_t house_decode_cuda(const PagedDecode& params, int key_bits, int value_bits, const kernels::PagedDecodeGrid& grid,
                              cudaStream_t stream) {
  kernels::PagedDecodeGrid same = grid;
  return dispatch(kernels::PagedTask::kLaunch, params, key_bits, value_bits, same, stream);
}

cudaError_t house_query_cuda(const HouseQueries& params, cudaStream_t stream) {
  const int rows = params.batch * params.n_kv_heads * params.n_q;
  const auto kernel = params.head_dim == 64    ? &query_kernel<64>
                      : params.head_dim == 128 ? &query_kernel<128>
                      : params.head_dim == 256 ? &query_kernel<256>
                                               : nullptr;
  if (kernel == nullptr) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>((rows + kQueryWarps - 1) / kQueryWarps), kQueryWarps * kernels::kWarp, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace rotunda::kv::house
