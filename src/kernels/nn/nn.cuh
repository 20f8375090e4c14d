#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "kernels/cuda/sixteen_bit.cuh"
#include "kernels/nn/nn_params.h"

namespace rotunda::kernels {

/// Elements that are read and written together.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T at[kSize];
};

/// A block of kThreads a row.
template <typename T, int kSize, int kThreads>
struct RmsNormBlock {
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32);

  /// @param of_warps [kWarps] in shared memory
  static __device__ __forceinline__ void run(const RmsNorm& p, float* of_warps) {
    using Vector = Pack<T, kSize>;
    const int64_t n = p.row_size / kSize;
    const Vector* x = static_cast<const Vector*>(p.x) + blockIdx.x * n;
    const Vector* update = p.update == nullptr ? nullptr : static_cast<const Vector*>(p.update) + blockIdx.x * n;
    Vector* sums = p.update == nullptr ? nullptr : static_cast<Vector*>(p.sum) + blockIdx.x * n;
    const Vector* weight = static_cast<const Vector*>(p.weight);
    Vector* y = static_cast<Vector*>(p.y) + blockIdx.x * n;
    float sum = 0.0F;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      Vector values = x[i];
      if (update != nullptr) {
        const Vector more = update[i];
        for (int e = 0; e < kSize; ++e) values.at[e] = round_to<T>(widen(values.at[e]) + widen(more.at[e]));
        sums[i] = values;
      }
      for (int e = 0; e < kSize; ++e) sum += widen(values.at[e]) * widen(values.at[e]);
    }
    sum = sum_of_block(sum, of_warps);
    const float scale = __fdiv_rn(1.0F, __fsqrt_rn(sum / static_cast<float>(p.row_size) + p.eps));
    // The second reading finds the row in L1; every thread reads what it has written itself.
    const Vector* rows = update != nullptr ? sums : x;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const Vector values = rows[i];
      const Vector gains = weight[i];
      Vector result;
      for (int e = 0; e < kSize; ++e) {
        const T scaled = round_to<T>(widen(values.at[e]) * scale);
        result.at[e] = round_to<T>(widen(scaled) * widen(gains.at[e]));
      }
      y[i] = result;
    }
  }

 private:
  static __device__ __forceinline__ float sum_of_warp(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0U, x, lanes);
    return x;
  }
  static __device__ __forceinline__ float sum_of_block(float x, float* of_warps) {
    x = sum_of_warp(x);
    if constexpr (kWarps == 1) return x;
    const unsigned lane = threadIdx.x % 32;
    if (lane == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    return sum_of_warp(lane < kWarps ? of_warps[lane] : 0.0F);
  }
};

/// kThreads packs a block; packs of all rows are counted through.
template <typename T, int kSize, int kThreads>
struct SwigluBlock {
  static __device__ __forceinline__ void run(const Swiglu& p) {
    using Vector = Pack<T, kSize>;
    const int64_t n = p.row_size / kSize;
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= p.n_rows * n) return;
    const Vector* row = static_cast<const Vector*>(p.gate_up) + i / n * 2 * n;
    const Vector gates = row[i % n];
    const Vector ups = row[n + i % n];
    Vector result;
    for (int e = 0; e < kSize; ++e) {
      const float gate = widen(gates.at[e]);
      const T silu = round_to<T>(gate / (1.0F + expf(-gate)));
      result.at[e] = round_to<T>(widen(silu) * widen(ups.at[e]));
    }
    static_cast<Vector*>(p.y)[i] = result;
  }
};

}  // namespace rotunda::kernels
