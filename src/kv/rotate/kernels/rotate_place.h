#pragma once

#include "kv/rotate/kernels/rotate_page.h"

// Where codes, scales and zero points lie in a page, one at a time.

namespace rotunda::kv::rotate {

/// Where the bits of a code lie: `low_bits` bits from `low_shift` on of the little-endian word at `low_word` bytes, and for 3 bits
/// one more at bit `high_shift` of the word at `high_word`.
struct CodePlace {
  int64_t low_word = 0;
  int low_bits = 0;
  int low_shift = 0;
  int64_t high_word = -1;  ///< -1: none
  int high_shift = 0;
};

/// @param channel within the rotation group
constexpr CodePlace key_place(const RotatePageLayout& l, int group, int64_t token, int channel) {
  const int64_t block = token / kTokenBlock;
  const int64_t lane = token % kTokenBlock;
  const int64_t base = (int64_t{group} * l.blocks_per_page + block) * l.key_words();
  const auto word = [&](int64_t w) { return ((base + w) * kTokenBlock + lane) * 4; };
  CodePlace at;
  if (l.bits == 4) {
    at = {word(channel / 8), 4, channel % 8 * 4, -1, 0};
  } else {
    at = {word(channel / 16), 2, channel % 16 * 2, -1, 0};
    if (l.bits == 3) {
      at.high_word = word(l.group_channels() / 16 + channel / 32);
      at.high_shift = channel % 32;
    }
  }
  return at;
}

/// @param channel within the head
constexpr CodePlace value_place(const RotatePageLayout& l, int head, int64_t token, int channel) {
  const int64_t base = l.value_codes_offset() + (head * l.page_tokens() + token) * l.value_row_bytes();
  const int u = channel / 16;
  const int j = channel % 16;
  if (l.bits == 4) return {base + (2 * u + j % 2) * 4, 4, j / 2 * 4, -1, 0};
  CodePlace at{base + u * 4, 2, j * 2, -1, 0};
  if (l.bits == 3) {
    // A 16-bit word may be the last two bytes of the page: it is addressed as the byte that holds the bit.
    at.high_word = base + l.head_dim / 16 * 4 + u * 2 + j / 8;
    at.high_shift = j % 8;
  }
  return at;
}

/// Byte offset of element (group, token) of scales or zeros that start at `base`, `size` bytes each.
constexpr int64_t meta_offset(const RotatePageLayout& l, int64_t base, int size, int group, int64_t token) {
  return base + ((token / kTokenBlock * l.n_quant_groups() + group) * kTokenBlock + token % kTokenBlock) * size;
}

}  // namespace rotunda::kv::rotate
