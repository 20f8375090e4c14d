#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/sixteen_bit.cuh"
#include "kv/rotate/kernels/rotate_load_params.h"
#include "kv/rotate/kernels/rotate_place.h"

namespace rotunda::kv::rotate {

/// Unpacks keys, or values, of one token: one warp, neighbouring channels in neighbouring lanes, so that what is written is whole lines;
/// the words that 8 or 16 lanes share and the next token reads again come from L1.
class RotateLoadWarp {
 public:
  static constexpr int kWarp = 32;

  __device__ explicit RotateLoadWarp(const RotateLoadBatch& params)
      : p_(params), l_(params.layout), lane_(static_cast<int>(threadIdx.x % kWarp)) {}

  /// @param token of all pages'
  __device__ void run_keys(int64_t token) const {
    const std::byte* const page = page_of(token);
    const int64_t of_page = token % l_.page_tokens();
    const int channels = l_.group_channels();
    float* const row = p_.key + token * l_.kv_channels();
    for (int c = lane_; c < l_.kv_channels(); c += kWarp)
      row[c] = element(page, true, p_.key_group[c], of_page, key_place(l_, c / channels, of_page, c % channels));
  }

  template <typename T>
  __device__ void run_values(int64_t token) const {
    const std::byte* const page = page_of(token);
    const int64_t of_page = token % l_.page_tokens();
    for (int head = 0; head < l_.n_kv_heads; ++head) {
      T* const row = static_cast<T*>(p_.value) + (head * n_tokens() + token) * l_.head_dim;
      for (int c = lane_; c < l_.head_dim; c += kWarp) {
        const float x = element(page, false, (head * l_.head_dim + c) / l_.group_size, of_page, value_place(l_, head, of_page, c));
        if constexpr (sizeof(T) == 4) row[c] = x;
        else row[c] = kernels::SixteenBit<T>::round(x);
      }
    }
  }

  __device__ int64_t n_tokens() const { return p_.n_pages * l_.page_tokens(); }

 private:
  __device__ const std::byte* page_of(int64_t token) const { return p_.pool + p_.table[token / l_.page_tokens()] * p_.page_stride; }

  /// By the bytes that hold a code: words of values need not be aligned.
  static __device__ __forceinline__ uint32_t code_at(const std::byte* page, const CodePlace& at) {
    uint32_t code = static_cast<uint32_t>(page[at.low_word + at.low_shift / 8]) >> at.low_shift % 8 & ((1U << at.low_bits) - 1);
    if (at.high_word >= 0) code |= (static_cast<uint32_t>(page[at.high_word + at.high_shift / 8]) >> at.high_shift % 8 & 1U) << 2;
    return code;
  }

  __device__ __forceinline__ float element(const std::byte* page, bool key, int group, int64_t token, const CodePlace& at) const {
    const auto half_at = [&](int64_t place) { return __half2float(*reinterpret_cast<const __half*>(page + place)); };
    const float scale = half_at(meta_offset(l_, key ? l_.key_scale_offset() : l_.value_scale_offset(), 2, group, token));
    const int64_t zero_at = meta_offset(l_, key ? l_.key_zero_offset() : l_.value_zero_offset(), l_.zero_bytes(), group, token);
    const auto code = static_cast<float>(code_at(page, at));
    if (l_.zero == ZeroPoint::kCode) return scale * (code - static_cast<float>(*reinterpret_cast<const int8_t*>(page + zero_at)));
    return fmaf(scale, code, half_at(zero_at));
  }

  const RotateLoadBatch& p_;
  const RotatePageLayout& l_;
  const int lane_;
};

/// Warps that a batch is worth: one for the keys and one for the values of every token.
constexpr int64_t rotate_load_items(const RotateLoadBatch& p) { return 2 * p.n_pages * p.layout.page_tokens(); }

/// The kernel's body: warp w of all takes item w. @tparam T type of the values
template <typename T>
__device__ void rotate_load_warps(const RotateLoadBatch& p, int warps_per_block) {
  const int64_t item = int64_t{blockIdx.x} * warps_per_block + static_cast<int>(threadIdx.x) / RotateLoadWarp::kWarp;
  const RotateLoadWarp warp(p);
  if (item >= rotate_load_items(p)) return;
  if (item < warp.n_tokens()) warp.run_keys(item);
  else warp.run_values<T>(item - warp.n_tokens());
}

}  // namespace rotunda::kv::rotate
