#pragma once

#include <cstring>

#include "base/half.h"
#include "kernels/attention/decode_attention_ref.h"
#include "kv/kivi/kernels/kivi_codec.h"

// What pages mean: one scalar at a time, in double.

namespace rotunda::kv::kivi {

inline uint32_t code_ref(const KiviPageLayout& l, const std::byte* page, bool key, int head, int64_t token,
                         int channel) {
  const int64_t row = key ? (token / kGroup * l.head_dim + channel) * l.bits : token * l.value_words();
  const int64_t element = key ? token % kGroup : channel;
  uint32_t word;
  std::memcpy(
      &word,
      page + (key ? l.key_codes_offset(head) : l.value_codes_offset(head)) + (row + element / l.codes_per_word()) * 4,
      4);
  return word >> element % l.codes_per_word() * l.bits & ((1u << l.bits) - 1);
}

/// Element of the stored key or value; exact: an 11-bit scale times a code, plus an 11-bit number.
inline double element_ref(const KiviPageLayout& l, const std::byte* page, bool key, int head, int64_t token,
                          int channel) {
  const int64_t group = key ? token / kGroup * l.head_dim + channel : token * l.value_groups() + channel / kGroup;
  const auto number = [&](int64_t offset) {
    Half half;
    std::memcpy(&half.bits, page + offset + group * 2, 2);
    return static_cast<double>(to_float(half));
  };
  const double scale = number(key ? l.key_scale_offset(head) : l.value_scale_offset(head));
  const double low = number(key ? l.key_low_offset(head) : l.value_low_offset(head));
  return scale * code_ref(l, page, key, head, token, channel) + low;
}

inline void kivi_decode_ref(const KiviDecodeParams& p) {
  const KiviPageLayout& l = *p.layout;
  kernels::decode_pages_ref(
      p.run, l.blocks_per_page, l.head_dim, p.n_q, p.q,
      [&](const std::byte* page, bool key, int64_t token, int channel) {
        return element_ref(l, page, key, p.kv_head, token, channel);
      },
      [](int, int, int64_t) { return 0.0; }, p.state);
}

inline void kivi_load_ref(const KiviLoadParams& p) {
  const int d = p.layout->head_dim;
  for (int lane = 0; lane < kTokenBlock; ++lane) {
    const int64_t token = int64_t{p.block} * kTokenBlock + lane;
    for (int c = 0; c < d; ++c) {
      p.key_out[c * p.key_stride + lane] =
          static_cast<float>(element_ref(*p.layout, p.page, true, p.kv_head, token, c));
      p.value_out[int64_t{lane} * d + c] =
          static_cast<float>(element_ref(*p.layout, p.page, false, p.kv_head, token, c));
    }
  }
}

}  // namespace rotunda::kv::kivi
