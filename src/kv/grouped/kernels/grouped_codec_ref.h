#pragma once

#include <vector>

#include "kernels/attention/decode_attention_ref.h"
#include "kv/grouped/kernels/grouped_place.h"
#include "kv/grouped/kernels/grouped_quantize.h"

// What pages mean: one scalar at a time, in double.

namespace rotunda::kv::grouped {

/// Scale times unit of one group, rounded to fp32.
inline double step_ref(const GroupedLayer& layer, const std::byte* page, bool key, int head, int64_t token, int group) {
  const GroupedPageLayout& l = layer.layout;
  const GroupedSide& side = key ? l.key : l.value;
  uint16_t bits = 0;
  std::memcpy(&bits, page + scale_place(l, head, key, group, token), static_cast<size_t>(side.scale_bytes()));
  return scale_value(side, bits) * (key ? layer.key : layer.value).unit;
}

/// Element of the stored key or value.
inline double element_ref(const GroupedLayer& layer, const std::byte* page, bool key, int head, int64_t token,
                          int channel) {
  const GroupedPageLayout& l = layer.layout;
  const GroupedSide& side = key ? l.key : l.value;
  const int group = channel / side.group;
  const uint32_t zero =
      side.zeros ? read_code(page, side.bits, [&](int width) { return zero_place(l, head, key, width, group, token); })
                 : 0;
  const uint32_t code = read_code(l, page, key, head, token, channel);
  return step_ref(layer, page, key, head, token, group) * level(side, key ? layer.key : layer.value, code, zero);
}

inline void grouped_decode_ref(const GroupedDecodeParams& p) {
  const GroupedPageLayout& l = p.layer->layout;
  kernels::decode_pages_ref(
      p.run, l.blocks_per_page, l.head_dim, p.n_q, p.q,
      [&](const std::byte* page, bool key, int64_t token, int channel) {
        return element_ref(*p.layer, page, key, p.kv_head, token, channel);
      },
      [](int, int, int64_t) { return 0.0; }, p.state);
}

inline void grouped_load_ref(const GroupedLoadParams& p) {
  const int d = p.layer->layout.head_dim;
  for (int lane = 0; lane < kTokenBlock; ++lane) {
    const int64_t token = int64_t{p.block} * kTokenBlock + lane;
    for (int c = 0; c < d; ++c) {
      p.key_out[c * kTokenBlock + lane] = static_cast<float>(element_ref(*p.layer, p.page, true, p.kv_head, token, c));
      p.value_out[int64_t{lane} * d + c] =
          static_cast<float>(element_ref(*p.layer, p.page, false, p.kv_head, token, c));
    }
  }
}

}  // namespace rotunda::kv::grouped
