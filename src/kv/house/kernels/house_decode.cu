#include "kernels/attention/paged_decode_launch.cuh"
#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_page_codec.cuh"

namespace rotunda::kv::house {

namespace {

using kernels::PagedDecodeGrid;
using kernels::PagedTask;

constexpr int kStages = 2;

template <int kKeyBits, int kValueBits, int kHeadDim>
struct HousePages {
  template <int kSets>
  using Codec = HousePageCodec<kKeyBits, kValueBits, kHeadDim, kSets>;
};

template <int kKeyBits, int kValueBits>
cudaError_t dispatch_head_dim(PagedTask task, const PagedDecode& p, PagedDecodeGrid& grid, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return kernels::dispatch_size<HousePages<kKeyBits, kValueBits, 64>::template Codec, 64, kStages>(task, p, grid, stream);
    case 128: return kernels::dispatch_size<HousePages<kKeyBits, kValueBits, 128>::template Codec, 128, kStages>(task, p, grid, stream);
    case 256: return kernels::dispatch_size<HousePages<kKeyBits, kValueBits, 256>::template Codec, 256, kStages>(task, p, grid, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t dispatch(PagedTask task, const PagedDecode& p, int key_bits, int value_bits, PagedDecodeGrid& grid, cudaStream_t stream) {
  switch (10 * key_bits + value_bits) {
    case 22: return dispatch_head_dim<2, 2>(task, p, grid, stream);
    case 23: return dispatch_head_dim<2, 3>(task, p, grid, stream);
    case 24: return dispatch_head_dim<2, 4>(task, p, grid, stream);
    case 32: return dispatch_head_dim<3, 2>(task, p, grid, stream);
    case 33: return dispatch_head_dim<3, 3>(task, p, grid, stream);
    case 34: return dispatch_head_dim<3, 4>(task, p, grid, stream);
    case 42: return dispatch_head_dim<4, 2>(task, p, grid, stream);
    case 43: return dispatch_head_dim<4, 3>(task, p, grid, stream);
    case 44: return dispatch_head_dim<4, 4>(task, p, grid, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t house_decode_grid(const PagedDecode& shape, int key_bits, int value_bits, PagedDecodeGrid* grid) {
  return dispatch(PagedTask::kGrid, shape, key_bits, value_bits, *grid, nullptr);
}

cudaError_t house_decode_cuda(const PagedDecode& params, int key_bits, int value_bits, const PagedDecodeGrid& grid, cudaStream_t stream) {
  PagedDecodeGrid same = grid;
  return dispatch(PagedTask::kLaunch, params, key_bits, value_bits, same, stream);
}

}  // namespace rotunda::kv::house
