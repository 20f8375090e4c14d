#include "kv/rotate/kernels/rotate_store.cuh"

#include <algorithm>

#include "kv/rotate/kernels/rotate_store_cuda.h"

namespace rotunda::kv::rotate {

namespace {

constexpr int kMaxWarps = 8;

__global__ void __launch_bounds__(kMaxWarps * RotateStoreWarp::kWarp)
store_kernel(const __grid_constant__ RotateStoreBatch p, int warps) {
  extern __shared__ __align__(16) std::byte shared[];
  rotate_store_warps(p, warps, shared);
}

}  // namespace

cudaError_t rotate_store_cuda(const RotateStoreBatch& params, cudaStream_t stream) {
  const RotatePageLayout& l = params.layout;
  if (l.bits < 2 || l.bits > 4 || l.head_dim < 16 || l.head_dim % 16 != 0 || l.heads_per_group < 1 ||
      l.n_kv_heads % l.heads_per_group != 0 || l.group_size < 16 || l.group_size % 16 != 0 || l.kv_channels() % l.group_size != 0)
    return cudaErrorInvalidValue;
  const int64_t items = rotate_store_items(params);
  if (items == 0) return cudaSuccess;
  int device = 0;
  int shared = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); error != cudaSuccess)
    return error;
  const int64_t of_warp = RotateStoreWarp::shared_bytes(l);
  const int warps = static_cast<int>(std::min<int64_t>(kMaxWarps, shared / of_warp));
  if (warps < 1) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>(warps * of_warp);
  if (const cudaError_t error = cudaFuncSetAttribute(store_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      error != cudaSuccess)
    return error;
  const auto blocks = static_cast<unsigned>((items + warps - 1) / warps);
  store_kernel<<<blocks, static_cast<unsigned>(warps * RotateStoreWarp::kWarp), bytes, stream>>>(params, warps);
  return cudaGetLastError();
}

}  // namespace rotunda::kv::rotate
