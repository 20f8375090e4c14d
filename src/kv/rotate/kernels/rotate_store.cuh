#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kv/rotate/kernels/rotate_place.h"
#include "kv/rotate/kernels/rotate_store_params.h"

namespace rotunda::kv::rotate {

/// Packs the keys, or the values, of one token: one warp. The token lies in shared memory; the warp goes through the quantization groups
/// for their scales, then every lane codes runs of 16 neighbouring channels, which are whole words of the page. Roundings are those of
/// rotate_codec.h, and nothing may be fused (hence the intrinsics, which the compiler leaves alone).
class RotateStoreWarp {
 public:
  static constexpr int kWarp = 32;
  static constexpr unsigned kAllLanes = 0xffffffffU;
  static constexpr int kRun = 16;  ///< channels

  /// Shared memory of one warp: scale and zero point of the groups, then the token, each run one float further: runs that the lanes read
  /// at once lie in different banks.
  static constexpr int64_t shared_bytes(const RotatePageLayout& l) {
    return (int64_t{l.n_quant_groups()} * 8 + int64_t{l.kv_channels()} / kRun * (kRun + 1) * 4 + 15) / 16 * 16;
  }

  __device__ RotateStoreWarp(const RotateStoreBatch& params, std::byte* shared)
      : p_(params),
        l_(params.layout),
        lane_(static_cast<int>(threadIdx.x % kWarp)),
        groups_(reinterpret_cast<float2*>(shared)),
        x_(reinterpret_cast<float*>(groups_ + l_.n_quant_groups())) {}

  /// @param t token of the pair
  __device__ void run(int layer, const StorePair& pair, int t, bool is_key) const {
    const int64_t row = pair.row + t - (__ffs(static_cast<int>(pair.tokens)) - 1);
    const bool finite = load((is_key ? p_.key : p_.value) + layer * p_.layer_stride + row * p_.row_stride);
    std::byte* const page = p_.pool + pair.page * p_.page_stride + layer * p_.layer_page_stride;
    const int64_t token = int64_t{32} * pair.pair + t;
    const int64_t tables = int64_t{layer} * l_.kv_channels();
    if (!finite || !scales(page, token, is_key ? p_.key_order + tables : nullptr, is_key)) {
      if (lane_ == 0) p_.refused[layer] = 1;
      return;
    }
    __syncwarp();
    for (int first = lane_ * kRun; first < l_.kv_channels(); first += kWarp * kRun) {
      uint32_t codes[4];
      code_run(first, is_key ? p_.key_group + tables : nullptr, codes);
      if (is_key) write_key(page, token, first, codes);
      else write_value(page, token, first, codes);
    }
  }

 private:
  __device__ float& x(int c) const { return x_[c + c / kRun]; }

  /// @return whether all elements are finite
  __device__ bool load(const float* row) const {
    bool finite = true;
    for (int c = lane_; c < l_.kv_channels(); c += kWarp) {
      const float element = row[c];
      finite = finite && isfinite(element);
      x(c) = element;
    }
    return __ballot_sync(kAllLanes, !finite) == 0;
  }

  // ---- scales ------------------------------------------------------------------------------------------------------

  static __device__ __forceinline__ bool fits(uint32_t half) { return (half & 0x7c00U) != 0x7c00U; }
  static __device__ __forceinline__ uint32_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ __forceinline__ float half_value(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }

