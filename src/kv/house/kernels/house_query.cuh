#pragma once

#include "kernels/attention/paged_decode.cuh"
#include "kv/house/kernels/house_query_params.h"

namespace rotunda::kv::house {

/// The fast Walsh-Hadamard transform of one row, times `factor`: lane l holds channels l, l + 32, ...
template <int kHeadDim>
__device__ __forceinline__ void rotate_row(float (&x)[kHeadDim / kernels::kWarp], float factor) {
  constexpr int kElements = kHeadDim / kernels::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kernels::kWarp;
#pragma unroll
  for (int step = 1; step < kernels::kWarp; step *= 2) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float other = __shfl_xor_sync(kernels::kAllLanes, x[i], step);
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
  for (int i = 0; i < kElements; ++i) x[i] *= factor;
}

/// The kernel's body: one warp a query head.
template <int kHeadDim>
__device__ inline void house_query_warps(const HouseQueries& p, int warps_per_block) {
  constexpr int kElements = kHeadDim / kernels::kWarp;
  // 1 / sqrt(kHeadDim)
  constexpr float kFactor = kHeadDim == 64 ? 0.125F : kHeadDim == 128 ? 0.08838834764831845F : 0.0625F;
  const int lane = static_cast<int>(threadIdx.x) % kernels::kWarp;
  const int row = static_cast<int>(blockIdx.x) * warps_per_block + static_cast<int>(threadIdx.x) / kernels::kWarp;
  if (row >= p.batch * p.n_kv_heads * p.n_q) return;
  const float* const q = p.q + int64_t{row} * kHeadDim;
  float x[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = q[kernels::kWarp * i + lane];
  rotate_row<kHeadDim>(x, kFactor);
#pragma unroll
  for (int i = 0; i < kElements; ++i) p.rotated[int64_t{row} * kHeadDim + kernels::kWarp * i + lane] = x[i];
  if (p.n_steps == 0) return;

  const int head = row / p.n_q % p.n_kv_heads;
  constexpr int kHalf = kHeadDim / 2;
  const float* const mu = p.shift + int64_t{head} * kHeadDim;
  float largest = 0;
  for (int i = lane; i < 8 * p.n_steps; i += kernels::kWarp) {
    float2 ab = make_float2(0, 0);
    if (i < p.n_pairs[head]) {
      const int pair = p.pairs[head * 8 * p.n_steps + i];
      ab.x = q[pair] * mu[pair] + q[pair + kHalf] * mu[pair + kHalf];
      ab.y = q[pair + kHalf] * mu[pair] - q[pair] * mu[pair + kHalf];
    }
    p.ab[int64_t{row} * 8 * p.n_steps + i] = ab;
    largest = fmaxf(largest, fabsf(ab.x) + fabsf(ab.y));
  }
#pragma unroll
  for (int step = 1; step < kernels::kWarp; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kernels::kAllLanes, largest, step));
  if (lane == 0) p.norm[row] = largest;
}

}  // namespace rotunda::kv::house
