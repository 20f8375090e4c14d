#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/warp.cuh"

namespace rotunda::kernels {

/// The fast Walsh-Hadamard transform of one row, normalized: lane l holds channels l, l + 32, ...
template <int kHeadDim>
__device__ __forceinline__ void rotate_row(float (&x)[kHeadDim / kWarp]) {
  constexpr int kElements = kHeadDim / kWarp;
  constexpr float kFactor = kHeadDim == 64 ? 0.125F : kHeadDim == 128 ? 0.08838834764831845F : 0.0625F;  // 1 / sqrt(kHeadDim)
  const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], step);
      x[i] = (lane & step) == 0 ? x[i] + other : other - x[i];
    }
  }
#pragma unroll
  for (int step = 1; step < kElements; step *= 2) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if ((i & step) != 0) continue;
      const float sum = x[i] + x[i + step];
      x[i + step] = x[i] - x[i + step];
      x[i] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] *= kFactor;
}

}  // namespace rotunda::kernels
