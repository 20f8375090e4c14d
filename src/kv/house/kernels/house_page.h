#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/token_block.h"

namespace rotunda::kv::house {

using kernels::kTokenBlock;

/// The bytes of one page of rotunda2/3/4: packed keys and values of all kv heads of one layer, blocks_per_page * 16 tokens. This struct
/// defines the format, the same on every device; docs/formats.md draws it and says why it suits vector units and tensor cores.
///
/// Everything of one kv head lies together, heads one after the other, each at a 64-byte boundary:
///   key_codes   [blocks][key_words][16 tokens] uint32   a word holds neighbouring channels of one token
///   value_codes [blocks][value_words][head_dim] uint32  a word holds neighbouring tokens of one channel
///   key_scale   [tokens] fp16
///   value_scale [tokens] fp16
/// A code q of b bits stands for the odd integer 2 q - (2^b - 1), and the element is that times the token's scale.
///
/// The four bytes of a word are the four operands that integer dot products (VNNI, DP4A, int8 MMA) sum into one lane. Codes lie
/// in the word so that one mask per group of four elements finds them in their bytes:
///   2 bits: element 4j + i (of 16) at bits 8i + 2j      key word w: channels 16w ..; value word 0: the block's 16 tokens
///   4 bits: element 4j + i (of 8)  at bits 8i + 4j      key word w: channels 8w ..;  value word w: tokens 8w .. of the block
///   3 bits: low two bits as for 2 bits, then the high bit:
///           keys: ceil(head_dim / 32) words, word w: channel 32w + 4j + i at bit 8i + j; bits of no channel are 0
///           values: one word for two blocks, after the low words of the second: token 4j + i of block 2p + o at bit 8i + 4o + j
///           (blocks_per_page is even; the word of block pair p stands at [2p + 1][1], and [2p] has value_words 1)
struct HousePageLayout {
  int key_bits = 2;    ///< 2, 3 or 4
  int value_bits = 2;  ///< 2, 3 or 4
  int n_kv_heads = 0;
  int head_dim = 0;         ///< a multiple of 16
  int blocks_per_page = 8;  ///< even

  constexpr int64_t page_tokens() const { return int64_t{blocks_per_page} * kTokenBlock; }
  /// uint32 words of one token's key in one head.
  constexpr int key_words() const {
    return key_bits == 4 ? head_dim / 8 : head_dim / 16 + (key_bits == 3 ? (head_dim + 31) / 32 : 0);
  }
  /// uint32 rows [head_dim] of all the values of a head's page.
  constexpr int value_rows() const {
    return value_bits == 4 ? 2 * blocks_per_page : blocks_per_page + (value_bits == 3 ? blocks_per_page / 2 : 0);
  }

  constexpr int64_t key_codes_bytes() const { return int64_t{blocks_per_page} * key_words() * kTokenBlock * 4; }  ///< of one head
  constexpr int64_t value_codes_bytes() const { return int64_t{value_rows()} * head_dim * 4; }                    ///< of one head
  constexpr int64_t scale_bytes() const { return page_tokens() * 2; }  ///< of one head's keys, and values
  constexpr int64_t head_bytes() const { return (key_codes_bytes() + value_codes_bytes() + 2 * scale_bytes() + 63) / 64 * 64; }
  constexpr int64_t page_bytes() const { return n_kv_heads * head_bytes(); }

  /// Byte offsets within the page.
  constexpr int64_t key_block_offset(int head, int block) const {
    return head * head_bytes() + int64_t{block} * key_words() * kTokenBlock * 4;
  }
  /// The row of low bits (2 and 3 bits), or the first of the block's two rows (4 bits).
  constexpr int64_t value_block_offset(int head, int block) const {
    const int row = value_bits == 4 ? 2 * block : value_bits == 3 ? block + block / 2 : block;
    return head * head_bytes() + key_codes_bytes() + int64_t{row} * head_dim * 4;
  }
  /// 3 bits only: the row of high bits of the pair that holds `block`.
  constexpr int64_t value_high_offset(int head, int block) const {
    return head * head_bytes() + key_codes_bytes() + int64_t{block / 2 * 3 + 2} * head_dim * 4;
  }
  constexpr int64_t key_scale_offset(int head) const { return head * head_bytes() + key_codes_bytes() + value_codes_bytes(); }
  constexpr int64_t value_scale_offset(int head) const { return key_scale_offset(head) + scale_bytes(); }
};

}  // namespace rotunda::kv::house
