#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "kernels/cuda/ptx.cuh"
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
  static constexpr int kHeld = 4;  ///< packs that a thread keeps in registers; of longer rows the rest is read twice
  using Vector = Pack<T, kSize>;

  /// @param of_warps [kWarps] in shared memory
  static __device__ __forceinline__ void run(const RmsNorm& p, float* of_warps) {
    const int64_t n = p.row_size / kSize;
    const Vector* x = static_cast<const Vector*>(p.x) + blockIdx.x * n;
    const Vector* update = p.update == nullptr ? nullptr : static_cast<const Vector*>(p.update) + blockIdx.x * n;
    Vector* sums = p.update == nullptr ? nullptr : static_cast<Vector*>(p.sum) + blockIdx.x * n;
    const Vector* weight = static_cast<const Vector*>(p.weight);
    Vector* y = static_cast<Vector*>(p.y) + blockIdx.x * n;
    const int64_t first = threadIdx.x;
    const auto for_held = [&](const auto& run) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (first + h * kThreads < n) run(h, first + h * kThreads);
    };
    Vector values[kHeld], more[kHeld], gains[kHeld];
    // Weights are no other launch's work.
    for_held([&](int h, int64_t i) { gains[h] = weight[i]; });
    ptx::wait_for_launches_before();
    for_held([&](int h, int64_t i) { values[h] = x[i]; });
    if (update != nullptr) for_held([&](int h, int64_t i) { more[h] = update[i]; });
    float sum = 0.0F;
    for_held([&](int h, int64_t i) {
      if (update != nullptr) sums[i] = values[h] = added(values[h], more[h]);
      sum += squares(values[h]);
    });
    for (int64_t i = first + kHeld * kThreads; i < n; i += kThreads) {
      Vector of_row = x[i];
      if (update != nullptr) sums[i] = of_row = added(of_row, update[i]);
      sum += squares(of_row);
    }
    sum = sum_of_block(sum, of_warps);
    const float scale = __fdiv_rn(1.0F, __fsqrt_rn(sum / static_cast<float>(p.row_size) + p.eps));
    for_held([&](int h, int64_t i) { y[i] = scaled(values[h], scale, gains[h]); });
    // Every thread reads what it has written itself.
    const Vector* rows = update != nullptr ? sums : x;
    for (int64_t i = first + kHeld * kThreads; i < n; i += kThreads) y[i] = scaled(rows[i], scale, weight[i]);
  }

 private:
  static __device__ __forceinline__ Vector added(Vector x, const Vector& update) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) x.at[e] = round_to<T>(widen(x.at[e]) + widen(update.at[e]));
    return x;
  }
  static __device__ __forceinline__ float squares(const Vector& x) {
    float sum = 0.0F;
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum += widen(x.at[e]) * widen(x.at[e]);
    return sum;
  }
  static __device__ __forceinline__ Vector scaled(const Vector& x, float scale, const Vector& gains) {
    Vector result;
#pragma unroll
    for (int e = 0; e < kSize; ++e) result.at[e] = round_to<T>(widen(round_to<T>(widen(x.at[e]) * scale)) * widen(gains.at[e]));
    return result;
  }
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
