#pragma once

#include "kernels/attention/four_tokens.cuh"
#include "kernels/cuda/sixteen_bit.cuh"
#include "kv/house/kernels/house_page.h"
#include "kv/house/kernels/house_unit.h"

namespace rotunda::kv::house {

using kernels::kAllLanes;
using kernels::kLog2e;
using kernels::key_piece_place;
using kernels::kWarp;
using kernels::load_four_scales;
using kernels::PagedDecode;
using kernels::piece_at;
using kernels::UnitAt;
using kernels::WarpState;
namespace ptx = kernels::ptx;

/// Codec of rotunda2/3/4 for decode attention on GPUs: half a page of one kv head is a unit. Codes go to the tensor cores as bytes, straight
/// from their words by one mask per four elements, as left operands: tokens (for values: channels) are rows, query heads are columns.
/// Nothing is undone per cached token.
///
/// Lane 4 g + t reads 16 bytes of a key row of words: word t of tokens 4g .. 4g + 3 of 32, so that rows g and g + 8 of two products are
/// these four tokens, and their scores end in the lane that read them. Queries and weights enter as integers of two bytes, each byte a
/// column: column 2 h the upper, 2 h + 1 the lower, so both lie in the same lane of the result. A weight is 14 bits, one step per unit
/// and head.
///
/// 2 and 3 bits: every other group of four codes is left where it stands in the word, two bits up, and its factor is divided by four
/// (queries are multiples of four): half the shifts.
template <int kKeyBits, int kValueBits, int kHeadDim, int kSets>
struct HousePageCodec {
  static constexpr int kPageTokens = 128;
  static constexpr int kUnitTokens = kHouseUnitTokens;
  static constexpr int kBlocks = kPageTokens / 16;
  using State = WarpState<kHeadDim, kSets>;

  static constexpr HousePageLayout layout() { return {kKeyBits, kValueBits, 1, kHeadDim, kBlocks}; }
  static constexpr int kHeadBytes = static_cast<int>(layout().head_bytes());
  static constexpr int kUnits = kPageTokens / kUnitTokens;  // of a page
  static constexpr int kKeyBytes = static_cast<int>(layout().key_codes_bytes()) / kUnits;
  static constexpr int kValueBytes = static_cast<int>(layout().value_codes_bytes()) / kUnits;
  static constexpr int kScaleBytes = 2 * kUnitTokens;  // of keys, of values
  static constexpr int kWeightWords = kUnitTokens / 4 * 10;  // of the weights in transit, see weight_place
  /// They take the place of the keys' codes, which have been read by then, and of more where there is too little room.
  static constexpr int kScalesAt = kSets * kWeightWords * 4 <= kKeyBytes ? kKeyBytes : kSets * kWeightWords * 4;
  /// Of a shift the right operands of the first step, behind the scales.
  static constexpr int kShiftAt = kScalesAt + 2 * kScaleBytes;
  static constexpr int kShiftBytes = kSets * kWarp * 8;
  static constexpr int kKeyStageBytes = kShiftAt + kShiftBytes;
  static constexpr int kStageBytes = ((kKeyStageBytes > kValueBytes ? kKeyStageBytes : kValueBytes) + 127) / 128 * 128;
  static constexpr int kMaxWarps = kSets == 2 || kHeadDim > 128 ? 8 : 16;
  static constexpr int kKeyRow = static_cast<int>(layout().key_words()) * 4;  // 16-byte pieces of a block's keys
  static constexpr int kValueRow = kHeadDim / 4;                              // 16-byte pieces of a row of values

  // ---- codes as bytes ----------------------------------------------------------------------------------------------

  /// Byte groups of a word.
  template <int kBits>
  static constexpr int kGroups = kBits == 4 ? 2 : 4;
  /// Words of a token's key that one lane reads, four apart.
  static constexpr int kKeyWords = kHeadDim / 4 / (kKeyBits == 4 ? 8 : 16);

  /// Codes of a word as byte groups; of 2 and 3 bits groups 1 and 3 are four times the code.
  /// @param high 3 bits: the high bits of the word's four groups in bits 0 to 3 of each byte
  template <int kBits>
  static __device__ __forceinline__ void split(uint32_t word, uint32_t high, uint32_t (&groups)[kGroups<kBits>]) {
    if constexpr (kBits == 4) {
      groups[0] = word & 0x0f0f0f0fU;
      groups[1] = word >> 4 & 0x0f0f0f0fU;
    } else {
      groups[0] = word & 0x03030303U;
      groups[1] = word & 0x0c0c0c0cU;
      word >>= 4;
      groups[2] = word & 0x03030303U;
      groups[3] = word & 0x0c0c0c0cU;
      if constexpr (kBits == 3) {
        groups[0] |= high << 2 & 0x04040404U;
        groups[1] |= high << 3 & 0x10101010U;
        groups[2] |= high & 0x04040404U;
        groups[3] |= high << 1 & 0x10101010U;
      }
    }
  }
  /// What a factor of group j has to be divided by.
  template <int kBits>
  static constexpr int divisor(int j) {
    return kBits != 4 && j % 2 != 0 ? 4 : 1;
  }

