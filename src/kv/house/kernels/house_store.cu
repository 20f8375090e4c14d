#include "kv/house/kernels/house_store.cuh"

#include <algorithm>

#include "kv/house/kernels/house_store_cuda.h"

namespace rotunda::kv::house {

namespace {

constexpr int kMaxWarps = 5;

__global__ void __launch_bounds__(kMaxWarps * HouseStoreWarp::kWarp) store_kernel(const __grid_constant__ HouseStoreBatch p, int warps) {
  extern __shared__ __align__(16) std::byte shared[];
  house_store_warps(p, warps, shared);
}

}  // namespace

cudaError_t house_store_cuda(const HouseStoreBatch& params, cudaStream_t stream) {
  const HousePageLayout& l = params.layout;
  const auto known = [](int bits) { return bits >= 2 && bits <= 4; };
  if (l.head_dim < 32 || l.head_dim % 32 != 0 || !known(l.key_bits) || !known(l.value_bits)) return cudaErrorInvalidValue;
  if (params.n_pairs == 0 || params.n_layers == 0) return cudaSuccess;
  int device = 0;
  int shared = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); error != cudaSuccess)
    return error;
  const int64_t of_warp = HouseStoreWarp::shared_bytes(l.head_dim);
  const int warps = static_cast<int>(std::min<int64_t>(kMaxWarps, shared / of_warp));
  if (warps < 1) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>(warps * of_warp);
  if (const cudaError_t error = cudaFuncSetAttribute(store_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); error != cudaSuccess)
    return error;
  const int64_t items = 2 * int64_t{params.n_layers} * l.n_kv_heads * params.n_pairs;
  store_kernel<<<static_cast<unsigned>((items + warps - 1) / warps), static_cast<unsigned>(warps * HouseStoreWarp::kWarp), bytes, stream>>>(
      params, warps);
  return cudaGetLastError();
}

}  // namespace rotunda::kv::house
