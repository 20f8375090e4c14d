#pragma once

#include "kernels/attention/plain_block.cuh"
#include "kv/rotate/kernels/rotate_decode_shape.h"
#include "kv/rotate/kernels/rotate_page.h"

namespace rotunda::kv::rotate {

using kernels::kAllLanes;
using kernels::kLog2e;
using kernels::kWarp;
using kernels::PagedDecode;
using kernels::UnitAt;
using kernels::WarpState;
namespace ptx = kernels::ptx;

/// Codec of rotate2 for decode attention on GPUs: 16 tokens of the four kv heads of a rotation group are a unit; PagedDecode's kv head is
/// that group, and set s of its query heads are those of kv head s. Keys are rotated back in registers, 16 tokens by 512 channels of
/// fp16, and turned by RoPE; the query is turned back by the page's first position, so that one table of turns serves all pages.
///
/// The transform of 512 = 2^9 channels, by bits of the channel's number: lane 4 g + t reads word t (bits 5, 4) of a quarter of a head for
/// tokens g and g + 8. Bits 5 to 2 are a product with the Hadamard matrix of 16 on the tensor cores, whose result lies as its left operand
/// did: bits 5, 4 are the lane's t, bit 3 the half of a register, bit 2 the register. All other bits are butterflies between registers:
/// 1, 0 before it; 6, with the very channels that RoPE pairs, and the heads 8, 7 after it.
struct RotatePageCodec {
  static constexpr int kHeadDim = kRotateHeadDim;
  static constexpr int kSets = kRotateHeads;
  static constexpr int kPageTokens = 128;
  static constexpr int kUnitTokens = kRotateUnitTokens;
  static constexpr int kWords = kSets * kHeadDim / 16;  // of a token's keys
  using State = WarpState<kHeadDim, kSets>;

  // ---- a unit in shared memory -------------------------------------------------------------------------------------

  // Keys: codes, then scales and zero points of all groups. Values: codes of the four heads, their scales, their zero points.
  static constexpr int kKeyBytes = kWords * 16 * 4;
  static constexpr int kKeyScalesAt = kKeyBytes;
  static constexpr int kStageBytes = kKeyBytes + kRotateMostGroups * 16 * 4;
  static constexpr int kValueHeadBytes = 16 * kHeadDim / 4;
  static constexpr int kValueScalesAt = kSets * kValueHeadBytes;
  static constexpr int kValueZerosAt = kValueScalesAt + kSets * 32;
  static_assert(kValueZerosAt + kSets * 32 <= kStageBytes);

  /// Shared memory that outlives units: the turned queries as right operands [set][step][lane], then the scales of the unit's tokens.
  static constexpr int kQueryBytes = kSets * (kHeadDim / 16) * kWarp * 8;
  static constexpr int kScaleBytes = 4096;
  static constexpr int kScratchBytes = kQueryBytes + kScaleBytes;
  static_assert(rotate_scale_stride(kRotateMostGroups) * kRotateMostGroups <= kScaleBytes &&
                rotate_scale_stride(kRotateCopiedGroups) * kRotateCopiedGroups <= kScaleBytes);

  /// 16-byte pieces lie where the lanes of a phase find theirs in different banks. @param quad of the word's 16 tokens
  static __device__ __forceinline__ int key_place(int word, int quad) { return word * 4 + (quad ^ (word >> 1 & 1) * 2); }
  static __device__ __forceinline__ int value_row(int token) { return (token >> 1 & 3) | (token & 1) << 2 | (token & 8); }

  static __device__ __forceinline__ RotatePageLayout layout(const PagedDecode& p) {
    const int heads = p.n_kv_heads * kSets;
    const ZeroPoint zero = p.rotate.minimum ? ZeroPoint::kMinimum : ZeroPoint::kCode;
    return {2, zero, heads, kHeadDim, kSets, heads * kHeadDim / p.rotate.n_quant_groups, kPageTokens / 16};
  }

  template <bool kValues>
  static __device__ __forceinline__ void copy(const PagedDecode& p, std::byte* stage, const UnitAt& at) {
    if constexpr (kValues) copy_values(p, stage, at);
    else copy_keys(p, stage, at);
  }

