#include <array>
#include <cstring>

#include "kv/grouped/kernels/grouped_codec.h"
#include "kv/grouped/kernels/grouped_place.h"
#include "kv/grouped/kernels/grouped_quantize.h"

namespace rotunda::kv::grouped {

namespace {

// One key or value of one head.
bool store_row(const GroupedLayer& layer, bool key, int head, int64_t token, const float* x, std::byte* page) {
  const GroupedPageLayout& l = layer.layout;
  const GroupedSide& side = key ? l.key : l.value;
  std::array<uint8_t, kMaxGroup> codes;
  for (int group = 0; group < l.groups(side); ++group) {
    const int first = group * side.group;
    const auto scale = quantize_group(side, key ? layer.key : layer.value, x + first, codes.data());
    if (!scale) return false;
    std::memcpy(page + scale_place(l, head, key, group, token), &scale->scale, static_cast<size_t>(side.scale_bytes()));
    if (side.zeros)
      write_code(page, side.bits, scale->zero,
                 [&](int width) { return zero_place(l, head, key, width, group, token); });
    for (int width = kWidestPlane; width > 0; width /= 2) {
      if (!has_plane(side.bits, width)) continue;
      const int down = plane_shift(side.bits, width);
      const uint32_t mask = (1u << width) - 1;
      const int per_word = 32 / width;
      // Channel 0; key_place and value_place say where the others are.
      const CodePlace start = key ? key_place(l, head, width, token, 0) : value_place(l, head, width, token, 0);
      for (int c = 0; c < side.group; ++c) {
        const int channel = first + c;
        const int element = channel % per_word;
        std::byte* const at = page + start.word + int64_t{key ? channel / per_word * kTokenBlock : channel} * 4;
        write_bits(at, key ? 8 * (element % 4) + width * (element / 4) : start.shift, mask,
                   static_cast<uint32_t>(codes[c]) >> down);
      }
    }
  }
  return true;
}

// Bits of no channel, at the end of a plane of single bits.
void clear_padding(const GroupedPageLayout& l, int head, int64_t token, std::byte* page) {
  if (!has_plane(l.key.bits, 1)) return;
  for (int c = l.head_dim; c % 32 != 0; ++c) {
    const CodePlace at = key_place(l, head, 1, token, c);
    write_bits(page + at.word, at.shift, 1, 0);
  }
}

}  // namespace

bool grouped_store(const GroupedStoreParams& p) {
  const GroupedPageLayout& l = p.layer->layout;
  for (int i = 0; i < p.n_tokens; ++i) {
    const int64_t token = int64_t{p.block} * kTokenBlock + p.first + i;
    for (int head = 0; head < l.n_kv_heads; ++head) {
      const int64_t row = i * p.row_stride + int64_t{head} * l.head_dim;
      if (!store_row(*p.layer, true, head, token, p.key + row, p.page)) return false;
      if (!store_row(*p.layer, false, head, token, p.value + row, p.page)) return false;
      clear_padding(l, head, token, p.page);
    }
  }
  return true;
}

}  // namespace rotunda::kv::grouped
