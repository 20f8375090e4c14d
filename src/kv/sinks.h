#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kv/exact_store.h"
#include "ops/tensor_bundle.h"

namespace rotunda::kv {

/// One large entry of a layer's input.
struct SinkEntry {
  float magnitude;
  int64_t position;
};

/// The attention sinks of one layer of one sequence: the first `n_first` tokens, and the tokens that own the
/// `n_entries` largest |entries| of the layer's input seen so far, a token counting as often as it has such entries
/// (RotateKV, arXiv:2501.16383; massive activations, arXiv:2402.17762; first tokens: attention sinks,
/// arXiv:2309.17453). Their keys and values lie here in 16 bits.
class LayerSinks {
 public:
  LayerSinks() = default;
  LayerSinks(int n_kv_heads, int head_dim, int n_entries, int n_first)
      : n_entries_(n_entries), n_first_(n_first), store_(n_kv_heads, head_dim, 0) {}

  /// Takes new tokens in. Chunk by chunk this ends with the same tokens as the whole text at once. Tokens come in order,
  /// and of the first `n_first` none may be left out.
  /// @param hidden [n_tokens, hidden_size], the layer's input; undefined: no token is chosen by its entries
  /// @param first the position of the first token
  /// @param key, value [n_tokens][kv_channels] fp32, keys after RoPE
  /// @return whether anything changed. @throws Error{kUser} where a chosen token does not fit fp16.
  bool update(const at::Tensor& hidden, int64_t first, int64_t n_tokens, const float* key, const float* value);

  /// Whether update() with these tokens could change anything: cheap, for one token.
  bool would_change(const at::Tensor& hidden, int64_t first) const;

  /// Positions of the tokens kept, sorted.
  std::vector<int64_t> positions() const;
  /// By slot of store(): the position, or -1 for a free slot.
  const std::vector<int64_t>& slots() const { return slots_; }
  const ExactStore& store() const { return store_; }
  void truncate(int64_t kv_len);

  int n_first() const { return n_first_; }
  const std::vector<SinkEntry>& entries() const { return entries_; }

  /// As part of a saved sequence: tensors whose names end in `suffix`.
  void export_to(ops::TensorBundle& bundle, const std::string& suffix) const;
  /// @param kv_len of the sequence   @throws Error{kUser} where a tensor is missing or does not fit
  void import_from(const ops::TensorBundle& bundle, const std::string& suffix, int64_t kv_len);

 private:
  void choose(const at::Tensor& hidden, int64_t first);

  int n_entries_ = 0;
  int n_first_ = 0;
  std::vector<SinkEntry> entries_;  // largest first
  std::vector<int64_t> slots_;
  ExactStore store_;
};

}  // namespace rotunda::kv
