#include "kernels/cuda/launch.cuh"
#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_decode_dispatch.cuh"
#include "kv/house/kernels/shift_query.cuh"

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

template <int kHeadDim, int kSets>
__global__ void __launch_bounds__(kQueryWarps * kernels::kWarp) shift_query_kernel(const __grid_constant__ ShiftQueries p) {
  kernels::ptx::wait_for_launches_before();
  shift_query_warp<kHeadDim, kSets>(p, static_cast<int>(blockIdx.x) * kQueryWarps + static_cast<int>(threadIdx.x / kernels::kWarp));
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

cudaError_t shift_query_cuda(const ShiftQueries& params, cudaStream_t stream) {
  if (params.n_q < 1 || params.n_q > 8) return cudaErrorInvalidValue;
  const bool wide = params.n_q > 4;
  const auto kernel = params.head_dim == 64    ? wide ? &shift_query_kernel<64, 2> : &shift_query_kernel<64, 1>
                      : params.head_dim == 128 ? wide ? &shift_query_kernel<128, 2> : &shift_query_kernel<128, 1>
                      : params.head_dim == 256 ? wide ? &shift_query_kernel<256, 2> : &shift_query_kernel<256, 1>
                                               : nullptr;
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const int warps = shift_query_warps(params.batch, params.n_kv_heads, params.pages);
  if (warps == 0) return cudaSuccess;
  return kernels::launch_overlapped(kernel, (warps + kQueryWarps - 1) / kQueryWarps, kQueryWarps * kernels::kWarp, 0, stream, params);
}

}  // namespace rotunda::kv::house
