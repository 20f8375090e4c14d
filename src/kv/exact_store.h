#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/attention/decode_attention.h"

namespace rotunda::kv {

/// Slots for tokens in 16 bits (fp16: more mantissa than bf16, and keys that overflow it are refused), one layer: keys after RoPE,
/// values rotated. Any token may lie in any slot; who owns the store remembers which.
class ExactStore {
 public:
  ExactStore() = default;
  /// Room for at least `n_slots` tokens, rounded up to whole blocks.
  ExactStore(int n_kv_heads, int head_dim, int64_t n_slots);
  ExactStore(const ExactStore& other) = default;
  ExactStore& operator=(const ExactStore& other) = default;
  ExactStore(ExactStore&&) = default;
  ExactStore& operator=(ExactStore&&) = default;

  const kernels::PlainPageLayout& layout() const { return layout_; }
  int64_t n_slots() const { return layout_.page_tokens(); }
  int64_t bytes() const { return static_cast<int64_t>(storage_.size()); }
  const std::byte* page() const { return storage_.data(); }

  /// @param key, value [n_kv_heads * head_dim] fp32   @return false if an element is not finite or overflows fp16
  bool write(int64_t slot, const float* key, const float* value);
  void read(int64_t slot, float* key, float* value) const;

  /// Keys [n_kv_heads, head_dim, N] and values [n_kv_heads, N, head_dim] fp32 of the given slots.
  std::pair<at::Tensor, at::Tensor> load(const std::vector<int64_t>& slots) const;

  /// The raw bytes, [bytes()] uint8: a copy.
  at::Tensor export_bytes() const;
  void import_bytes(const at::Tensor& bytes);
  /// Room for `n_slots`; what is there stays in its slots.
  void grow(int64_t n_slots);

 private:
  kernels::PlainPageLayout layout_;
  std::vector<std::byte> storage_;
};

}  // namespace rotunda::kv
