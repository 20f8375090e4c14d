#pragma once

#include "kernels/attention/paged_decode.cuh"
#include "kernels/cuda/sixteen_bit.cuh"
#include "kv/house/kernels/shift_query_params.h"

namespace rotunda::kv::house {

/// Pages that a warp makes operands for.
inline constexpr int kShiftPages = 4;

inline constexpr int shift_query_warps(int batch, int n_kv_heads, int pages) {
  return batch * n_kv_heads * ((pages + kShiftPages - 1) / kShiftPages);
}

/// The kernel's body: a warp makes the operands of a (sequence, kv head) for kShiftPages pages. Lane 4 g + t: query head g / 2 of a set,
/// pairs t and 4 + t of a step.
template <int kHeadDim, int kSets>
__device__ inline void shift_query_warp(const ShiftQueries& p, int warp) {
  constexpr int kHalf = kHeadDim / 2;
  const int lane = static_cast<int>(threadIdx.x % kernels::kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  const int of_pages = (p.pages + kShiftPages - 1) / kShiftPages;
  const int head = warp / of_pages % p.n_kv_heads;
  const int seq = warp / of_pages / p.n_kv_heads;
  if (seq >= p.batch) return;
  const int begin = max(warp % of_pages * kShiftPages, p.first_token == nullptr ? 0 : p.first_token[seq] / 128);
  const int end = min((warp % of_pages + 1) * kShiftPages, (p.stored_len[seq] + 127) / 128);
  if (begin >= end) return;
  const float* const mu = p.shift + int64_t{head} * kHeadDim;
  const uint16_t* const pairs = p.pairs + head * 8 * p.n_steps;
  const int n_pairs = p.n_pairs[head];
  const int64_t first_row = (int64_t{seq} * p.n_kv_heads + head) * p.n_q;
  // a and b of pair i of query head h.
  const auto product = [&](int h, int i) {
    if (h >= p.n_q || i >= n_pairs) return make_float2(0, 0);
    const float* const q = p.q + (first_row + h) * kHeadDim;
    const int pair = pairs[i];
    return make_float2(q[pair] * mu[pair] + q[pair + kHalf] * mu[pair + kHalf], q[pair + kHalf] * mu[pair] - q[pair] * mu[pair + kHalf]);
  };
  // All that is read is asked for before any of it is used: a chain of reads is what a launch as short as this one spends its time on.
  for (int step = 0; step < p.n_steps; ++step) {
    float2 ab[kSets][2];
    float2 turn[kShiftPages][2];
    float norm[kSets] = {};  // at least sqrt(a^2 + b^2) of every pair of the head, not of this step alone
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = pairs[8 * step + 4 * i + t];
#pragma unroll
      for (int page = 0; page < kShiftPages; ++page)
        if (begin + page < end) turn[page][i] = p.page_table[int64_t{begin + page} * kHalf + pair];
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        ab[s][i] = product(4 * s + g / 2, 8 * step + 4 * i + t);
        norm[s] = fmaxf(norm[s], fabsf(ab[s][i].x) + fabsf(ab[s][i].y));
      }
    }
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int h = 4 * s + g / 2;
      for (int i = t; i < 8 * p.n_steps; i += 4) {
        if (i / 8 == step) continue;
        const float2 other = product(h, i);
        norm[s] = fmaxf(norm[s], fabsf(other.x) + fabsf(other.y));
      }
      norm[s] = fmaxf(norm[s], __shfl_xor_sync(kernels::kAllLanes, norm[s], 1));
      norm[s] = fmaxf(norm[s], __shfl_xor_sync(kernels::kAllLanes, norm[s], 2));
      // Every warp of the (sequence, kv head) writes the same number.
      if (t == 0 && g % 2 == 0 && h < p.n_q) p.norm[first_row + h] = norm[s];
      const float inverse = norm[s] > 0 ? 1.0F / norm[s] : 0.0F;
#pragma unroll
      for (float2& x : ab[s]) x = make_float2(x.x * inverse, x.y * inverse);
    }
#pragma unroll
    for (int page = 0; page < kShiftPages; ++page) {
      if (begin + page >= end) break;
      const int64_t at = ((int64_t{seq} * p.n_kv_heads + head) * p.pages + begin + page) * p.n_steps + step;
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        uint32_t words[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 x = ab[s][i];
          const float2 by = turn[page][i];
          words[i] = kernels::pack_two<__half>(x.x * by.x + x.y * by.y, x.y * by.x - x.x * by.y, g % 2 != 0);
        }
        p.queries[(at * kSets + s) * kernels::kWarp + lane] = make_uint2(words[0], words[1]);
      }
    }
  }
}

}  // namespace rotunda::kv::house
