#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/token_block.h"

namespace rotunda::kv::kivi {

using kernels::kTokenBlock;

/// Tokens of a group of keys, and channels of a group of values.
inline constexpr int kGroup = 32;

/// The bytes of one page of a KIVI format (arXiv:2402.02750): keys per channel over 32 tokens, values per token over 32 channels. This
/// struct defines the layout; docs/formats.md draws it.
///
/// Everything of one kv head lies together, heads one after the other:
///   key codes    [spans][head_dim][bits] uint32                  a span: 32 tokens; the words of one channel, first token in the low bits
///   value codes  [tokens][head_dim bits / 32] uint32             the words of one token, first channel in the low bits
///   key scale    [spans][head_dim] fp16
///   key low      [spans][head_dim] fp16                          what code 0 stands for
///   value scale  [tokens][head_dim / 32] fp16
///   value low    [tokens][head_dim / 32] fp16
struct KiviPageLayout {
  int bits = 2;  ///< of a code: 2 or 4
  int n_kv_heads = 0;
  int head_dim = 0;         ///< a multiple of 32
  int blocks_per_page = 8;  ///< even

  constexpr int64_t page_tokens() const { return int64_t{blocks_per_page} * kTokenBlock; }
  constexpr int64_t spans() const { return page_tokens() / kGroup; }
  constexpr int codes_per_word() const { return 32 / bits; }
  /// uint32 words of one token's value.
  constexpr int value_words() const { return head_dim * bits / 32; }
  constexpr int value_groups() const { return head_dim / kGroup; }

  /// Of one head, keys or values:
  constexpr int64_t codes_bytes() const { return page_tokens() * value_words() * 4; }
  /// Scales, or what code 0 stands for.
  constexpr int64_t scale_bytes() const { return page_tokens() * value_groups() * 2; }

  constexpr int64_t head_bytes() const { return 2 * codes_bytes() + 4 * scale_bytes(); }
  constexpr int64_t page_bytes() const { return n_kv_heads * head_bytes(); }

  /// Byte offsets within a page.
  constexpr int64_t key_codes_offset(int head) const { return head * head_bytes(); }
  constexpr int64_t value_codes_offset(int head) const { return key_codes_offset(head) + codes_bytes(); }
  constexpr int64_t key_scale_offset(int head) const { return value_codes_offset(head) + codes_bytes(); }
  constexpr int64_t key_low_offset(int head) const { return key_scale_offset(head) + scale_bytes(); }
  constexpr int64_t value_scale_offset(int head) const { return key_low_offset(head) + scale_bytes(); }
  constexpr int64_t value_low_offset(int head) const { return value_scale_offset(head) + scale_bytes(); }
};

// 2 bits, 32 codes, a scale and what code 0 stands for: 3 bits an element.
static_assert(8 * KiviPageLayout{2, 1, 128, 8}.head_bytes() == 3 * 2 * 128 * 128);

}  // namespace rotunda::kv::kivi