  // ---- queries -----------------------------------------------------------------------------------------------------

  struct Query {
    uint32_t b[kSets][kKeyWords][kGroups<kKeyBits>];  ///< four channels of column g
    float step[kSets];                                ///< of head t: score of one unit of integer times code value, in log 2
    float offset[kSets];                              ///< what a code value's offset adds up to
  };

  struct Weights {
    uint32_t b[kSets][kUnitTokens / 64][4];  ///< of column g: four tokens of block 4 half + t each
    float keep[kSets];                       ///< what is left of the sums so far
    float scale[kSets];                      ///< twice the step, for code values
    float offset[kSets];                     ///< of code values, times the sum of weights
  };

  static __device__ Query load_query(const PagedDecode& p, int seq, int head) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    constexpr int kGroup = kGroups<kKeyBits>;
    Query query;
    const float* const base = p.q_pages + (int64_t{seq} * p.n_kv_heads + head) * p.n_q * kHeadDim;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int h = 4 * s + g / 2;
      const bool there = h < p.n_q;
      const float* const q = base + (there ? h : 0) * kHeadDim;
      float top = 0;
#pragma unroll
      for (int w = 0; w < kKeyWords; ++w) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float4 x = *reinterpret_cast<const float4*>(q + 4 * (kGroup * (4 * w + t) + j));
          top = fmaxf(top, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
        }
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      // 8128 * 4 = 127 * 256: the upper byte of a multiple of four fits with its sign.
      constexpr float kLargest = 8128.0F;
      const float inverse = there && top > 1e-30F ? kLargest / top : 0.0F;
      int sum = 0;
#pragma unroll
      for (int w = 0; w < kKeyWords; ++w) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float4 x = *reinterpret_cast<const float4*>(q + 4 * (kGroup * (4 * w + t) + j));
          const int integers[4] = {__float2int_rn(x.x * inverse), __float2int_rn(x.y * inverse), __float2int_rn(x.z * inverse),
                                   __float2int_rn(x.w * inverse)};
          uint32_t word = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum += integers[i];
            const int factor = 4 / divisor<kKeyBits>(j) * integers[i];
            const int upper = (factor + 128) >> 8;
            word |= static_cast<uint32_t>((g % 2 == 0 ? upper : factor - 256 * upper) & 255) << (8 * i);
          }
          query.b[s][w][j] = word;
        }
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      // From column g = 2 t to the lanes that get head t's scores. A code value is twice the code less the offset.
      const float step = inverse > 0 ? top / kLargest * kLog2e : 0.0F;
      query.step[s] = 0.5F * __shfl_sync(kAllLanes, step, 8 * t);
      query.offset[s] =
          -2.0F * ((1 << kKeyBits) - 1) * query.step[s] * static_cast<float>(__shfl_sync(kAllLanes, sum, 8 * t));
    }
    return query;
  }

  // ---- shared memory -----------------------------------------------------------------------------------------------

  // 16-byte pieces lie where the eight lanes of a phase of a 16-byte load find them in different banks.
  /// Which of the four lanes t reads a row of values.
  static __device__ __forceinline__ int value_reader(int row) {
    if constexpr (kValueBits == 2) return row & 3;
    if constexpr (kValueBits == 4) return row >> 1 & 3;
    return (row % 3 == 2 ? row / 3 : row / 3 * 2 + row % 3) & 3;
  }
  static __device__ __forceinline__ int value_place(int row, int piece) { return row * kValueRow + (piece ^ value_reader(row) << 1); }

  /// Right operands of the shift for a unit's page: fewer than 2^32, or they would take as much memory as a GPU has.
  static __device__ __forceinline__ const uint2* shift_queries(const PagedDecode& p, const UnitAt& at) {
    return p.shift.queries + static_cast<unsigned>(((at.seq * p.n_kv_heads + at.head) * p.shift.pages + at.page) * p.shift.n_steps * (kSets * kWarp));
  }

  /// Scales, of keys and of values, come with the keys, and so do the right operands of a shift's first step.
  template <bool kValues>
  static __device__ __forceinline__ void copy(const PagedDecode& p, std::byte* stage, const UnitAt& at) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const std::byte* const head = at.bytes + static_cast<unsigned>(at.head * kHeadBytes);  // pages have less than 2^31 bytes
    constexpr int kKeyPieces = kKeyBytes / 16;
    constexpr int kValuePieces = kValueBytes / 16;
    constexpr int kScalePieces = kScaleBytes / 16;
    static_assert(kKeyPieces % kWarp == 0 && kValuePieces % kWarp == 0 && 2 * kScalePieces <= kWarp);
    if constexpr (kValues) {
      const std::byte* const from = head + kUnits * kKeyBytes + at.piece * kValueBytes + 16 * lane;
#pragma unroll
      for (int i = 0; i < kValuePieces; i += kWarp) {
        const int row = i / kValueRow + (kValueRow < kWarp ? lane / kValueRow : 0);
        const int piece = i % kValueRow + lane % kValueRow;
        ptx::copy_16_async(stage + 16 * value_place(row, piece), from + 16 * i);
      }
    } else {
      const std::byte* const from = head + at.piece * kKeyBytes + 16 * lane;
      std::byte* const keys = stage + 16 * key_piece_place(lane);
#pragma unroll
      for (int i = 0; i < kKeyPieces; i += kWarp) ptx::copy_16_async(keys + 16 * i, from + 16 * i);
      if (lane < 2 * kScalePieces) {
        const int place = at.piece * kScalePieces + lane + (lane < kScalePieces ? 0 : (kUnits - 1) * kScalePieces);
        ptx::copy_16_async(stage + kScalesAt + 16 * lane, head + kUnits * (kKeyBytes + kValueBytes) + 16 * place);
      }
      if (p.shift.n_steps > 0 && lane < kShiftBytes / 16) ptx::copy_16_async(stage + kShiftAt + 16 * lane, shift_queries(p, at) + 2 * lane);
    }
  }

  // ---- attention ---------------------------------------------------------------------------------------------------

  static constexpr int kTiles = kUnitTokens / 32;
  static constexpr int kHalves = kUnitTokens / 64;

  /// Adds what the shift took away from the scores: see PagedShift. Numbers in fp16 twice make 22 bits.
  static __device__ __forceinline__ void shift_scores(const PagedDecode& p, const std::byte* stage, const UnitAt& at,
                                                      float (&scores)[kSets][kTiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int t = lane % 4;
    float scale[kSets];  // of head t, in log 2
#pragma unroll
    for (int s = 0; s < kSets; ++s)
      scale[s] = 4 * s + t < p.n_q ? p.shift.norm[(at.seq * p.n_kv_heads + at.head) * p.n_q + 4 * s + t] * kLog2e : 0.0F;
    constexpr int kOperands = kUnitTokens / 16;
    const uint4* turns = p.shift.turns + (at.head * p.shift.n_steps * kUnits + at.piece) * (2 * kOperands * kWarp) + lane;
    uint2 b[kSets];
#pragma unroll
    for (int s = 0; s < kSets; ++s) b[s] = reinterpret_cast<const uint2*>(stage + kShiftAt)[s * kWarp + lane];
    for (int step = 0;;) {
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
        const uint4 number = turns[2 * i * kWarp];
        const uint4 rest = turns[(2 * i + 1) * kWarp];
        const uint32_t numbers[4] = {number.x, number.y, number.z, number.w};
        const uint32_t rests[4] = {rest.x, rest.y, rest.z, rest.w};
#pragma unroll
        for (int s = 0; s < kSets; ++s) {
          float sum[4] = {};
          ptx::mma(sum, numbers, b[s].x, b[s].y, __half());
          ptx::mma(sum, rests, b[s].x, b[s].y, __half());
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float& score = scores[s][i / 2][i % 2 * 2 + r];
            score = fmaf(sum[2 * r] + sum[2 * r + 1], scale[s], score);
          }
        }
      }
      if (++step == p.shift.n_steps) break;
      turns += kUnits * 2 * kOperands * kWarp;
#pragma unroll
      for (int s = 0; s < kSets; ++s) b[s] = shift_queries(p, at)[(step * kSets + s) * kWarp + lane];
    }
  }

  /// Adds the scores of the lane's tokens 32 tile + 4 g + r and head t, in log 2.
  static __device__ __forceinline__ void score(const std::byte* stage, const Query& query, float (&scores)[kSets][kTiles][4]) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    // A place moves along by multiples of 16 pieces, by 8 with its second bit turned.
    static_assert(2 * kKeyRow % 16 == 0);
    const int row = g / 4 * kKeyRow + g % 4;
    const std::byte* const low_at = stage + 16 * key_piece_place(row + 4 * t);
    const int high_place = key_piece_place(row + kHeadDim / 4 + t / 2 * 4);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      int sums[kSets][2][4];