  /// Scale and zero point of every group, into the page and into shared memory. @param order null: groups are neighbours
  /// @return false where the token is refused
  __device__ bool scales(std::byte* page, int64_t token, const uint16_t* order, bool is_key) const {
    for (int group = 0; group < l_.n_quant_groups(); ++group) {
      float top = -INFINITY;
      float bottom = INFINITY;
      for (int i = group * l_.group_size + lane_; i < (group + 1) * l_.group_size; i += kWarp) {
        const float element = x(order == nullptr ? i : order[i]);
        top = fmaxf(top, element);
        bottom = fminf(bottom, element);
      }
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
        bottom = fminf(bottom, __shfl_xor_sync(kAllLanes, bottom, step));
      }
      uint32_t scale = 0;
      uint32_t zero = 0;
      float2 coded;
      if (!group_scale(top, bottom, is_key ? p_.key_clip : p_.value_clip, scale, zero, coded)) return false;
      if (lane_ != 0) continue;
      groups_[group] = coded;
      *reinterpret_cast<uint16_t*>(page + meta_offset(l_, is_key ? l_.key_scale_offset() : l_.value_scale_offset(), 2, group, token)) =
          static_cast<uint16_t>(scale);
      std::byte* const zero_at =
          page + meta_offset(l_, is_key ? l_.key_zero_offset() : l_.value_zero_offset(), l_.zero_bytes(), group, token);
      if (l_.zero == ZeroPoint::kCode) *reinterpret_cast<uint8_t*>(zero_at) = static_cast<uint8_t>(zero);
      else *reinterpret_cast<uint16_t*>(zero_at) = static_cast<uint16_t>(zero);
    }
    return true;
  }

  /// @param scale, zero what the page gets   @param coded what elements are coded by: step and zero point
  /// @return false where fp16 cannot hold it
  __device__ __forceinline__ bool group_scale(float top, float bottom, float clip, uint32_t& scale, uint32_t& zero, float2& coded) const {
    const bool code = l_.zero == ZeroPoint::kCode;
    if (top == bottom) {
      // An infinite step: every element is 0 steps from the zero point, whose code is 1 where x = s * q stands for it.
      const uint32_t bits = half_bits(top);
      scale = code ? bits : 0;
      zero = code ? 0 : bits;
      coded = make_float2(INFINITY, code ? 1.0F : half_value(bits));
      return fits(bits);
    }
    const float high = __fmul_rn(clip, top);
    const float low = __fmul_rn(clip, bottom);
    // A range too narrow for fp16 takes the smallest scale there is.
    scale = max(half_bits(__fdiv_rn(__fsub_rn(high, low), static_cast<float>((1 << l_.bits) - 1))), 1U);
    if (!fits(scale)) return false;
    if (!code) {
      zero = half_bits(low);
      coded = make_float2(half_value(scale), half_value(zero));
      return fits(zero);
    }
    const auto zero_of = [low](uint32_t step) { return rintf(__fdiv_rn(-low, half_value(step))); };
    if (fabsf(zero_of(scale)) > 127.0F) {
      scale = max(scale, half_bits(__fdiv_rn(fabsf(low), 127.0F)));
      if (fits(scale) && fabsf(zero_of(scale)) > 127.0F) ++scale;
      if (!fits(scale)) return false;
    }
    coded = make_float2(half_value(scale), zero_of(scale));
    zero = static_cast<uint32_t>(static_cast<int>(coded.y));
    return true;
  }

  // ---- codes -------------------------------------------------------------------------------------------------------