  static __device__ __forceinline__ void copy_keys(const PagedDecode& p, std::byte* stage, const UnitAt& at) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const RotatePageLayout l = layout(p);
    const int groups = p.rotate.n_quant_groups;
    const std::byte* const keys = at.bytes + int64_t{at.head * (kPageTokens / 16) + at.piece} * kKeyBytes;
#pragma unroll
    for (int i = 0; i < kKeyBytes / 16 / kWarp; ++i) {
      const int piece = i * kWarp + lane;
      ptx::copy_16_async(stage + 16 * key_place(piece / 4, piece % 4), keys + 16 * piece);
    }
    const int zero_bytes = l.zero_bytes() * 16;  // of a group and block
    const std::byte* const scales = at.bytes + l.key_scale_offset() + int64_t{at.piece} * groups * 32;
    for (int i = lane; i < groups * 2; i += kWarp) ptx::copy_16_async(stage + kKeyScalesAt + 16 * i, scales + 16 * i);
    const std::byte* const zeros = at.bytes + l.key_zero_offset() + int64_t{at.piece} * groups * zero_bytes;
    for (int i = lane; i < groups * zero_bytes / 16; i += kWarp)
      ptx::copy_16_async(stage + kKeyScalesAt + groups * 32 + 16 * i, zeros + 16 * i);
  }

  static __device__ __forceinline__ void copy_values(const PagedDecode& p, std::byte* stage, const UnitAt& at) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const RotatePageLayout l = layout(p);
    const std::byte* const values = at.bytes + l.value_codes_offset();
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      static_assert(kValueHeadBytes == 16 * kWarp);
      const std::byte* const from = values + int64_t{(at.head * kSets + s) * kPageTokens + at.piece * 16} * (kHeadDim / 4);
      ptx::copy_16_async(stage + s * kValueHeadBytes + 16 * (value_row(lane / 2) * 2 + lane % 2), from + 16 * lane);
    }
    // One group a head: lanes 0 to 7 take scales, the next ones zero points.
    const int zero_bytes = l.zero_bytes() * 16;
    const int set = lane % 8 / 2;
    const int half = lane % 2;
    const int64_t row = int64_t{at.piece} * p.rotate.n_quant_groups + (at.head * kSets + set) * kHeadDim / l.group_size;
    std::byte* const to = stage + set * 32 + 16 * half;
    if (lane < 8) ptx::copy_16_async(to + kValueScalesAt, at.bytes + l.value_scale_offset() + row * 32 + 16 * half);
    else if (lane < 16 && 16 * half < zero_bytes)
      ptx::copy_16_async(to + kValueZerosAt, at.bytes + l.value_zero_offset() + row * zero_bytes + 16 * half);
  }

  // ---- queries -----------------------------------------------------------------------------------------------------

  struct Query {
    const float* q;  ///< of the group's query heads
    uint2* turned;   ///< by `page`: right operands [set][step][lane]
    std::byte* scales;
    int page;
    uint32_t hadamard[2][2];  ///< the matrix of 16 as a right operand, times 1/16
  };

  static __device__ Query load_query(const PagedDecode& p, int seq, int head, std::byte* scratch) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    Query query;
    query.q = p.q_pages + (int64_t{seq} * p.n_kv_heads + head) * p.n_q * kHeadDim;
    query.turned = reinterpret_cast<uint2*>(scratch);
    query.scales = scratch + kQueryBytes;
    query.page = -1;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Rows k = 8 r + 2 t and the next at column n = 8 x + g.
        const int n = 8 * x + lane / 4;
        const auto entry = [n](int k) { return 0x2c00U | static_cast<uint32_t>(__popc(static_cast<unsigned>(k & n)) & 1) << 15; };
        const int k = 8 * r + lane % 4 * 2;
        query.hadamard[x][r] = entry(k) | entry(k + 1) << 16;
      }
    }
    return query;
  }

  /// Turns the queries back by the page's first position. Step (hi, u) of a set has channels 64 hi + 16 t + 8 p + 4 x + u, row 2 t + p of
  /// operand x; column g is query head g / 2, the fp16 number and what it leaves over.
  static __device__ void turn_queries(const PagedDecode& p, Query& query, int page) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    constexpr float kScale = kLog2e * 0.70710678118654752F;  // keys come out of attend() sqrt(2) times too large
    const float2* const turns = p.rotate.page_table + int64_t{page} * (kHeadDim / 2);
    __syncwarp();