#pragma unroll
      for (int w = 0; w < kKeyWords; ++w) {
        const uint4 words = piece_at(low_at + 16 * (2 * tile * kKeyRow + 16 * w));
        uint4 high = words;
        if constexpr (kKeyBits == 3) {
          high = piece_at(stage + 16 * ((w % 2 == 0 ? high_place : high_place ^ 2) + 2 * tile * kKeyRow + 8 * w));
          const int shift = t % 2 * 4;
          high.x >>= shift, high.y >>= shift, high.z >>= shift, high.w >>= shift;
        }
        uint32_t codes[4][kGroups<kKeyBits>];
        split<kKeyBits>(words.x, high.x, codes[0]);
        split<kKeyBits>(words.y, high.y, codes[1]);
        split<kKeyBits>(words.z, high.z, codes[2]);
        split<kKeyBits>(words.w, high.w, codes[3]);
#pragma unroll
        for (int j = 0; j < kGroups<kKeyBits>; j += 2) {
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            const uint32_t a[4] = {codes[2 * pair][j], codes[2 * pair + 1][j], codes[2 * pair][j + 1], codes[2 * pair + 1][j + 1]};
#pragma unroll
            for (int s = 0; s < kSets; ++s) ptx::mma_u8s8(sums[s][pair], a, query.b[s][w][j], query.b[s][w][j + 1], w + j > 0);
          }
        }
      }
      float scales[4];
      load_four_scales(stage + kScalesAt + 64 * tile, g, scales);
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int integer = sums[s][r / 2][r % 2 * 2] * 256 + sums[s][r / 2][r % 2 * 2 + 1];
          scores[s][tile][r] = fmaf(fmaf(static_cast<float>(integer), query.step[s], query.offset[s]), scales[r], scores[s][tile][r]);
        }
      }
    }
  }

  /// Takes tokens out that are not attended.
  static __device__ __forceinline__ void mask(const UnitAt& at, float (&scores)[kSets][kTiles][4]) {
    const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int first = 32 * tile + 4 * g;
      const unsigned attended = kernels::attended_of_four(at, first);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if ((attended >> r & 1U) != 0) continue;
#pragma unroll
        for (int s = 0; s < kSets; ++s) scores[s][tile][r] = -INFINITY;
      }
    }
  }

  // Weights on their way from the lanes of their tokens to those of their columns: groups of four tokens, [group][8 columns] words.
  static __device__ __forceinline__ int weight_place(int group, int column) { return group * 8 + group / 4 * 8 + column; }

  /// What weights are multiplied by before they are rounded: largest weight 16256 = 127 * 128.
  static constexpr float kLargestWeight = 16256.0F;

  static __device__ __forceinline__ Weights attend_keys(const PagedDecode& p, std::byte* stage, const UnitAt& at, const Query& query,
                                                        State& state) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    float scores[kSets][kTiles][4] = {};
    const bool all = kernels::attends_all<kUnitTokens>(at);
    // First, while few registers are taken.
    if (p.shift.n_steps > 0) shift_scores(p, stage, at, scores);
    score(stage, query, scores);
    if (!all) mask(at, scores);

    Weights weights;
    float step[kSets];
    float scales[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) load_four_scales(stage + kScalesAt + kScaleBytes + 64 * tile, g, scales[tile]);
    __syncwarp();  // the keys have been read
    auto* const in_transit = reinterpret_cast<uint32_t*>(stage);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      float top = -INFINITY;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r) top = fmaxf(top, scores[s][tile][r]);
      }
      top = fmaxf(state.max[s], kernels::max_over_rows(top));
      const float base = top == -INFINITY ? 0.0F : top;
      weights.keep[s] = ptx::exp2_approximate(state.max[s] - base);
      state.max[s] = top;
      float sum = 0;
      float largest = 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float probability = ptx::exp2_approximate(scores[s][tile][r] - base);
          sum += probability;
          scores[s][tile][r] = probability * scales[tile][r];
          largest = fmaxf(largest, scores[s][tile][r]);
        }
      }
      state.sum[s] = fmaf(state.sum[s], weights.keep[s], sum);
      largest = kernels::max_over_rows(largest);
      const float inverse = largest > 1e-30F ? kLargestWeight * ptx::reciprocal_approximate(largest) : 0.0F;
      step[s] = largest * (1.0F / kLargestWeight);
      // Groups of codes that stand two bits up want a quarter.
      const float factor = divisor<kValueBits>(g) == 4 ? 0.25F * inverse : inverse;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t integers[4];
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
#pragma unroll
        for (int r = 0; r < 4; ++r) integers[r] = __float_as_uint(fmaf(scores[s][tile][r], factor, 12582912.0F));
        const uint32_t low = __byte_perm(integers[0], integers[1], 0x5410);
        const uint32_t high = __byte_perm(integers[2], integers[3], 0x5410);
        uint2 columns;  // bits 7 to 13 of the four, then bits 0 to 6
        columns.x = __byte_perm(low << 1, high << 1, 0x7531);
        columns.y = __byte_perm(low, high, 0x6420) & 0x7f7f7f7fU;
        *reinterpret_cast<uint2*>(in_transit + s * kWeightWords + weight_place(8 * tile + g, 2 * t)) = columns;
      }
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      int sums[4];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) weights.b[s][half][j] = in_transit[s * kWeightWords + weight_place(16 * half + 4 * t + j, g)];
        constexpr uint32_t kOnes = 0x01010101U;
        const uint32_t ones[4] = {kOnes, kOnes, divisor<kValueBits>(1) * kOnes, divisor<kValueBits>(1) * kOnes};
        ptx::mma_u8s8(sums, ones, weights.b[s][half][0], weights.b[s][half][1], half > 0);
        ptx::mma_u8s8(sums, ones, weights.b[s][half][2], weights.b[s][half][3], true);
      }
      weights.scale[s] = 2.0F * step[s];
      weights.offset[s] = -static_cast<float>((1 << kValueBits) - 1) * step[s] * static_cast<float>(sums[0] * 128 + sums[1]);
    }
    return weights;
  }

  static __device__ __forceinline__ void add_values(const std::byte* values, const Weights& weights, State& state) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    // Rows of block t; those of block 4 half + t lie kHalfRows further, and so does the turn of their pieces.
    constexpr int kHalfRows = kValueBits == 4 ? 8 : kValueBits == 3 ? 6 : 4;
    const std::byte* const low_at = values + 16 * value_place(kValueBits == 4 ? 2 * t : kValueBits == 3 ? t + t / 2 : t, g);
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      int sums[kSets][2][4];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        uint4 words = piece_at(low_at + 16 * (half * kHalfRows * kValueRow + 8 * c));
        uint4 high = words;
        if constexpr (kValueBits == 3) {
          high = piece_at(values + 16 * (value_place(half * kHalfRows + t / 2 * 3 + 2, g) + 8 * c));
          const int shift = t % 2 * 4;
          high.x >>= shift, high.y >>= shift, high.z >>= shift, high.w >>= shift;
        }
