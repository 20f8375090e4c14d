#pragma once

#include <cstddef>
#include <cstdint>

#include "kv/rotate/kernels/rotate_page.h"

namespace rotunda::kv::rotate {

/// What one layer's pages need besides their bytes.
struct RotateLayer {
  RotatePageLayout layout;
  /// [kv_channels] the quantization group of each key channel, channels in unpermuted (rotated) order. Values have channel / group_size.
  const uint16_t* key_group;
  float key_clip = 0.8F;    ///< hi and lo of a group are its maximum and minimum times this
  float value_clip = 0.8F;
  kernels::HadamardPlan key_hadamard;  ///< of size group_channels
};

/// Quantizes up to 16 consecutive tokens that lie in one block.
/// Quantizer, per token and group: hi = clip * max, lo = clip * min, s = fp16((hi - lo) / (2^bits - 1));
///   kCode: z = round(-lo / s), q = clamp(round(x / s) + z, 0, 2^bits - 1); where |z| would pass 127, s grows until it does not:
///     s = fp16(|lo| / 127), one fp16 step more if rounding took it down too far;
///   kMinimum: q = clamp(round((x - fp16(lo)) / s), 0, 2^bits - 1).
/// A range too narrow for fp16 takes the smallest s above 0, 2^-24. Steps are fp32, rounding is to nearest even. A constant group decodes to its value (to fp16 rounding): kCode stores s = x, z = 0, q = 1; kMinimum s = 0, lo = x.
struct RotateStoreParams {
  const RotateLayer* layer;
  const float* key;    ///< [n_tokens][kv_channels] rotated (r = k W_G), unpermuted, row_stride in elements
  const float* value;  ///< [n_tokens][kv_channels] rotated per head
  int64_t row_stride;
  int block;           ///< within the page
  int first;           ///< first token within the block
  int n_tokens;        ///< first + n_tokens <= 16; other tokens of the block keep their bytes
  std::byte* page;
};

/// @return false where an element is not finite or a scale or minimum overflows fp16; the tokens' bytes are then unspecified
bool rotate_store(const RotateStoreParams& params);

/// Decode attention of all query heads of one rotation group over packed pages; adds to `state`.
/// Per block: codes -> r -> k = r W_G^T -> RoPE -> scores -> online softmax -> values on their codes. At no time more than one
/// block is unpacked. RoPE uses R_n = R_base R_j: queries are turned back by the first position of the page, keys forward by
/// their place within it, so the cosine table has page_tokens rows only.
struct RotateDecodeParams {
  const RotateLayer* layer;
  kernels::PageRun run;
  int rotation_group;
  int n_q_per_kv;  ///< query heads of each kv head (GQA), >= 1
  const float* q;  ///< [heads_per_group * n_q_per_kv][head_dim] after RoPE (angles only, attention factor NOT applied), times softmax scale and attention_factor^2
  /// RoPE of each page's first position: [n_pages][head_dim / 2], pure cos and sin
  const float* page_cos;
  const float* page_sin;
  /// RoPE of positions 0 .. page_tokens - 1: [blocks_per_page][head_dim / 2][16], pure cos and sin
  const float* token_cos;
  const float* token_sin;
  kernels::SoftmaxState state;  ///< of heads_per_group * n_q_per_kv heads
};

void rotate_decode(const RotateDecodeParams& params);

/// Unpacks one block of one rotation group for a tile of a matrix product: keys rotated back and with RoPE, values as stored (rotated).
struct RotateLoadParams {
  const RotateLayer* layer;
  const std::byte* page;
  int rotation_group;
  int block;
  /// cos and sin of this block's tokens at their absolute positions, attention factor in: [head_dim / 2][16]
  const float* cos;
  const float* sin;
  float* key_out;    ///< [group_channels][out_stride], tokens in columns 0 .. 15
  int64_t out_stride;
  float* value_out;  ///< [heads_per_group][value_head_stride elements apart][16][head_dim]
  int64_t value_head_stride;
};

void rotate_load(const RotateLoadParams& params);

}  // namespace rotunda::kv::rotate
