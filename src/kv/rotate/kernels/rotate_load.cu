#include "kv/rotate/kernels/rotate_load.cuh"

#include "kv/rotate/kernels/rotate_load_cuda.h"

namespace rotunda::kv::rotate {

namespace {

constexpr int kWarps = 8;

template <typename T>
__global__ void __launch_bounds__(kWarps * RotateLoadWarp::kWarp) load_kernel(const __grid_constant__ RotateLoadBatch p) {
  rotate_load_warps<T>(p, kWarps);
}

template <typename T>
cudaError_t launch(const RotateLoadBatch& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((rotate_load_items(p) + kWarps - 1) / kWarps);
  load_kernel<T><<<blocks, kWarps * RotateLoadWarp::kWarp, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rotate_load_cuda(const RotateLoadBatch& params, cudaStream_t stream) {
  if (params.layout.bits < 2 || params.layout.bits > 4) return cudaErrorInvalidValue;
  if (params.n_pages == 0) return cudaSuccess;
  switch (params.value_type) {
    case kernels::ElementType::kFp32: return launch<float>(params, stream);
    case kernels::ElementType::kBf16: return launch<__nv_bfloat16>(params, stream);
    case kernels::ElementType::kFp16: return launch<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace rotunda::kv::rotate