#pragma unroll
        for (int word = 0; word < 4 / kGroups<kValueBits>; ++word) {
          if (word > 0) words = piece_at(low_at + 16 * ((half * kHalfRows + word) * kValueRow + 8 * c));
          uint32_t codes[4][kGroups<kValueBits>];
          split<kValueBits>(words.x, high.x, codes[0]);
          split<kValueBits>(words.y, high.y, codes[1]);
          split<kValueBits>(words.z, high.z, codes[2]);
          split<kValueBits>(words.w, high.w, codes[3]);
#pragma unroll
          for (int j = 0; j < kGroups<kValueBits>; j += 2) {
            const int group = word * kGroups<kValueBits> + j;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              const uint32_t a[4] = {codes[2 * pair][j], codes[2 * pair + 1][j], codes[2 * pair][j + 1], codes[2 * pair + 1][j + 1]};
#pragma unroll
              for (int s = 0; s < kSets; ++s) {
                const uint32_t(&b)[4] = weights.b[s][half];
                ptx::mma_u8s8(sums[s][pair], a, b[group], b[group + 1], half + group > 0);
              }
            }
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int integer = sums[s][r / 2][r % 2 * 2] * 128 + sums[s][r / 2][r % 2 * 2 + 1];
          float& out = state.out[s][4 * c + r];
          out = fmaf(static_cast<float>(integer), weights.scale[s], fmaf(out, weights.keep[s], weights.offset[s]));
        }
      }
    }
  }

  static __device__ __forceinline__ void write_out(const State& state, float* to, int row) { kernels::write_four_channels(state, to, row); }
};

}  // namespace rotunda::kv::house
