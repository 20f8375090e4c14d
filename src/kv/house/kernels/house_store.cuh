#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kv/house/kernels/house_store_params.h"

namespace rotunda::kv::house {

/// Packs the keys, or the values, of one kv head and up to 32 tokens: one warp, a token a lane. A lane goes through its token's channels
/// one after the other, in the order and with the roundings of house_codec.h, so that the bytes are those of every other machine; nothing
/// here may be fused (hence the intrinsics, which the compiler leaves alone).
///
/// Feedback is reckoned 16 channels at a time: what the errors of the channels before them add up to comes first (16 sums, which hide each
/// other's latency), then the 16 among themselves.
class HouseStoreWarp {
 public:
  static constexpr int kWarp = 32;
  static constexpr int kRow = kWarp + 1;  ///< floats of a channel in shared memory, one more than lanes: no bank conflicts when it is filled
  static constexpr int kBlockChannels = 16;

  /// Shared memory of one warp: elements and errors [channel][lane], codes of the best try and of this one [channel / 8][lane].
  static constexpr int64_t shared_bytes(int head_dim) { return int64_t{2 * head_dim + head_dim / 4} * kRow * 4; }

  __device__ HouseStoreWarp(const HouseStoreBatch& params, std::byte* shared)
      : p_(params),
        d_(params.layout.head_dim),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        y_(reinterpret_cast<float*>(shared)),
        error_(y_ + d_ * kRow),
        best_(reinterpret_cast<uint32_t*>(error_ + d_ * kRow)),
        tried_(best_ + d_ / 8 * kRow) {}

  __device__ void run(const StorePair& pair, int layer, int head, bool is_key) {
    if (pair.tokens == 0) return;
    bits_ = is_key ? p_.layout.key_bits : p_.layout.value_bits;
    top_ = static_cast<float>((1 << bits_) - 1);
    middle_ = static_cast<float>(1 << (bits_ - 1));
    load(pair, layer, head, is_key);
    const bool mine = (pair.tokens >> lane_ & 1U) != 0;
    const float* const feedback = is_key && p_.feedback != nullptr ? p_.feedback + (int64_t{layer} * p_.layout.n_kv_heads + head) * d_ * d_ : nullptr;
    uint16_t scale = 0;
    if (mine && !quantize(feedback, &scale)) p_.refused[layer] = 1;
    __syncwarp();
    std::byte* const page = p_.pool + pair.page * p_.page_bytes + layer * p_.layer_bytes;
    if (is_key) write_key(pair, head, page, mine, scale);
    else write_value(pair, head, page, mine, scale);
    __syncwarp();
  }

 private:
  __device__ float& y(int c) const { return y_[c * kRow + lane_]; }
  __device__ float& error(int c) const { return error_[c * kRow + lane_]; }

  /// Rows come in whole, a warp to a token; tokens that are not there are left as they are.
  __device__ void load(const StorePair& pair, int layer, int head, bool is_key) {
    const float* const rows = (is_key ? p_.key : p_.value) + layer * p_.layer_stride + int64_t{head} * d_;
    const int first = __ffs(static_cast<int>(pair.tokens)) - 1;
    for (int t = 0; t < kWarp; ++t) {
      if ((pair.tokens >> t & 1U) == 0) continue;
      const float* const row = rows + (pair.row + t - first) * p_.row_stride;
      for (int c = lane_; c < d_; c += kWarp) y_[c * kRow + t] = row[c];
    }
    __syncwarp();
  }

  // ---- one token ---------------------------------------------------------------------------------------------------

  /// The code of x, as a float; NaN gives 0.
  __device__ __forceinline__ float code(float x, float inverse) const {
    return fminf(fmaxf(floorf(__fadd_rn(__fmul_rn(x, inverse), middle_)), 0.0F), top_);
  }
  __device__ __forceinline__ float value_of(float code) const { return __fsub_rn(2.0F * code, top_); }  // exact

  __device__ __forceinline__ void add_sums(float x, float c, float& yc, float& cc) const {
    yc = __fadd_rn(yc, __fmul_rn(x, c));
    cc = __fadd_rn(cc, c * c);
  }

