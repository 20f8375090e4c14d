#include <cstdint>
#include <limits>

#include "kernels/cuda/element_type.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/nn/nn.cuh"
#include "kernels/nn/nn_cuda.h"

namespace rotunda::kernels {

namespace {

constexpr int kThreads = 256;

template <typename T, int kSize, int kOfBlock>
__global__ void __launch_bounds__(kOfBlock) rms_norm_kernel(const RmsNorm p) {
  __shared__ float of_warps[RmsNormBlock<T, kSize, kOfBlock>::kWarps];
  RmsNormBlock<T, kSize, kOfBlock>::run(p, of_warps);
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const Swiglu p) {
  ptx::wait_for_launches_before();
  SwigluBlock<T, kSize, kThreads>::run(p);
}

constexpr int64_t kVectorBytes = 16;

bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % kVectorBytes == 0; }

// Calls run.operator()<T, elements a pack>().
template <typename Run>
cudaError_t dispatch(ElementType type, bool vectors, const Run& run) {
  const auto of_type = [&]<typename T>() {
    return vectors ? run.template operator()<T, kVectorBytes / sizeof(T)>() : run.template operator()<T, 1>();
  };
  return with_type(type, [&]<typename T>(T) { return of_type.template operator()<T>(); });
}

bool fits_grid(int64_t n_blocks) { return n_blocks <= std::numeric_limits<int32_t>::max(); }

}  // namespace

cudaError_t rms_norm_cuda(const RmsNorm& p, ElementType type, cudaStream_t stream) {
  if (p.row_size <= 0 || p.n_rows < 0 || !fits_grid(p.n_rows)) return cudaErrorInvalidValue;
  if (p.n_rows == 0) return cudaSuccess;
  if (p.update != nullptr && p.sum == nullptr) return cudaErrorInvalidValue;
  const bool vectors = p.row_size * element_bytes(type) % kVectorBytes == 0 && aligned(p.x) && aligned(p.weight) && aligned(p.y) &&
                       aligned(p.update) && aligned(p.sum);
  return dispatch(type, vectors, [&]<typename T, int kSize>() {
    const auto blocks = static_cast<unsigned>(p.n_rows);
    constexpr int kWarp = 32;
    if (p.row_size <= kWarp * kSize) return launch_overlapped(&rms_norm_kernel<T, kSize, kWarp>, blocks, kWarp, 0, stream, p);  // a head
    return launch_overlapped(&rms_norm_kernel<T, kSize, kThreads>, blocks, kThreads, 0, stream, p);
  });
}

cudaError_t swiglu_cuda(const Swiglu& p, ElementType type, cudaStream_t stream) {
  if (p.row_size <= 0 || p.n_rows < 0) return cudaErrorInvalidValue;
  if (p.n_rows == 0) return cudaSuccess;
  const bool vectors = p.row_size * element_bytes(type) % kVectorBytes == 0 && aligned(p.gate_up) && aligned(p.y);
  return dispatch(type, vectors, [&]<typename T, int kSize>() {
    const int64_t blocks = (p.n_rows * (p.row_size / kSize) + kThreads - 1) / kThreads;
    if (!fits_grid(blocks)) return cudaErrorInvalidValue;
    return launch_overlapped(&swiglu_kernel<T, kSize>, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
  });
}

}  // namespace rotunda::kernels