#pragma unroll 1
    for (int u = 0; u < 4; ++u) {
      float2 turn[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) turn[i] = turns[16 * t + 4 * i + u];
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        const float* const q = query.q + (4 * s + g / 2) * kHeadDim + 16 * t + u;
        float low[4];
        float high[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float a = q[4 * i] * kScale;
          const float b = q[4 * i + kHeadDim / 2] * kScale;
          low[i] = a * turn[i].x + b * turn[i].y;
          high[i] = b * turn[i].x - a * turn[i].y;
        }
        const bool rest = g % 2 != 0;
        const auto pack = [rest](const float(&x)[4]) {
          return make_uint2(kernels::pack_two<__half>(x[0], x[2], rest), kernels::pack_two<__half>(x[1], x[3], rest));
        };
        query.turned[(s * 8 + u) * kWarp + lane] = pack(low);
        query.turned[(s * 8 + 4 + u) * kWarp + lane] = pack(high);
      }
    }
    __syncwarp();
    query.page = page;
  }

  // ---- keys --------------------------------------------------------------------------------------------------------

  static __device__ __forceinline__ float half_at(const std::byte* at) { return __half2float(*reinterpret_cast<const __half*>(at)); }
  static __device__ __forceinline__ uint32_t two_halves(float x, float y) {
    return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(x))) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(y))) << 16;
  }

  /// Where a group has the scales of row g for lane t: every t has its own, in banks of its own, where there is room.
  static __device__ __forceinline__ int scale_place(bool copies, int g, int t) { return copies ? g / 4 * 128 + t * 32 + g % 4 * 8 : g * 8; }

  /// What codes c become r = s c + o by, for the unit's tokens: of each group and row g the s of tokens g and g + 8, then their o.
  static __device__ __forceinline__ void fill_scales(const PagedDecode& p, const std::byte* stage, std::byte* to) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int groups = p.rotate.n_quant_groups;
    const std::byte* const zeros = stage + kKeyScalesAt + groups * 32;
    for (int i = lane; i < groups * 8; i += kWarp) {
      const int group = i / 8;
      const int row = i % 8;
      const uint16_t* const scales = reinterpret_cast<const uint16_t*>(stage + kKeyScalesAt + group * 32);
      uint2 entry;
      entry.x = scales[row] | static_cast<uint32_t>(scales[row + 8]) << 16;
      if (p.rotate.minimum) {
        const uint16_t* const low = reinterpret_cast<const uint16_t*>(zeros + group * 32);
        entry.y = low[row] | static_cast<uint32_t>(low[row + 8]) << 16;
      } else {
        const auto* const z = reinterpret_cast<const int8_t*>(zeros + group * 16);
        entry.y = ptx::mul_halves(entry.x, two_halves(static_cast<float>(-z[row]), static_cast<float>(-z[row + 8])));
      }
      std::byte* const of_group = to + group * rotate_scale_stride(groups);
      if (groups <= kRotateCopiedGroups) {
#pragma unroll
        for (int t = 0; t < 4; ++t) *reinterpret_cast<uint2*>(of_group + scale_place(true, row, t)) = entry;
      } else {
        *reinterpret_cast<uint2*>(of_group + scale_place(false, row, 0)) = entry;
      }
    }
  }

  static __device__ __forceinline__ void butterfly(uint32_t& a, uint32_t& b) {
    const uint32_t sum = ptx::add_halves(a, b);
    b = ptx::sub_halves(a, b);
    a = sum;
  }

  /// 16 channels of tokens g and g + 8 through the transform's bits 5 to 0. y[u][r]: bits 1, 0 are u; register r of a left operand.
  /// @param offsets of the channels' scales @param scales of the lane's row
  static __device__ __forceinline__ void transform_word(uint32_t first, uint32_t second, const uint16_t* offsets, const std::byte* scales,
                                                        const Query& query, uint32_t (&y)[4][4]) {
    const uint32_t words[2] = {__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632)};
    uint32_t r[2][2][4];  // [bit 3][bit 2][bits 1, 0]: two tokens
