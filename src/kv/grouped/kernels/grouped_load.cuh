#pragma once

#include "kernels/cuda/sixteen_bit.cuh"
#include "kv/grouped/kernels/grouped_pages_params.h"
#include "kv/grouped/kernels/grouped_place.h"
#include "kv/grouped/kernels/grouped_quantize.h"

namespace rotunda::kv::grouped {

/// Unpacks keys or values of one page and kv head, eight neighbouring channels of a token a thread, so that rows are written in whole
/// sectors. Words are read more than once, out of L1.
template <typename T>
class GroupedLoadBlock {
 public:
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 8;

  static __device__ void run(const GroupedLoadPages& p) {
    const GroupedPageLayout& l = p.layer.layout;
    // blockIdx.x = (page * n_kv_heads + head) * 2 + (0: keys, 1: values)
    const bool is_key = blockIdx.x % 2 == 0;
    const auto n_kv_heads = static_cast<unsigned>(l.n_kv_heads);
    const auto head = static_cast<int>(blockIdx.x / 2 % n_kv_heads);
    const auto page = static_cast<int>(blockIdx.x / 2 / n_kv_heads);
    const std::byte* const bytes = p.pool + p.table[page] * p.page_stride;
    const GroupedSide& side = is_key ? l.key : l.value;
    const GroupedCodec& codec = is_key ? p.layer.key : p.layer.value;
    const auto page_tokens = static_cast<int>(l.page_tokens());
    T* const rows = static_cast<T*>(is_key ? p.key : p.value) + (int64_t{head} * p.n_pages + page) * page_tokens * l.head_dim;
    const int per_token = l.head_dim / kChannels;
    for (int i = static_cast<int>(threadIdx.x); i < page_tokens * per_token; i += kThreads) {
      const int token = i / per_token;
      const int channel = i % per_token * kChannels;
      const int group = channel / side.group;
      uint32_t codes[kChannels] = {};
      uint32_t zero = 0;
#pragma unroll
      for (int width = kWidestPlane; width > 0; width /= 2) {
        if (!has_plane(side.bits, width)) continue;
        if (is_key) add_key_plane(l, bytes, head, width, token, channel, codes);
        else add_value_plane(l, bytes, head, width, token, channel, codes);
        if (side.zeros) add(zero, side, width, bytes, zero_place(l, head, is_key, width, group, token));
      }
      const std::byte* const scale = bytes + scale_place(l, head, is_key, group, token);
      const uint16_t bits = side.scale_bytes() == 2 ? *reinterpret_cast<const uint16_t*>(scale) : static_cast<uint16_t>(*scale);
      const float step = scale_value(side, bits) * codec.unit;
      float elements[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) elements[c] = step * static_cast<float>(level(side, codec, codes[c], zero));
      kernels::write_eight(rows + int64_t{i} * kChannels, elements);
    }
  }

 private:
  static __device__ void add(uint32_t& code, const GroupedSide& side, int width, const std::byte* bytes, CodePlace at) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(bytes + at.word);
    code |= (word >> at.shift & ((1U << width) - 1)) << plane_shift(side.bits, width);
  }

  // Where channel 0 of the eight lies says where the others are.
  static __device__ void add_key_plane(const GroupedPageLayout& l, const std::byte* bytes, int head, int width, int token, int channel,
                                       uint32_t (&codes)[kChannels]) {
    const int per_word = 32 / width;
    const CodePlace start = key_place(l, head, width, token, channel / per_word * per_word);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int element = channel % per_word + c;  // eight are of one word, or of two
      const int within = element % per_word;
      add(codes[c], l.key, width, bytes, {start.word + element / per_word * (kTokenBlock * 4), 8 * (within % 4) + width * (within / 4)});
    }
  }
  static __device__ void add_value_plane(const GroupedPageLayout& l, const std::byte* bytes, int head, int width, int token, int channel,
                                         uint32_t (&codes)[kChannels]) {
    const CodePlace start = value_place(l, head, width, token, channel);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) add(codes[c], l.value, width, bytes, {start.word + 4 * c, start.shift});
  }
};

}  // namespace rotunda::kv::grouped
