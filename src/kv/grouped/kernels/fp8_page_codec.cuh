#pragma once

#include "kernels/attention/four_tokens.cuh"
#include "kernels/cuda/e4m3.cuh"
#include "kernels/cuda/sixteen_bit.cuh"
#include "kv/grouped/kernels/fp8_unit.h"
#include "kv/grouped/kernels/grouped_page.h"

namespace rotunda::kv::grouped {

using kernels::kLog2e;
using kernels::kWarp;
using kernels::PagedDecode;
using kernels::piece_at;
using kernels::UnitAt;
using kernels::WarpState;
namespace ptx = kernels::ptx;

/// Codec of fp8 for decode attention on GPUs: e4m3 codes, one fp16 scale per token and head, 32 tokens of one kv head a unit. Codes become
/// fp16 numbers in registers, exactly, and are the left operands of the tensor cores' products: tokens (for values: channels) are rows,
/// query heads are columns. A head has two columns: what fp16 holds of the query (the weight) and what that leaves over.
///
/// A word of keys is four channels of a token, a word of values four tokens of a channel: four neighbours in k, which a product takes in
/// any order as long as both operands have the same. Lane 4 g + t reads 16 bytes, word t of four of tokens 4 g .. 4 g + 3: rows g and g + 8
/// of two products, whose scores end in the lane that read them. A token's scale multiplies its score and its weight.
template <int kHeadDim, int kSets>
struct Fp8PageCodec {
  static constexpr int kPageTokens = 128;
  static constexpr int kUnitTokens = kFp8UnitTokens;
  using State = WarpState<kHeadDim, kSets>;
  using Halves = kernels::HalvesOfE4m3;

  static constexpr GroupedPageLayout layout() {
    constexpr GroupedSide kSide{8, kHeadDim, ScaleType::kFp16, 0, false};
    return {kSide, kSide, 1, kHeadDim, kPageTokens / kTokenBlock};
  }
  static constexpr int kHeadBytes = static_cast<int>(layout().head_bytes());
  static constexpr int kUnits = kPageTokens / kUnitTokens;  // of a page
  static constexpr int kKeyBytes = static_cast<int>(layout().key_codes_bytes()) / kUnits;
  static constexpr int kValueBytes = static_cast<int>(layout().value_codes_bytes()) / kUnits;
  static constexpr int kScaleBytes = 2 * kUnitTokens;  // of keys, of values
  static constexpr int kScalesAt = kKeyBytes;          // behind the keys, with which they come
  static constexpr int kStageBytes = (kKeyBytes + 2 * kScaleBytes + 127) / 128 * 128;
  static constexpr int kMaxWarps = kHeadDim <= 128 ? (kSets == 1 ? 16 : 12) : (kSets == 1 ? 12 : 8);
  static constexpr int kBlockPieces = kKeyBytes / 2 / 16;  // 16-byte pieces of a block's keys
  static constexpr int kValueRow = kHeadDim / 4;           // 16-byte pieces of a row of values
  static constexpr int kSteps = kHeadDim / 16;             // of 16 channels
  static constexpr int kGroupBytes = 64;                   // of the weights in transit, see weight_place
  static_assert(kKeyBytes == kValueBytes && kSets * (kUnitTokens / 4) * kGroupBytes <= kKeyBytes);

  struct Query {
    uint32_t b[kSets][kSteps][2];  ///< four channels of column g
  };

  struct Weights {
    uint32_t b[kSets][2][2];  ///< of column g: tokens 16 half + 4 t .. + 3
    float keep[kSets];        ///< what is left of the sums so far
    float scale;              ///< of what the weights add up to
  };