#pragma unroll
    for (int bit3 = 0; bit3 < 2; ++bit3) {
      const uint4 places = *reinterpret_cast<const uint4*>(offsets + 8 * bit3);
      const uint32_t place[4] = {places.x, places.y, places.z, places.w};
#pragma unroll
      for (int bit2 = 0; bit2 < 2; ++bit2) {
        const uint32_t word = bit2 == 0 ? words[bit3] : words[bit3] >> 8;
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          // 1024 + 4^u c, then c, exactly.
          const uint32_t code = (word & 0x00030003U << 2 * u) | 0x64006400U;
          constexpr uint32_t kPart[4] = {0x3c003c00U, 0x34003400U, 0x2c002c00U, 0x24002400U};     // 4^-u
          constexpr uint32_t kOffset[4] = {0xe400e400U, 0xdc00dc00U, 0xd400d400U, 0xcc00cc00U};  // -1024 * 4^-u
          const uint32_t c = ptx::fma_halves(code, kPart[u], kOffset[u]);
          const uint32_t both = place[2 * bit2 + u / 2];
          const uint2 scale = *reinterpret_cast<const uint2*>(scales + (u % 2 == 0 ? both & 0xffffU : both >> 16));
          r[bit3][bit2][u] = ptx::fma_halves(c, scale.x, scale.y);
        }
        uint32_t(&x)[4] = r[bit3][bit2];
        butterfly(x[0], x[1]);
        butterfly(x[2], x[3]);
        butterfly(x[0], x[2]);
        butterfly(x[1], x[3]);
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint32_t a[4] = {__byte_perm(r[0][0][u], r[1][0][u], 0x5410), __byte_perm(r[0][0][u], r[1][0][u], 0x7632),
                             __byte_perm(r[0][1][u], r[1][1][u], 0x5410), __byte_perm(r[0][1][u], r[1][1][u], 0x7632)};
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        uint32_t d[2];
        ptx::mma_half(d, a, query.hadamard[x][0], query.hadamard[x][1]);
        y[u][2 * x] = d[0];
        y[u][2 * x + 1] = d[1];
      }
    }
  }

  /// Scores of tokens g (elements 0, 1: columns 2 t, 2 t + 1) and g + 8 (2, 3), in log 2.
  static __device__ __forceinline__ void score(const PagedDecode& p, const std::byte* stage, const UnitAt& at, const Query& query,
                                               float (&scores)[kSets][4]) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    uint32_t y[2][kSets][4][4];
    const auto* const words = reinterpret_cast<const uint32_t*>(stage);
    const int turned_g = g ^ t / 2 * 8;  // of key_place
    const std::byte* const scales = query.scales + scale_place(p.rotate.n_quant_groups <= kRotateCopiedGroups, g, t);
    const uint16_t* const offsets = p.rotate.key_offsets + (at.head * kWords + t) * 16;
#pragma unroll
    for (int b = 0; b < kSets; ++b) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const int w = 8 * b + 4 * hi;
        const uint32_t* const row = words + (w + t) * 16;
        transform_word(row[turned_g], row[turned_g ^ 8], offsets + 16 * w, scales, query, y[hi][b]);
      }
    }
    const uint4* const turns = p.rotate.token_table + (at.piece * 16 + g) * 16 + t;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint4 turn[4];  // of register r: cos and sin at u = 2 pair and the next
#pragma unroll
      for (int r = 0; r < 4; ++r) turn[r] = turns[r % 2 * 8 * 16 + (r / 2 * 2 + pair) * 4];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int u = 2 * pair + odd;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t cos = odd == 0 ? turn[r].x : turn[r].z;
          const uint32_t sin = odd == 0 ? turn[r].y : turn[r].w;
#pragma unroll
          for (int hi = 0; hi < 2; ++hi) {
            butterfly(y[hi][0][u][r], y[hi][1][u][r]);
            butterfly(y[hi][2][u][r], y[hi][3][u][r]);
            butterfly(y[hi][0][u][r], y[hi][2][u][r]);
            butterfly(y[hi][1][u][r], y[hi][3][u][r]);
          }