  static __device__ bool fits(float scale) { return (__half_as_ushort(__float2half_rn(scale)) & 0x7fffU) < 0x7c00U; }

  __device__ __forceinline__ uint32_t code_of(const uint32_t* codes, int c) const { return codes[c / 8 * kRow + lane_] >> (4 * (c % 8)) & 15U; }

  /// @return false where the token is refused
  __device__ __forceinline__ bool quantize(const float* feedback, uint16_t* scale) const {
    float e = 0;
    for (int c = 0; c < d_; ++c) e = __fadd_rn(e, __fmul_rn(y(c), y(c)));
    if (!isfinite(e)) return false;
    const float mean = __fdiv_rn(e, static_cast<float>(d_));
    if (mean == 0.0F) {
      const uint32_t plus_one = (1U << (bits_ - 1)) * 0x11111111U;
      for (int w = 0; w < d_ / 8; ++w) best_[w * kRow + lane_] = plus_one;
      return true;
    }
    float yc = 0;
    float cc = 1;
    const float inverse = search(__fsqrt_rn(mean), yc, cc);
    if (!fits(__fdiv_rn(yc, cc))) return false;
    bool fed = false;
    if (feedback != nullptr) {
      float least = INFINITY;
      for (int i = 0; i < static_cast<int>(sizeof(kFeedbackTries) / sizeof(float)); ++i) {
        const float cost = try_feedback(feedback, __fmul_rn(inverse, feedback_factor(i)));
        if (i > 0 && !(cost < least)) continue;
        least = cost;
        for (int w = 0; w < d_ / 8; ++w) best_[w * kRow + lane_] = tried_[w * kRow + lane_];
      }
      float fed_yc = 0;
      float fed_cc = 0;
      for (int c = 0; c < d_; ++c) add_sums(y(c), value_of(static_cast<float>(code_of(best_, c))), fed_yc, fed_cc);
      if (fed_yc > 0.0F) {
        yc = fed_yc;
        cc = fed_cc;
        fed = true;
      }
    }
    if (!fed) {
      for (int w = 0; w < d_ / 8; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(code(y(8 * w + i), inverse)) << (4 * i);
        best_[w * kRow + lane_] = word;
      }
    }
    const float result = p_.scale == ScaleRule::kUnbiased ? __fdiv_rn(e, yc) : __fdiv_rn(yc, cc);
    if (!fits(result)) return false;
    const uint16_t half = __half_as_ushort(__float2half_rn(result));
    *scale = half == 0 ? 1 : half;
    return true;
  }

  static __device__ float feedback_factor(int i) {
    constexpr float kFactors[] = {1.0F, 1.07F, 0.93F, 1.15F, 0.87F, 1.25F, 0.81F};
    static_assert(sizeof(kFactors) == sizeof(kFeedbackTries) && kFactors[1] == kFeedbackTries[1] && kFactors[6] == kFeedbackTries[6]);
    float factor = kFactors[0];
#pragma unroll
    for (int k = 1; k < 7; ++k) factor = i == k ? kFactors[k] : factor;
    return factor;
  }

