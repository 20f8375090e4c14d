#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "kernels/attention/paged_decode.cuh"
#include "kernels/attention/plain_block.cuh"
#include "kernels/cuda/launch.cuh"

/// From run time to compile time, in one place for all codecs.
namespace rotunda::kernels {

inline constexpr int kPagedTokens = 128;  ///< of a page

/// Shared memory that a block may have on datacentre GPUs since Hopper, and on all since Ampere.
inline constexpr int kLargeShared = 226 * 1024;
inline constexpr int kSmallShared = 98 * 1024;
/// Of it, for a warp, what is no stage: see PagedDecodeKernel::Board.
inline constexpr int kBoardBytes = 176;

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) paged_decode_kernel(const __grid_constant__ PagedDecode p) {
  extern __shared__ __align__(128) std::byte shared[];
  // Each size is compiled where it can run: sm_90a has the large one alone, what came before Hopper the small one.
#if __CUDA_ARCH__ < 900
  constexpr bool kHere = Kernel::kSharedBytes <= kSmallShared;
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kHere = Kernel::kLarge;
#else
  constexpr bool kHere = true;
#endif
  if constexpr (kHere) {
    ptx::wait_for_launches_before();
    Kernel::run(p, shared);
  } else {
    __trap();
  }
}

/// A codec's kernel with as many warps as shared memory has room for.
/// @tparam Pages<kSets> the codec for up to four query heads, or eight
template <template <int> typename Pages, int kHeadDim, int kSets, int kStages, bool kLargeSize>
struct SizedKernel {
  using Exact = PlainBlock<__half, kHeadDim, kSets, false, kPagedTokens>;
  static constexpr int kUnitBytes = Pages<kSets>::kStageBytes > Exact::kStageBytes ? Pages<kSets>::kStageBytes : Exact::kStageBytes;
  static constexpr int kFit = (kLargeSize ? kLargeShared : kSmallShared) / (kStages * kUnitBytes + kBoardBytes);
  static constexpr int kMost = Pages<kSets>::kMaxWarps < Exact::kMaxWarps ? Pages<kSets>::kMaxWarps : Exact::kMaxWarps;
  static constexpr int kWarps = kFit < kMost ? kFit : kMost;
  static_assert(kWarps >= 1);
  struct Kernel : PagedDecodeKernel<Pages<kSets>, Exact, kHeadDim, kSets, kWarps, kStages, kPagedTokens> {
    static constexpr bool kLarge = kLargeSize;
  };
};

/// What is to be done with the kernel that fits. Asking for the grid makes the kernel ready on the device; a launch only launches.
enum class PagedTask { kGrid, kLaunch };

template <typename Kernel>
cudaError_t run_task(PagedTask task, const PagedDecode& p, PagedDecodeGrid& grid, cudaStream_t stream) {
  const auto kernel = &paged_decode_kernel<Kernel>;
  if (task == PagedTask::kGrid) {
    int device = 0;
    int processors = 0;
    int per_processor = 0;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes);
        error != cudaSuccess)
      return error;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device); error != cudaSuccess)
      return error;
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, Kernel::kThreads, Kernel::kSharedBytes);
        error != cudaSuccess)
      return error;
    if (per_processor < 1) return cudaErrorInvalidConfiguration;
    grid = {processors * per_processor, Kernel::kThreads / kWarp, Kernel::kLarge};
    return cudaSuccess;
  }
  return launch_overlapped(kernel, grid.blocks, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
}

/// @return cudaErrorInvalidValue where n_q is not 1 to 8 or pages have 2^31 bytes or more
template <template <int> typename Pages, int kHeadDim, int kStages>
cudaError_t dispatch_size(PagedTask task, const PagedDecode& p, PagedDecodeGrid& grid, cudaStream_t stream) {
  if (p.n_q < 1 || p.n_q > 8 || p.page_bytes > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  bool large = grid.large;
  if (task == PagedTask::kGrid) {
    int device = 0;
    int shared = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); error != cudaSuccess)
      return error;
    large = shared >= kLargeShared;
  }
  const auto sized = [&]<int kSets>() {
    return large ? run_task<typename SizedKernel<Pages, kHeadDim, kSets, kStages, true>::Kernel>(task, p, grid, stream)
                 : run_task<typename SizedKernel<Pages, kHeadDim, kSets, kStages, false>::Kernel>(task, p, grid, stream);
  };
  return p.n_q <= 4 ? sized.template operator()<1>() : sized.template operator()<2>();
}

}  // namespace rotunda::kernels