  /// Codes of 16 channels, one a byte. @param group_of null: groups are neighbours
  __device__ __forceinline__ void code_run(int first, const uint16_t* group_of, uint32_t (&codes)[4]) const {
    const float most = static_cast<float>((1 << l_.bits) - 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = first + 4 * i + j;
        const float2 group = groups_[group_of == nullptr ? c / l_.group_size : group_of[c]];
        const float steps = l_.zero == ZeroPoint::kCode ? __fadd_rn(rintf(__fdiv_rn(x(c), group.x)), group.y)
                                                        : rintf(__fdiv_rn(__fsub_rn(x(c), group.y), group.x));
        codes[i] |= static_cast<uint32_t>(fminf(fmaxf(steps, 0.0F), most)) << 8 * j;
      }
    }
  }

  /// The four bytes, 1 or 2 bits wide, side by side.
  static __device__ __forceinline__ uint32_t squeeze(uint32_t bytes, int width) {
    const int step = 8 - width;
    return (bytes | bytes >> step | bytes >> 2 * step | bytes >> 3 * step) & ((1U << 4 * width) - 1);
  }
  /// Eight bytes of 4 bits side by side.
  static __device__ __forceinline__ uint32_t squeeze_fours(uint32_t first, uint32_t second) {
    return __byte_perm(first | first >> 4, second | second >> 4, 0x6420);
  }
  /// The lower two bits of all 16 codes.
  static __device__ __forceinline__ uint32_t low_bits(const uint32_t (&codes)[4]) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= squeeze(codes[i] & 0x03030303U, 2) << 8 * i;
    return word;
  }
  /// Bit 2 of all 16 codes.
  static __device__ __forceinline__ uint16_t high_bits(const uint32_t (&codes)[4]) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= squeeze(codes[i] >> 2 & 0x01010101U, 1) << 4 * i;
    return static_cast<uint16_t>(word);
  }

  __device__ void write_key(std::byte* page, int64_t token, int first, const uint32_t (&codes)[4]) const {
    const int channel = first % l_.group_channels();
    const CodePlace at = key_place(l_, first / l_.group_channels(), token, channel);
    auto* const word = reinterpret_cast<uint32_t*>(page + at.low_word);
    if (l_.bits == 4) {
      word[0] = squeeze_fours(codes[0], codes[1]);
      word[kTokenBlock] = squeeze_fours(codes[2], codes[3]);
      return;
    }
    *word = low_bits(codes);
    if (l_.bits == 3) {
      auto* const high = reinterpret_cast<uint16_t*>(page + at.high_word);
      high[at.high_shift / 16] = high_bits(codes);
      // Bits of no channel are 0.
      if (at.high_shift == 0 && channel + kRun == l_.group_channels()) high[1] = 0;
    }
  }

  __device__ void write_value(std::byte* page, int64_t token, int first, const uint32_t (&codes)[4]) const {
    const CodePlace at = value_place(l_, first / l_.head_dim, token, first % l_.head_dim);
    if (l_.bits == 4) {
      // Even channels, then odd ones.
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[0] |= ((codes[i] | codes[i] >> 12) & 255U) << 8 * i;
        words[1] |= ((codes[i] >> 8 | codes[i] >> 20) & 255U) << 8 * i;
      }
      *reinterpret_cast<uint2*>(page + at.low_word) = make_uint2(words[0], words[1]);
      return;
    }
    const uint32_t low = low_bits(codes);
    if (l_.bits == 2) {
      *reinterpret_cast<uint32_t*>(page + at.low_word) = low;
      return;
    }
    // Rows of 3 bits begin at any even byte.
    auto* const halves = reinterpret_cast<uint16_t*>(page + at.low_word);
    halves[0] = static_cast<uint16_t>(low);
    halves[1] = static_cast<uint16_t>(low >> 16);
    *reinterpret_cast<uint16_t*>(page + at.high_word) = high_bits(codes);
  }

  const RotateStoreBatch& p_;
  const RotatePageLayout& l_;
  const int lane_;
  float2* const groups_;
  float* const x_;
};

/// Warps that a batch is worth.
constexpr int64_t rotate_store_items(const RotateStoreBatch& p) { return int64_t{p.n_layers} * p.n_pairs * 2 * 32; }

/// The kernel's body: warp w of all takes item w; neighbours take neighbouring tokens, which share sectors of the page.
/// @param shared RotateStoreWarp::shared_bytes for each warp
__device__ inline void rotate_store_warps(const RotateStoreBatch& p, int warps_per_block, std::byte* shared) {
  const int warp_in_block = static_cast<int>(threadIdx.x) / RotateStoreWarp::kWarp;
  const int64_t item = int64_t{blockIdx.x} * warps_per_block + warp_in_block;
  if (item >= rotate_store_items(p)) return;
  const int token = static_cast<int>(item % 32);
  const bool is_key = item / 32 % 2 == 0;
  const int64_t pair_at = item / 64;
  const StorePair pair = p.pairs[pair_at % p.n_pairs];
  if ((pair.tokens >> token & 1U) == 0) return;
  const RotateStoreWarp warp(p, shared + warp_in_block * RotateStoreWarp::shared_bytes(p.layout));
  warp.run(static_cast<int>(pair_at / p.n_pairs), pair, token, is_key);
}

}  // namespace rotunda::kv::rotate