  /// The inverse step of the best candidate, and its sums.
  __device__ __forceinline__ float search(float r, float& best_yc, float& best_cc) const {
    const StepSearch steps = step_search(bits_);
    constexpr int kMost = 6;
    float inverse[kMost];
    float yc[kMost];
    float cc[kMost];
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      const float part = __fdiv_rn(__fsub_rn(steps.last, steps.first), static_cast<float>(steps.count - 1));
      const float candidate = __fadd_rn(steps.first, __fmul_rn(static_cast<float>(k), part));
      inverse[k] = __fdiv_rn(0.5F, __fmul_rn(candidate, r));
      yc[k] = 0;
      cc[k] = 0;
    }
    for (int c = 0; c < d_; ++c) {
      const float x = y(c);
#pragma unroll
      for (int k = 0; k < kMost; ++k) add_sums(x, value_of(code(x, inverse[k])), yc[k], cc[k]);
    }
    float best = -1.0F;
    float chosen = 0;
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      const float gain = __fdiv_rn(__fmul_rn(yc[k], yc[k]), cc[k]);
      if (k >= steps.count || !(gain > best)) continue;
      best = gain;
      best_yc = yc[k];
      best_cc = cc[k];
      chosen = inverse[k];
    }
    return chosen;
  }

  /// Codes with feedback for one step, into `tried_`. @return their cost
  __device__ __forceinline__ float try_feedback(const float* feedback, float inverse) const {
    float yc = 0;
    float cc = 0;
    for (int c = 0; c < d_; ++c) add_sums(y(c), value_of(code(y(c), inverse)), yc, cc);
    const float s = __fdiv_rn(yc, cc);
    float cost = 0;
    for (int first = 0; first < d_; first += kBlockChannels) {
      float x[kBlockChannels];
#pragma unroll
      for (int j = 0; j < kBlockChannels; ++j) x[j] = y(first + j);
      for (int i = 0; i < first; ++i) subtract<0>(x, error(i), feedback + int64_t{i} * d_ + first);
      uint32_t words[2] = {0, 0};
      within<0>(x, feedback + int64_t{first} * d_ + first, inverse, s, first, cost, words);
      tried_[first / 8 * kRow + lane_] = words[0];
      tried_[(first / 8 + 1) * kRow + lane_] = words[1];
    }
    return cost;
  }

  /// x[j] -= f row[j] for j >= kFrom.
  template <int kFrom>
  static __device__ __forceinline__ void subtract(float (&x)[kBlockChannels], float f, const float* row) {
#pragma unroll
    for (int j = kFrom / 4 * 4; j < kBlockChannels; j += 4) {
      const float4 u = *reinterpret_cast<const float4*>(row + j);
      const float four[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (j + k >= kFrom) x[j + k] = __fsub_rn(x[j + k], __fmul_rn(f, four[k]));
    }
  }

  /// Channels kAt .. 15 of a block, given what the channels before the block have left. @param rows of the block, at its first channel
  template <int kAt>
  __device__ __forceinline__ void within(float (&x)[kBlockChannels], const float* rows, float inverse, float s, int first, float& cost,
                         uint32_t (&words)[2]) const {
    if constexpr (kAt < kBlockChannels) {
      const float* const row = rows + int64_t{kAt} * d_;
      const float q = code(x[kAt], inverse);
      words[kAt / 8] |= static_cast<uint32_t>(q) << (4 * (kAt % 8));
      const float f = __fsub_rn(x[kAt], __fmul_rn(s, value_of(q)));
      cost = __fadd_rn(cost, __fmul_rn(__fmul_rn(f, f), row[kAt]));
      error(first + kAt) = f;
      subtract<kAt + 1>(x, f, row);
      within<kAt + 1>(x, rows, inverse, s, first, cost, words);
    }
  }

  // ---- into the page -----------------------------------------------------------------------------------------------

  __device__ void write_scale(std::byte* scales, const StorePair& pair, bool mine, uint16_t scale) const {
    if (mine) reinterpret_cast<uint16_t*>(scales)[32 * pair.pair + lane_] = scale;
  }

  __device__ void write_key(const StorePair& pair, int head, std::byte* page, bool mine, uint16_t scale) const {
    const HousePageLayout& l = p_.layout;
    write_scale(page + l.key_scale_offset(head), pair, mine, scale);
    if (!mine) return;
    auto* const words = reinterpret_cast<uint32_t*>(page + l.key_block_offset(head, 2 * pair.pair + lane_ / 16)) + lane_ % 16;
    if (bits_ == 4) {
      for (int w = 0; w < d_ / 8; ++w) {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) word |= code_of(best_, 8 * w + i) << (8 * (i % 4) + 4 * (i / 4));
        words[w * 16] = word;
      }
      return;
    }
    for (int w = 0; w < d_ / 16; ++w) {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) word |= (code_of(best_, 16 * w + i) & 3U) << (8 * (i % 4) + 2 * (i / 4));
      words[w * 16] = word;
    }
    for (int w = 0; bits_ == 3 && w < (d_ + 31) / 32; ++w) {
      uint32_t word = 0;
      for (int i = 0; i < 32 && 32 * w + i < d_; ++i) word |= (code_of(best_, 32 * w + i) >> 2) << (8 * (i % 4) + i / 4);
      words[(d_ / 16 + w) * 16] = word;
    }
  }

  /// The bits of the tokens of one word (16, or 8 at step 4), token 4 j + i to bit 8 i + kStep j.
  template <int kStep>
  static __device__ uint32_t spread(uint32_t tokens) {
    uint32_t word = 0;
#pragma unroll
    for (int t = 0; t < (kStep == 4 ? 8 : 16); ++t) word |= (tokens >> t & 1U) << (8 * (t % 4) + kStep * (t / 4));
    return word;
  }

  __device__ void write_value(const StorePair& pair, int head, std::byte* page, bool mine, uint16_t scale) const {
    const HousePageLayout& l = p_.layout;
    write_scale(page + l.value_scale_offset(head), pair, mine, scale);
    for (int first = 0; first < d_; first += kWarp) {
      // Lane c gets bit b of channel first + c of all tokens.
      uint32_t planes[4] = {0, 0, 0, 0};
      for (int c = 0; c < kWarp; ++c) {
        const uint32_t code = mine ? code_of(best_, first + c) : 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const uint32_t plane = __ballot_sync(0xffffffffU, (code >> b & 1U) != 0);
          if (c == lane_) planes[b] = plane;
        }
      }
      const int channel = first + lane_;
      for (int half = 0; half < 2; ++half) {
        const int block = 2 * pair.pair + half;
        const uint32_t there = pair.tokens >> (16 * half) & 0xffffU;
        auto* const row = reinterpret_cast<uint32_t*>(page + l.value_block_offset(head, block)) + channel;
        const auto plane = [&](int b) { return planes[b] >> (16 * half) & 0xffffU; };
        if (bits_ == 4) {
          for (int word = 0; word < 2; ++word) {
            const auto eight = [&](uint32_t tokens) { return spread<4>(tokens >> (8 * word)); };
            const uint32_t codes = eight(plane(0)) | eight(plane(1)) << 1 | eight(plane(2)) << 2 | eight(plane(3)) << 3;
            merge(row + word * d_, codes, eight(there) * 15U);
          }
          continue;
        }
        merge(row, spread<2>(plane(0)) | spread<2>(plane(1)) << 1, spread<2>(there) * 3U);
      }
      if (bits_ == 3) {
        // The word of a pair: bits 4 o + j of byte i.
        auto* const row = reinterpret_cast<uint32_t*>(page + l.value_high_offset(head, 2 * pair.pair)) + channel;
        const auto both = [&](uint32_t tokens) { return spread<1>(tokens) | spread<1>(tokens >> 16) << 4; };
        merge(row, both(planes[2]), both(pair.tokens));
      }
    }
  }

  static __device__ void merge(uint32_t* at, uint32_t bits, uint32_t mask) {
    if (mask != 0) *at = (*at & ~mask) | bits;
  }

  const HouseStoreBatch& p_;
  const int d_;
  const int lane_;
  int bits_ = 0;
  float top_ = 0;
  float middle_ = 0;
  float* const y_;
  float* const error_;
  uint32_t* const best_;
  uint32_t* const tried_;
};

/// The kernel's body: warp w of all takes item w. Keys come first: they take longest. Neighbours share a head's feedback.
/// @param shared HouseStoreWarp::shared_bytes for each warp
__device__ inline void house_store_warps(const HouseStoreBatch& p, int warps_per_block, std::byte* shared) {
  const int warp_in_block = static_cast<int>(threadIdx.x) / HouseStoreWarp::kWarp;
  const int64_t item = int64_t{blockIdx.x} * warps_per_block + warp_in_block;
  const int64_t n = int64_t{p.n_layers} * p.layout.n_kv_heads * p.n_pairs;
  if (item >= 2 * n) return;
  HouseStoreWarp warp(p, shared + warp_in_block * HouseStoreWarp::shared_bytes(p.layout.head_dim));
  const auto head = static_cast<int>(item % n / p.n_pairs);  // of all layers
  warp.run(p.pairs[item % p.n_pairs], head / p.layout.n_kv_heads, head % p.layout.n_kv_heads, item < n);
}

}  // namespace rotunda::kv::house
