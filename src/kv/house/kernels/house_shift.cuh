#pragma once

#include "kernels/attention/paged_decode.cuh"
#include "kv/house/kernels/house_shift_params.h"

namespace rotunda::kv::house {

/// The kernel's body: one warp a query head.
__device__ inline void shift_of_queries(const ShiftOfQueries& p, int warps_per_block) {
  const int lane = static_cast<int>(threadIdx.x) % kernels::kWarp;
  const int row = static_cast<int>(blockIdx.x) * warps_per_block + static_cast<int>(threadIdx.x) / kernels::kWarp;
  if (row >= p.batch * p.n_kv_heads * p.n_q) return;
  const int head = row / p.n_q % p.n_kv_heads;
  const int half = p.head_dim / 2;
  const float* const q = p.q + int64_t{row} * p.head_dim;
  const float* const mu = p.shift + int64_t{head} * p.head_dim;
  float largest = 0;
  for (int i = lane; i < 8 * p.n_steps; i += kernels::kWarp) {
    float2 ab = make_float2(0, 0);
    if (i < p.n_pairs[head]) {
      const int pair = p.pairs[head * 8 * p.n_steps + i];
      ab.x = q[pair] * mu[pair] + q[pair + half] * mu[pair + half];
      ab.y = q[pair + half] * mu[pair] - q[pair] * mu[pair + half];
    }
    p.ab[int64_t{row} * 8 * p.n_steps + i] = ab;
    largest = fmaxf(largest, fabsf(ab.x) + fabsf(ab.y));
  }
#pragma unroll
  for (int step = 1; step < kernels::kWarp; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kernels::kAllLanes, largest, step));
  if (lane == 0) p.norm[row] = largest;
}

}  // namespace rotunda::kv::house
