#include <cuda_runtime.h>

#include "kernels/cuda/element_type.cuh"
#include "kv/grouped/kernels/grouped_load.cuh"
#include "kv/grouped/kernels/grouped_pages_cuda.h"
#include "kv/grouped/kernels/grouped_store.cuh"

namespace rotunda::kv::grouped {

namespace {

__global__ void __launch_bounds__(GroupedStoreBlock::kMaxThreads) store_kernel(const __grid_constant__ GroupedStoreBatch p) {
  extern __shared__ __align__(16) std::byte shared[];
  GroupedStoreBlock::run(p, shared);
}

template <typename T>
__global__ void __launch_bounds__(GroupedLoadBlock<T>::kThreads, 2) load_kernel(const __grid_constant__ GroupedLoadPages p) {
  GroupedLoadBlock<T>::run(p);
}

// What a block has without being asked.
static_assert(GroupedStoreBlock::shared_bytes(kMaxStoredHeadDim) <= 48 * 1024);

}  // namespace

cudaError_t grouped_store_cuda(const GroupedStoreBatch& params, cudaStream_t stream) {
  const int head_dim = params.layer.layout.head_dim;
  if (head_dim < 16 || head_dim % 16 != 0 || head_dim > kMaxStoredHeadDim) return cudaErrorInvalidValue;
  if (params.n_pairs == 0 || params.n_layers == 0) return cudaSuccess;
  store_kernel<<<static_cast<unsigned>(GroupedStoreBlock::blocks(params)), static_cast<unsigned>(GroupedStoreBlock::threads(params.layer.layout)),
                 static_cast<size_t>(GroupedStoreBlock::shared_bytes(head_dim)), stream>>>(params);
  return cudaGetLastError();
}

cudaError_t grouped_load_cuda(const GroupedLoadPages& params, cudaStream_t stream) {
  const GroupedPageLayout& l = params.layer.layout;
  if (l.head_dim < 16 || l.head_dim % 16 != 0) return cudaErrorInvalidValue;
  if (params.n_pages == 0) return cudaSuccess;
  return kernels::with_type(params.type, [&]<typename T>(T) {
    load_kernel<T><<<static_cast<unsigned>(2 * params.n_pages * l.n_kv_heads), GroupedLoadBlock<T>::kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace rotunda::kv::grouped
