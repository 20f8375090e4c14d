#pragma once

#include "kernels/attention/paged_decode.cuh"

/// What codecs share whose lanes read words of codes in pieces of 16 bytes: lane 4 g + t has, of 32 tokens, the keys and the scores of
/// 4 g .. 4 g + 3, and of 32 channels the values of 4 g .. 4 g + 3, all for query head t.
namespace rotunda::kernels {

__device__ __forceinline__ uint4 piece_at(const std::byte* at) { return *reinterpret_cast<const uint4*>(at); }

/// Where a 16-byte piece of keys lies in shared memory, so that the eight lanes of a phase of a 16-byte load find theirs in different
/// banks. Places go along by multiples of 16 pieces.
__device__ __forceinline__ int key_piece_place(int piece) { return piece ^ (piece >> 3 & 1) << 1; }

/// The fp16 scales of the lane's four tokens. @param scales of the 32
__device__ __forceinline__ void load_four_scales(const std::byte* scales, int g, float (&to)[4]) {
  struct alignas(8) FourHalves {
    __half2 x, y;
  };
  const FourHalves four = *reinterpret_cast<const FourHalves*>(scales + 8 * g);
  const float2 a = __half22float2(four.x);
  const float2 b = __half22float2(four.y);
  to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}

/// Whether all tokens of a unit are attended. All lanes ask together.
template <int kUnitTokens>
__device__ __forceinline__ bool attends_all(const UnitAt& at) {
  const bool masked = at.masks != nullptr && at.masks[threadIdx.x % (kUnitTokens / 16)] != 0xffffU;
  return at.tokens >= kUnitTokens && at.first <= 0 && __ballot_sync(kAllLanes, masked) == 0;
}

/// Which of four tokens of a unit are attended, a bit each. @param first of the four
__device__ __forceinline__ unsigned attended_of_four(const UnitAt& at, int first) {
  const int there = at.tokens - first;
  const int before = at.first - first;
  unsigned attended = there >= 4 ? 15U : there <= 0 ? 0U : (1U << there) - 1;
  if (before > 0) attended &= before >= 4 ? 0U : 15U << before;
  if (at.masks != nullptr) attended &= static_cast<unsigned>(at.masks[first / 16]) >> first % 16;
  return attended;
}

/// A codec's write_out.
template <int kHeadDim, int kSets>
__device__ __forceinline__ void write_four_channels(const WarpState<kHeadDim, kSets>& state, float* to, int row) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
#pragma unroll
  for (int s = 0; s < kSets; ++s) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const float* const out = state.out[s] + 4 * c;
      *reinterpret_cast<float4*>(to + (4 * s + t) * row + 32 * c + 4 * g) = make_float4(out[0], out[1], out[2], out[3]);
    }
  }
}

}  // namespace rotunda::kernels
