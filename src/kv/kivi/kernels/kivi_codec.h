#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kv/kivi/kernels/kivi_page.h"

namespace rotunda::kv::kivi {

/// Which number code 0 stands for.
enum class ZeroPoint : uint8_t {
  kMinimum,  ///< the group's smallest element (as published)
  kCode,     ///< the multiple of the scale that is nearest to it, so that 0 is on the grid
};

/// Quantizes the 32 tokens of one span.
struct KiviStoreParams {
  const KiviPageLayout* layout;
  ZeroPoint zero;
  const float* key;    ///< [32][n_kv_heads * head_dim]; row_stride in elements
  const float* value;  ///< the same
  int64_t row_stride;
  int span;  ///< within the page
  std::byte* page;
};

/// A group x of 32, fp32 throughout: scale = fp16((max x - min x) / (2^bits - 1)); low = fp16(min x), or with ZeroPoint::kCode
/// fp16(round(min x / scale) * scale); code = round((x - low) / scale), ties to even, clamped; a code stands for scale * code + low. A group
/// whose scale is 0 has low = fp16(min x) and codes 0.
/// @return false where an element is not finite, or low or what the largest code stands for overflows fp16; the span's bytes are then
/// unspecified
bool kivi_store(const KiviStoreParams& params);

/// Decode attention of all query heads of one kv head over packed pages; adds to `state`. fp32; the scales of keys go into the query, once a
/// span, those of values into the softmax weights.
struct KiviDecodeParams {
  const KiviPageLayout* layout;
  kernels::PageRun run;
  int kv_head;
  int n_q;         ///< query heads of this kv head, >= 1
  const float* q;  ///< [n_q][head_dim] after RoPE, times the softmax scale
  kernels::SoftmaxState state;
};

void kivi_decode(const KiviDecodeParams& params);

/// Unpacks one block of one kv head; equal to the reference to the last bit.
struct KiviLoadParams {
  const KiviPageLayout* layout;
  const std::byte* page;
  int kv_head;
  int block;
  float* key_out;  ///< [head_dim][key_stride], tokens in columns 0 .. 15
  int64_t key_stride;
  float* value_out;  ///< [16][head_dim]
};

void kivi_load(const KiviLoadParams& params);

}  // namespace rotunda::kv::kivi
