#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/token_block.h"

namespace rotunda::kv::grouped {

using kernels::kTokenBlock;

/// How a group's scale is stored.
enum class ScaleType : uint8_t {
  kFp16,  ///< two bytes
  kE8m0,  ///< one byte E: 2^(E - exponent_bias)
  kE4m3,  ///< one byte, fp8 without sign
};

/// Keys or values of a page: what a group of channels of one token takes.
struct GroupedSide {
  int bits = 4;    ///< of a code, 2 to 8
  int group = 32;  ///< channels that share a scale: a multiple of 16 that divides head_dim
  ScaleType scale = ScaleType::kFp16;
  int exponent_bias = 127;  ///< of kE8m0: 127 as OCP has it; 149 where the smallest step is the smallest fp32
  bool zeros = false;       ///< each group has a zero point, a code of `bits` bits

  constexpr int scale_bytes() const { return scale == ScaleType::kFp16 ? 2 : 1; }
};

/// A code of b bits is cut into planes of 8, 4, 2 and 1 bits, one for each bit set in b, the widest first and lowest: 3 = 2 + 1, 6 = 4 + 2.
/// Each plane is stored by itself, so that every word of it holds the same number of codes.
inline constexpr int kWidestPlane = 8;
constexpr bool has_plane(int bits, int width) { return (bits & width) != 0; }
/// The lowest bit of a code that lies in its plane of this width.
constexpr int plane_shift(int bits, int width) { return bits & ~(2 * width - 1); }

/// The bytes of one page of a grouped format: packed keys and values of all kv heads of one layer, blocks_per_page * 16 tokens. This
/// struct defines the layout, the same on every device; docs/formats.md draws it.
///
/// Everything of one kv head lies together, heads one after the other, each at a 64-byte boundary:
///   key codes    for each plane, of width w: [blocks][ceil(head_dim w / 32)][16 tokens] uint32   a word: 32 / w channels of one token
///   value codes  for each plane, of width w: [tokens w / 32][head_dim] uint32                    a word: 32 / w tokens of one channel
///   key scale    [groups][tokens] fp16 or one byte
///   value scale  the same
///   key zero     [groups], for each plane [tokens w / 32] uint32: token t of a word at bit w t   (where there are zero points)
///   value zero   the same
/// In a word of codes element 4 j + i lies at bits 8 i + w j: one mask finds four elements in their bytes, which are the operands
/// that integer dot products (VNNI, DP4A, int8 MMA) sum into one lane. Bits of no channel are 0.
struct GroupedPageLayout {
  GroupedSide key;
  GroupedSide value;
  int n_kv_heads = 0;
  int head_dim = 0;         ///< a multiple of 16
  int blocks_per_page = 8;  ///< even

  constexpr int64_t page_tokens() const { return int64_t{blocks_per_page} * kTokenBlock; }
  /// uint32 words of one token's key in a plane.
  constexpr int key_words(int width) const { return (head_dim * width + 31) / 32; }
  constexpr int groups(const GroupedSide& side) const { return head_dim / side.group; }

  /// Of one head:
  constexpr int64_t key_codes_bytes() const { return key_plane_offset(0); }
  constexpr int64_t value_codes_bytes() const { return value_plane_offset(0) - key_codes_bytes(); }
  constexpr int64_t scale_bytes(const GroupedSide& side) const {
    return groups(side) * page_tokens() * side.scale_bytes();
  }
  constexpr int64_t zero_bytes(const GroupedSide& side) const {
    return side.zeros ? groups(side) * zero_group_bytes(side) : 0;
  }
  constexpr int64_t zero_group_bytes(const GroupedSide& side) const { return page_tokens() * side.bits / 8; }
  constexpr int64_t head_bytes() const { return (zero_offset(false) + zero_bytes(value) + 63) / 64 * 64; }
  constexpr int64_t page_bytes() const { return n_kv_heads * head_bytes(); }

  /// Of a token, all heads; scales with zero points.
  constexpr int64_t codes_bytes_per_token() const {
    return n_kv_heads * (key_codes_bytes() + value_codes_bytes()) / page_tokens();
  }
  constexpr int64_t scale_bytes_per_token() const {
    return n_kv_heads * (scale_bytes(key) + scale_bytes(value) + zero_bytes(key) + zero_bytes(value)) / page_tokens();
  }

  /// Byte offsets within a head. `width` 0: the end of all planes.
  constexpr int64_t key_plane_offset(int width) const {
    int64_t offset = 0;
    for (int wider = kWidestPlane; wider > width; wider /= 2) {
      if (has_plane(key.bits, wider)) offset += int64_t{blocks_per_page} * key_words(wider) * kTokenBlock * 4;
    }
    return offset;
  }
  constexpr int64_t value_plane_offset(int width) const {
    int64_t offset = key_codes_bytes();
    for (int wider = kWidestPlane; wider > width; wider /= 2) {
      if (has_plane(value.bits, wider)) offset += page_tokens() * wider / 32 * head_dim * 4;
    }
    return offset;
  }
  constexpr int64_t scale_offset(bool of_keys) const {
    return key_codes_bytes() + value_codes_bytes() + (of_keys ? 0 : scale_bytes(key));
  }
  constexpr int64_t zero_offset(bool of_keys) const {
    return scale_offset(false) + scale_bytes(value) + (of_keys ? 0 : zero_bytes(key));
  }
};

}  // namespace rotunda::kv::grouped
