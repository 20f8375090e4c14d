#include <cuda_runtime.h>

#include "kv/house/kernels/house_load.cuh"
#include "kv/house/kernels/house_load_cuda.h"

namespace rotunda::kv::house {

namespace {

/// 1,024 threads.
constexpr int kMaxHeadDim = 512;

template <typename T>
__global__ void load_kernel(const __grid_constant__ HouseLoadPages p) {
  HouseLoadBlock<T>::run(p);
}

template <typename T>
cudaError_t launch(const HouseLoadPages& p, cudaStream_t stream) {
  load_kernel<T><<<static_cast<unsigned>(2 * p.n_pages * p.layout.n_kv_heads),
                   static_cast<unsigned>(HouseLoadBlock<T>::threads(p.layout.head_dim)), 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t house_load_cuda(const HouseLoadPages& params, cudaStream_t stream) {
  const HousePageLayout& l = params.layout;
  const auto known = [](int bits) { return bits >= 2 && bits <= 4; };
  if (l.head_dim < 16 || l.head_dim > kMaxHeadDim || l.head_dim % 16 != 0 || !known(l.key_bits) || !known(l.value_bits))
    return cudaErrorInvalidValue;
  if (params.n_pages == 0) return cudaSuccess;
  switch (params.type) {
    case kernels::ElementType::kFp32: return launch<float>(params, stream);
    case kernels::ElementType::kBf16: return launch<__nv_bfloat16>(params, stream);
    case kernels::ElementType::kFp16: return launch<__half>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace rotunda::kv::house
