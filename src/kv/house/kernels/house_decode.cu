#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_decode_dispatch.cuh"
#include "kv/house/kernels/house_shift.cuh"

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

constexpr int kShiftWarps = 4;

__global__ void __launch_bounds__(kShiftWarps * kernels::kWarp) shift_kernel(const __grid_constant__ ShiftOfQueries p) {
  shift_of_queries(p, kShiftWarps);
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

cudaError_t house_shift_cuda(const ShiftOfQueries& params, cudaStream_t stream) {
  const int rows = params.batch * params.n_kv_heads * params.n_q;
  if (rows == 0) return cudaSuccess;
  shift_kernel<<<static_cast<unsigned>((rows + kShiftWarps - 1) / kShiftWarps), kShiftWarps * kernels::kWarp, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace rotunda::kv::house