  static __device__ Query load_query(const PagedDecode& p, int seq, int head) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    const bool rest = g % 2 != 0;
    Query query;
    const float* const base = p.q_pages + (int64_t{seq} * p.n_kv_heads + head) * p.n_q * kHeadDim;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int h = 4 * s + g / 2;
      const float scale = h < p.n_q ? kLog2e : 0.0F;
      const float* const q = base + (h < p.n_q ? h : 0) * kHeadDim + 4 * t;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const float4 x = *reinterpret_cast<const float4*>(q + 16 * k);
        query.b[s][k][0] = kernels::pack_two<__half>(x.x * scale, x.y * scale, rest);
        query.b[s][k][1] = kernels::pack_two<__half>(x.z * scale, x.w * scale, rest);
      }
    }
    return query;
  }

  // ---- shared memory -----------------------------------------------------------------------------------------------

  /// Row `row` of values is read by lanes t = row % 4, whose pieces have to lie in other banks than those of the other t.
  static __device__ __forceinline__ int value_place(int row, int piece) { return row * kValueRow + (piece ^ (row & 3) << 1); }

  /// Scales, of keys and of values, come with the keys.
  template <bool kValues>
  static __device__ __forceinline__ void copy(const PagedDecode&, std::byte* stage, const UnitAt& at) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const std::byte* const head = at.bytes + int64_t{at.head} * kHeadBytes;
    constexpr int kPieces = kKeyBytes / 16;
    static_assert(kPieces % kWarp == 0);
    if constexpr (kValues) {
      const std::byte* const from = head + kUnits * kKeyBytes + at.piece * kValueBytes + 16 * lane;
#pragma unroll
      for (int i = 0; i < kPieces; i += kWarp) {
        const int row = i / kValueRow + (kValueRow < kWarp ? lane / kValueRow : 0);
        const int piece = i % kValueRow + lane % kValueRow;
        ptx::copy_16_async(stage + 16 * value_place(row, piece), from + 16 * i);
      }
    } else {
      const std::byte* const from = head + at.piece * kKeyBytes + 16 * lane;
      std::byte* const keys = stage + 16 * kernels::key_piece_place(lane);
#pragma unroll
      for (int i = 0; i < kPieces; i += kWarp) ptx::copy_16_async(keys + 16 * i, from + 16 * i);
      constexpr int kScalePieces = kScaleBytes / 16;
      if (lane < 2 * kScalePieces) {
        const int place = at.piece * kScalePieces + lane + (lane < kScalePieces ? 0 : (kUnits - 1) * kScalePieces);
        ptx::copy_16_async(stage + kScalesAt + 16 * lane, head + kUnits * (kKeyBytes + kValueBytes) + 16 * place);
      }
    }
  }

  // Weights on their way from the lanes of their tokens to those of their columns: [8 groups of four tokens][8 columns] of 8 bytes. Every
  // other two groups have their halves exchanged, against bank conflicts of those who read.
  static __device__ __forceinline__ int weight_place(int group, int column) { return group * kGroupBytes + (8 * column ^ (group & 2) << 4); }

  // ---- attention ---------------------------------------------------------------------------------------------------

  /// The left operands of two products out of four words: rows g and g + 8 of the first are words 0 and 1.
  static __device__ __forceinline__ void operands(const uint4& words, uint32_t (&a)[2][4]) {
    Halves::split(words.x, a[0][0], a[0][2]);
    Halves::split(words.y, a[0][1], a[0][3]);
    Halves::split(words.z, a[1][0], a[1][2]);
    Halves::split(words.w, a[1][1], a[1][3]);
  }

  /// Scores of the lane's tokens 4 g + r and head t, in log 2.
  static __device__ __forceinline__ void score(const std::byte* stage, const Query& query, float (&scores)[kSets][4]) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    static_assert(kBlockPieces % 16 == 0);
    const std::byte* const at = stage + 16 * kernels::key_piece_place(g / 4 * kBlockPieces + 4 * t + g % 4);
    float sums[kSets][2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[2][4];
      operands(piece_at(at + 256 * k), a);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int s = 0; s < kSets; ++s) ptx::mma(sums[s][pair], a[pair], query.b[s][k][0], query.b[s][k][1], __half());
      }
    }
    float scales[4];
    kernels::load_four_scales(stage + kScalesAt, g, scales);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float* const sum = sums[s][r / 2] + r % 2 * 2;
        scores[s][r] = (sum[0] + sum[1]) * (scales[r] * Halves::kUnit);
      }
    }
  }

  static __device__ __forceinline__ Weights attend_keys(const PagedDecode&, std::byte* stage, const UnitAt& at, const Query& query,
                                                        State& state) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    const bool all = kernels::attends_all<kUnitTokens>(at);
    float scores[kSets][4];
    score(stage, query, scores);
    float scales[4];
    kernels::load_four_scales(stage + kScalesAt + kScaleBytes, g, scales);
    if (!all) {
      const unsigned attended = kernels::attended_of_four(at, 4 * g);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if ((attended >> r & 1U) != 0) continue;
        scales[r] = 0;
#pragma unroll
        for (int s = 0; s < kSets; ++s) scores[s][r] = -INFINITY;
      }
    }
    // Weights are probability times scale; the unit's largest scale becomes 2^14, so that fp16 has room below for what a long context makes
    // of probabilities.
    constexpr float kLargest = 16384.0F;
    const float largest = kernels::max_over_rows(fmaxf(fmaxf(scales[0], scales[1]), fmaxf(scales[2], scales[3])));
    const float inverse = largest > 0 ? kLargest * ptx::reciprocal_approximate(largest) : 0.0F;
