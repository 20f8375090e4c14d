#pragma once

#include "kernels/cuda/sixteen_bit.cuh"
#include "kv/house/kernels/house_load_params.h"

namespace rotunda::kv::house {

/// Unpacks keys or values of one page and kv head, eight neighbouring channels of a token a thread, so that rows are written in whole
/// sectors. Words are read more than once (a value's word holds eight or sixteen tokens); they are an eighth of what is written and come
/// from L1.
template <typename T>
class HouseLoadBlock {
 public:
  static constexpr int kChannels = 8;
  /// Of a thread block: the 16 tokens of a block of the page at once.
  static constexpr int threads(int head_dim) { return kTokenBlock * (head_dim / kChannels); }

  __device__ static void run(const HouseLoadPages& p) {
    const HousePageLayout& l = p.layout;
    // blockIdx.x = (page * n_kv_heads + head) * 2 + (0: keys, 1: values)
    const bool is_key = blockIdx.x % 2 == 0;
    const int head = static_cast<int>(blockIdx.x / 2) % l.n_kv_heads;
    const int page = static_cast<int>(blockIdx.x / 2) / l.n_kv_heads;
    const std::byte* const bytes = p.pool + p.table[page] * p.page_stride;
    const int bits = is_key ? l.key_bits : l.value_bits;
    const auto* const scales = reinterpret_cast<const __half*>(bytes + (is_key ? l.key_scale_offset(head) : l.value_scale_offset(head)));
    const int groups = l.head_dim / kChannels;
    const int t = static_cast<int>(threadIdx.x) / groups;
    const int channel = static_cast<int>(threadIdx.x) % groups * kChannels;
    T* const out =
        static_cast<T*>(is_key ? p.key : p.value) + ((int64_t{head} * p.n_pages + page) * l.page_tokens() + t) * l.head_dim + channel;
#pragma unroll 4
    for (int block = 0; block < l.blocks_per_page; ++block) {
      uint32_t codes[kChannels];
      if (is_key) key_codes(l, bytes, head, block, t, channel, codes);
      else value_codes(l, bytes, head, block, t, channel, codes);
      const float scale = __half2float(scales[block * kTokenBlock + t]);
      float elements[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) elements[c] = scale * static_cast<float>(2 * static_cast<int>(codes[c]) - ((1 << bits) - 1));
      kernels::write_eight(out + int64_t{block} * kTokenBlock * l.head_dim, elements);
    }
  }

 private:
  static __device__ const uint32_t* words_at(const std::byte* bytes, int64_t offset) {
    return reinterpret_cast<const uint32_t*>(bytes + offset);
  }

  static __device__ void key_codes(const HousePageLayout& l, const std::byte* bytes, int head, int block, int t, int channel,
                                   uint32_t (&codes)[kChannels]) {
    const uint32_t* const words = words_at(bytes, l.key_block_offset(head, block)) + t;
    if (l.key_bits == 4) {
      const uint32_t word = words[channel / 8 * kTokenBlock];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) codes[c] = word >> (8 * (c % 4) + 4 * (c / 4)) & 15U;
      return;
    }
    // The lower or the upper eight of the word's sixteen channels; of the high bits' word the eight in question.
    const uint32_t low = words[channel / 16 * kTokenBlock] >> (channel % 16 / 2);
    const uint32_t high = l.key_bits == 3 ? words[(l.head_dim / 16 + channel / 32) * kTokenBlock] >> (channel % 32 / 4) : 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      codes[c] = (low >> (8 * (c % 4) + 2 * (c / 4)) & 3U) | (high >> (8 * (c % 4) + c / 4) & 1U) << 2;
  }

  static __device__ void value_codes(const HousePageLayout& l, const std::byte* bytes, int head, int block, int t, int channel,
                                     uint32_t (&codes)[kChannels]) {
    const int64_t row = l.value_block_offset(head, block) + (l.value_bits == 4 ? int64_t{t / 8} * l.head_dim * 4 : 0);
    uint32_t words[kChannels];
    read(words_at(bytes, row) + channel, words);
    const int shift = l.value_bits == 4 ? 8 * (t % 4) + 4 * (t % 8 / 4) : 8 * (t % 4) + 2 * (t / 4);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) codes[c] = words[c] >> shift & (l.value_bits == 4 ? 15U : 3U);
    if (l.value_bits == 3) {
      read(words_at(bytes, l.value_high_offset(head, block)) + channel, words);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) codes[c] |= (words[c] >> (8 * (t % 4) + 4 * (block % 2) + t / 4) & 1U) << 2;
    }
  }

  static __device__ void read(const uint32_t* from, uint32_t (&words)[kChannels]) {
#pragma unroll
    for (int i = 0; i < kChannels; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from + i);
      words[i] = four.x;
      words[i + 1] = four.y;
      words[i + 2] = four.z;
      words[i + 3] = four.w;
    }
  }
};

}  // namespace rotunda::kv::house
