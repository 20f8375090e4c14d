#pragma once

#include <cstring>

#include "kv/grouped/kernels/grouped_page.h"

// Where codes, scales and zero points lie in a page, one at a time.

namespace rotunda::kv::grouped {

/// A plane's share of a code: `width` bits from `shift` on of the little-endian word at byte `word` of the page.
struct CodePlace {
  int64_t word;
  int shift;
};

/// @param token within the page
constexpr CodePlace key_place(const GroupedPageLayout& l, int head, int width, int64_t token, int channel) {
  const int per_word = 32 / width;
  const int64_t row = token / kTokenBlock * l.key_words(width) + channel / per_word;
  const int element = channel % per_word;
  return {head * l.head_bytes() + l.key_plane_offset(width) + (row * kTokenBlock + token % kTokenBlock) * 4,
          8 * (element % 4) + width * (element / 4)};
}

constexpr CodePlace value_place(const GroupedPageLayout& l, int head, int width, int64_t token, int channel) {
  const int per_word = 32 / width;
  const auto element = static_cast<int>(token % per_word);
  return {head * l.head_bytes() + l.value_plane_offset(width) + (token / per_word * l.head_dim + channel) * 4,
          8 * (element % 4) + width * (element / 4)};
}

constexpr CodePlace zero_place(const GroupedPageLayout& l, int head, bool key, int width, int group, int64_t token) {
  const GroupedSide& side = key ? l.key : l.value;
  int64_t at = head * l.head_bytes() + l.zero_offset(key) + group * l.zero_group_bytes(side);
  for (int wider = kWidestPlane; wider > width; wider /= 2)
    if (has_plane(side.bits, wider)) at += l.page_tokens() * wider / 8;
  const int per_word = 32 / width;
  return {at + token / per_word * 4, width * static_cast<int>(token % per_word)};
}

constexpr int64_t scale_place(const GroupedPageLayout& l, int head, bool key, int group, int64_t token) {
  const GroupedSide& side = key ? l.key : l.value;
  return head * l.head_bytes() + l.scale_offset(key) + (group * l.page_tokens() + token) * side.scale_bytes();
}

inline uint32_t read_word(const std::byte* at) {
  uint32_t word;
  std::memcpy(&word, at, 4);
  return word;
}

inline void write_bits(std::byte* at, int shift, uint32_t mask, uint32_t bits) {
  const uint32_t word = (read_word(at) & ~(mask << shift)) | (bits & mask) << shift;
  std::memcpy(at, &word, 4);
}

/// A code put together of its planes. @param place of a plane by its width
template <typename Place>
uint32_t read_code(const std::byte* page, int bits, const Place& place) {
  uint32_t code = 0;
  for (int width = kWidestPlane; width > 0; width /= 2) {
    if (!has_plane(bits, width)) continue;
    const CodePlace at = place(width);
    code |= (read_word(page + at.word) >> at.shift & ((1u << width) - 1)) << plane_shift(bits, width);
  }
  return code;
}

template <typename Place>
void write_code(std::byte* page, int bits, uint32_t code, const Place& place) {
  for (int width = kWidestPlane; width > 0; width /= 2) {
    if (!has_plane(bits, width)) continue;
    const CodePlace at = place(width);
    write_bits(page + at.word, at.shift, (1u << width) - 1, code >> plane_shift(bits, width));
  }
}

inline uint32_t read_code(const GroupedPageLayout& l, const std::byte* page, bool key, int head, int64_t token,
                          int channel) {
  return read_code(page, key ? l.key.bits : l.value.bits, [&](int width) {
    return key ? key_place(l, head, width, token, channel) : value_place(l, head, width, token, channel);
  });
}

}  // namespace rotunda::kv::grouped