#pragma unroll
          for (int s = 0; s < kSets; ++s) {
            uint32_t& low = y[0][s][u][r];
            uint32_t& high = y[1][s][u][r];
            butterfly(low, high);
            const uint32_t a = low;
            low = ptx::negative_fma_halves(high, sin, ptx::mul_halves(a, cos));
            high = ptx::fma_halves(a, sin, ptx::mul_halves(high, cos));
          }
        }
#pragma unroll
        for (int s = 0; s < kSets; ++s) {
#pragma unroll
          for (int hi = 0; hi < 2; ++hi) {
            const uint2 b = query.turned[(s * 8 + 4 * hi + u) * kWarp + lane];
            ptx::mma(scores[s], y[hi][s][u], b.x, b.y, __half());
          }
        }
      }
    }
  }

  // ---- attention ---------------------------------------------------------------------------------------------------

  struct Weights {
    float probability[kSets][2];  ///< of tokens g and g + 8
    float keep[kSets];            ///< what is left of the sums so far
    bool there[2];                ///< tokens g and g + 8 are attended
    bool minimum;                 ///< PagedRotate::minimum
  };

  static __device__ __forceinline__ Weights attend_keys(const PagedDecode& p, std::byte* stage, const UnitAt& at, Query& query, State& state) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    if (at.page != query.page) turn_queries(p, query, at.page);
    fill_scales(p, stage, query.scales);
    __syncwarp();
    float scores[kSets][4] = {};
    score(p, stage, at, query, scores);
    unsigned attended = at.tokens >= 16 ? 0xffffU : (1U << at.tokens) - 1;
    if (at.first > 0) attended &= 0xffffU << at.first;
    if (at.masks != nullptr) attended &= *at.masks;
    Weights weights;
    weights.minimum = p.rotate.minimum;
    weights.there[0] = (attended >> g & 1U) != 0;
    weights.there[1] = (attended >> (g + 8) & 1U) != 0;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float first = weights.there[0] ? scores[s][0] + scores[s][1] : -INFINITY;
      const float second = weights.there[1] ? scores[s][2] + scores[s][3] : -INFINITY;
      const float top = fmaxf(state.max[s], kernels::max_over_rows(fmaxf(first, second)));
      const float base = top == -INFINITY ? 0.0F : top;
      weights.keep[s] = ptx::exp2_approximate(state.max[s] - base);
      weights.probability[s][0] = ptx::exp2_approximate(first - base);
      weights.probability[s][1] = ptx::exp2_approximate(second - base);
      state.max[s] = top;
      state.sum[s] = state.sum[s] * weights.keep[s] + weights.probability[s][0] + weights.probability[s][1];
    }
    return weights;
  }

  static __device__ __forceinline__ void add_values(const std::byte* stage, const Weights& weights, State& state) {
#pragma unroll
    for (int s = 0; s < kSets; ++s) add_head(stage, s, weights, state.out[s]);
  }

  /// Values of one kv head: codes as they stand in their words are the tensor cores' left operand, channels as rows, subnormal fp16
  /// numbers 4^m c / 2^24, which cost one mask for two. Row g (g + 8) of product j is channel 16 g + j (+ 8).
  static __device__ __forceinline__ void add_head(const std::byte* stage, int s, const Weights& weights, float (&out)[kHeadDim / 8]) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    uint32_t b[2];
    float offset = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = g + 8 * i;
      const float probability = weights.probability[s][i];
      // Places of tokens that are not attended may hold anything.
      const float weight = weights.there[i] ? probability * half_at(stage + kValueScalesAt + s * 32 + 2 * token) : 0.0F;
      if (weights.minimum) offset += weights.there[i] ? probability * half_at(stage + kValueZerosAt + s * 32 + 2 * token) : 0.0F;
      else offset -= weight * static_cast<float>(*reinterpret_cast<const int8_t*>(stage + kValueZerosAt + s * 32 + token));
      b[i] = ptx::transpose_matrix(Exact::Block::both_columns(weight));
    }
    offset = kernels::sum_over_rows(offset);
    const float keep = weights.keep[s];
    const auto* const rows = reinterpret_cast<const uint32_t*>(stage + s * kValueHeadBytes) + g;
    const auto word = [&](int token) { return rows[value_row(token) * 8]; };
    const uint32_t near[2] = {word(2 * t), word(2 * t + 1)};
    const uint32_t far[2] = {word(2 * t + 8), word(2 * t + 9)};
    uint32_t pairs[4] = {__byte_perm(near[0], near[1], 0x5410), __byte_perm(near[0], near[1], 0x7632),
                         __byte_perm(far[0], far[1], 0x5410), __byte_perm(far[0], far[1], 0x7632)};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j == 4) {
#pragma unroll
        for (uint32_t& x : pairs) x >>= 8;
      }
      const uint32_t mask = 0x00030003U << 2 * (j % 4);
      const uint32_t a[4] = {pairs[0] & mask, pairs[1] & mask, pairs[2] & mask, pairs[3] & mask};
      const float factor = 16777216.0F / static_cast<float>(1 << 2 * (j % 4));
      float sum[4] = {};
      ptx::mma(sum, a, b[0], b[1], __half());
      out[2 * j] = fmaf(sum[0] + sum[1], factor, fmaf(out[2 * j], keep, offset));
      out[2 * j + 1] = fmaf(sum[2] + sum[3], factor, fmaf(out[2 * j + 1], keep, offset));
    }
  }

  static __device__ __forceinline__ void write_out(const State& state, float* to, int row) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        to[(4 * s + t) * row + 16 * g + j] = state.out[s][2 * j];
        to[(4 * s + t) * row + 16 * g + 8 + j] = state.out[s][2 * j + 1];
      }
    }
  }

  /// The exact tokens of one kv head after the other: a block of 16 makes kSets units.
  struct Exact {
    using Block = kernels::PlainBlock<__half, kHeadDim, 1, false, kPageTokens, kSets>;
    static constexpr int kUnitTokens = Block::kUnitTokens;
    static constexpr int kStageBytes = Block::kStageBytes;
    static constexpr int kScratchBytes = RotatePageCodec::kScratchBytes;
    struct Query {
      typename Block::Query query;
      int seq;
      int set;
    };
    static __device__ Query load_query(const PagedDecode&, int seq, int, std::byte*) {
      Query query;
      query.seq = seq;
      query.set = -1;
      return query;
    }
    static __device__ __forceinline__ UnitAt of_head(const PagedDecode& p, UnitAt at) {
      at.head = at.head * kSets + at.piece / p.exact_blocks;
      at.piece %= p.exact_blocks;
      return at;
    }
    template <bool kValues>
    static __device__ __forceinline__ void copy(const PagedDecode& p, std::byte* stage, const UnitAt& at) {
      Block::template copy<kValues>(p, stage, of_head(p, at));
    }
    struct Weights {
      typename Block::Weights weights;
      int set;
    };
    static __device__ __forceinline__ Weights attend_keys(const PagedDecode& p, const std::byte* stage, const UnitAt& at, Query& query,
                                                          State& state) {
      const UnitAt one = of_head(p, at);
      const int set = one.head % kSets;
      if (set != query.set) {
        query.query = Block::load_query(p, query.seq, one.head);
        query.set = set;
      }
      Weights made = {};
      made.set = set;
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        if (s != set) continue;
        typename Block::State of_set;
        of_set.max[0] = state.max[s];
        of_set.sum[0] = state.sum[s];
        made.weights = Block::attend_keys(p, stage, one, query.query, of_set);
        state.max[s] = of_set.max[0];
        state.sum[s] = of_set.sum[0];
      }
      return made;
    }
    static __device__ __forceinline__ void add_values(const std::byte* stage, const Weights& weights, State& state) {
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        if (s != weights.set) continue;
        typename Block::State of_set;
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) of_set.out[0][i] = state.out[s][i];
        Block::add_values(stage, weights.weights, of_set);
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) state.out[s][i] = of_set.out[0][i];
      }
    }
    static __device__ __forceinline__ void write_out(const State& state, float* to, int row) {
      const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) to[(4 * s + lane % 4) * row + 8 * i + lane / 4] = state.out[s][i];
      }
    }
  };
};

}  // namespace rotunda::kv::rotate
