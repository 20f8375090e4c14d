#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kernels/hadamard/hadamard.h"

namespace rotunda::kv::rotate {

using kernels::kTokenBlock;

/// How a quantization group says where its codes begin.
enum class ZeroPoint : uint8_t {
  kCode,     ///< int8 z, x = s * (q - z): RotateKV as published, with 8 bits for z since groups need not straddle zero
  kMinimum,  ///< fp16 lo, x = s * q + lo
};

/// The bytes of one page of packed keys and values, all kv heads of one layer, blocks_per_page * 16 tokens. This struct defines the
/// format; docs/formats.md draws it.
///
/// Keys are codes of r = k W_G, k before RoPE, W_G the normalized Hadamard matrix over the `group_channels` channels of
/// `heads_per_group` neighbouring heads (RotateKV, arXiv:2501.16383). The calibrated permutation of the method decides which
/// channels share a quantization group; codes themselves stay in the unpermuted order, so that nothing has to be
/// permuted back when they are read: each channel only looks up the scale of its group. Same groups, same codes, same values.
///   key_codes   [n_rotation_groups][blocks][key_words][16] uint32: word w of a token
///                 2 bits: channels 16w .. 16w+15, channel 16w+j at bits 2j; 4 bits: channels 8w .. 8w+7, channel 8w+j at bits 4j
///                 3 bits: first the 2 low bits of all channels as in the 2-bit layout (group_channels / 16 words), then the high
///                 bit: channels 32w .. 32w+31, channel 32w+j at bit j (ceil(group_channels / 32) words); bits of no channel are 0
///   key_scale   [blocks][n_key_groups][16] fp16
///   key_zero    [blocks][n_key_groups][16] int8 or fp16 (ZeroPoint)
///   value_codes [n_kv_heads][tokens][value_row_bytes]: uint32 words little-endian
///                 2 bits: channel 16w+j at bits 2j of word w; 4 bits: channel 16u+j in word 2u + j%2 at bits 4(j/2)
///                 3 bits: head_dim/16 words with the low 2 bits, then head_dim/16 uint16 with the high bit of channel 16u+j at bit j
///   value_scale, value_zero  as for the keys, n_value_groups
struct RotatePageLayout {
  int bits = 2;  ///< 2, 3 or 4
  ZeroPoint zero = ZeroPoint::kCode;
  int n_kv_heads = 0;
  int head_dim = 0;         ///< a multiple of 16
  int heads_per_group = 1;  ///< kv heads that one key rotation covers; divides n_kv_heads
  int group_size = 128;     ///< channels per quantization group; divides kv_channels(), a multiple of 16
  int blocks_per_page = 8;

  constexpr int kv_channels() const { return n_kv_heads * head_dim; }
  constexpr int group_channels() const { return heads_per_group * head_dim; }
  constexpr int n_rotation_groups() const { return n_kv_heads / heads_per_group; }
  constexpr int n_quant_groups() const { return kv_channels() / group_size; }  ///< of keys, and of values
  constexpr int64_t page_tokens() const { return int64_t{blocks_per_page} * kTokenBlock; }
  constexpr int key_words() const {
    const int c = group_channels();
    return bits == 3 ? c / 16 + (c + 31) / 32 : c * bits / 32;
  }
  constexpr int value_row_bytes() const { return head_dim * bits / 8; }
  constexpr int zero_bytes() const { return zero == ZeroPoint::kCode ? 1 : 2; }

  constexpr int64_t key_codes_bytes() const { return int64_t{n_rotation_groups()} * blocks_per_page * key_words() * kTokenBlock * 4; }
  constexpr int64_t scale_bytes() const { return page_tokens() * n_quant_groups() * 2; }           ///< of keys, and of values
  constexpr int64_t zeros_bytes() const { return page_tokens() * n_quant_groups() * zero_bytes(); }  ///< of keys, and of values
  constexpr int64_t value_codes_bytes() const { return page_tokens() * n_kv_heads * value_row_bytes(); }

  constexpr int64_t key_scale_offset() const { return key_codes_bytes(); }
  constexpr int64_t key_zero_offset() const { return key_scale_offset() + scale_bytes(); }
  constexpr int64_t value_codes_offset() const { return key_zero_offset() + zeros_bytes(); }
  constexpr int64_t value_scale_offset() const { return value_codes_offset() + value_codes_bytes(); }
  constexpr int64_t value_zero_offset() const { return value_scale_offset() + scale_bytes(); }
  constexpr int64_t page_bytes() const { return value_zero_offset() + zeros_bytes(); }
};

}  // namespace rotunda::kv::rotate
