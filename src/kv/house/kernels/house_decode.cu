#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_decode_dispatch.cuh"

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

}  // namespace

cudaError_t house_decode_grid(const PagedDecode& shape, int key_bits, int value_bits, kernels::PagedDecodeGrid* grid) {
  return dispatch(kernels::PagedTask::kGrid, shape, key_bits, value_bits, *grid, nullptr);
}

cudaError_t house_decode_cuda(const PagedDecode& params, int key_bits, int value_bits, const kernels::PagedDecodeGrid& grid,
                              cudaStream_t stream) {
  kernels::PagedDecodeGrid same = grid;
  return dispatch(kernels::PagedTask::kLaunch, params, key_bits, value_bits, same, stream);
}

}  // namespace rotunda::kv::house
