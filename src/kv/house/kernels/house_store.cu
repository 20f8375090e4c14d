#include "kv/house/kernels/house_store.cuh"

#include <algorithm>

#include "kv/house/kernels/house_store_cuda.h"

namespace rotunda::kv::house {

namespace {

constexpr int kMaxWarps = 12;

/// Tokens of a pair up to which the kernel for few is the faster one: a token's tries then run beside each other.
constexpr int kFewTokens = 8;
/// Two or three at once share what is read of the triangle, but leave shared memory for five or three warps a processor instead of nine:
/// on an H200 they take 1.15 and 1.75 times as long.
constexpr int kTries = 1;

template <int kTokens, int kTriesOfLane, bool kFeedback>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    store_kernel(const __grid_constant__ HouseStoreBatch p, const __grid_constant__ HouseStoreGrid grid) {
  extern __shared__ __align__(16) std::byte shared[];
  house_store_block<kTokens, kTriesOfLane, kFeedback>(p, grid, shared);
}

template <int kTokens, int kTriesOfLane, bool kFeedback>
cudaError_t launch(const HouseStoreBatch& p, bool keys, bool values, cudaStream_t stream) {
  int device = 0;
  int shared = 0;
  int processors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); error != cudaSuccess)
    return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device); error != cudaSuccess)
    return error;
  const auto bytes = [&](int warps) { return house_store_shared_bytes<kTokens, kTriesOfLane, kFeedback>(p.layout.head_dim, warps); };
  constexpr int kPairs = HouseStoreWarp<kTokens, kTriesOfLane, kFeedback>::kPairs;
  const int items = (p.n_pairs + kPairs - 1) / kPairs;  // of a head
  HouseStoreGrid grid{keys, values, std::min(kMaxWarps, items), 1};
  while (grid.warps > 1 && bytes(grid.warps) > shared) --grid.warps;
  if (bytes(grid.warps) > shared) return cudaErrorInvalidValue;
  const int blocks_of_head = (items + grid.warps - 1) / grid.warps;
  grid.warps = (items + blocks_of_head - 1) / blocks_of_head;  // the last block has as many as the others
  const int64_t heads = int64_t{p.n_layers} * p.layout.n_kv_heads * (keys && values ? 2 : 1);
  // Enough blocks for every processor to get several, else as few as may share what a block reads of feedback.
  grid.items_per_warp = static_cast<int>(std::clamp<int64_t>(heads * items / (int64_t{processors} * grid.warps * 4), 1, 8));
  const auto kernel = &store_kernel<kTokens, kTriesOfLane, kFeedback>;
  const auto shared_bytes = static_cast<int>(bytes(grid.warps));
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      error != cudaSuccess)
    return error;
  const int64_t blocks = heads * HouseStoreGrid::blocks_of_head(items, grid.warps, grid.items_per_warp);
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(grid.warps * 32), static_cast<size_t>(shared_bytes), stream>>>(p, grid);
  return cudaGetLastError();
}

/// Keys with feedback are another kernel than values, which want less shared memory.
template <int kTokens, int kTriesOfLane>
cudaError_t launch_all(const HouseStoreBatch& p, cudaStream_t stream) {
  if (p.feedback == nullptr) return launch<kTokens, 1, false>(p, true, true, stream);
  if (const cudaError_t error = launch<kTokens, kTriesOfLane, true>(p, true, false, stream); error != cudaSuccess) return error;
  return launch<kTokens, 1, false>(p, false, true, stream);
}

}  // namespace

cudaError_t house_store_cuda(const HouseStoreBatch& params, cudaStream_t stream) {
  const HousePageLayout& l = params.layout;
  const auto known = [](int bits) { return bits >= 2 && bits <= 4; };
  if (l.head_dim < 32 || l.head_dim % 32 != 0 || !known(l.key_bits) || !known(l.value_bits)) return cudaErrorInvalidValue;
  if (params.n_pairs == 0 || params.n_layers == 0) return cudaSuccess;
  return params.n_rows <= int64_t{kFewTokens} * params.n_pairs ? launch_all<4, 1>(params, stream) : launch_all<32, kTries>(params, stream);
}

}  // namespace rotunda::kv::house