#pragma unroll
    for (float& scale : scales) scale *= inverse;
    Weights weights;
    weights.scale = largest * (Halves::kUnit / kLargest);
    __syncwarp();  // the keys have been read
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float of_unit = fmaxf(fmaxf(scores[s][0], scores[s][1]), fmaxf(scores[s][2], scores[s][3]));
      const float top = fmaxf(state.max[s], kernels::max_over_rows(of_unit));
      const float base = top == -INFINITY ? 0.0F : top;
      weights.keep[s] = ptx::exp2_approximate(state.max[s] - base);
      state.max[s] = top;
      float sum = 0;
      float w[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float probability = ptx::exp2_approximate(scores[s][r] - base);
        sum += probability;
        w[r] = probability * scales[r];
      }
      state.sum[s] = fmaf(state.sum[s], weights.keep[s], sum);
      using kernels::pack_two;
      *reinterpret_cast<uint4*>(stage + s * (8 * kGroupBytes) + weight_place(g, 2 * t)) = {
          pack_two<__half>(w[0], w[1], false), pack_two<__half>(w[2], w[3], false), pack_two<__half>(w[0], w[1], true),
          pack_two<__half>(w[2], w[3], true)};
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 two = *reinterpret_cast<const uint2*>(stage + s * (8 * kGroupBytes) + 4 * half * kGroupBytes + weight_place(t, g));
        weights.b[s][half][0] = two.x;
        weights.b[s][half][1] = two.y;
      }
    }
    return weights;
  }

  static __device__ __forceinline__ void add_values(const std::byte* values, const Weights& weights, State& state) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    const std::byte* const at = values + 16 * value_place(t, g);
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      float sums[kSets][2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
        operands(piece_at(at + 16 * (4 * half * kValueRow + 8 * c)), a);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
          for (int s = 0; s < kSets; ++s) ptx::mma(sums[s][pair], a[pair], weights.b[s][half][0], weights.b[s][half][1], __half());
        }
      }
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* const sum = sums[s][r / 2] + r % 2 * 2;
          float& out = state.out[s][4 * c + r];
          out = fmaf(sum[0] + sum[1], weights.scale, out * weights.keep[s]);
        }
      }
    }
  }

  static __device__ __forceinline__ void write_out(const State& state, float* to, int row) { kernels::write_four_channels(state, to, row); }
};

}  // namespace rotunda::kv::grouped
