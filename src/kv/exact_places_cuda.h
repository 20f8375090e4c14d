#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "kernels/attention/exact_tokens_cuda.h"
#include "kv/kv_cache.h"
#include "kv/kv_options.h"

namespace rotunda::kv {

/// What sequences keep in 16 bits beside their pages on a GPU: the window of newest tokens and the sinks, all layers. A sequence has a place
/// here, a number. What LayerSinks and ExactStore are on the CPU.
///
/// The window has a block of 16 slots more than it keeps tokens, and there are more slots than sinks, so that the step of one token
/// overwrites nothing that taking it back would want.
class ExactPlacesCuda {
 public:
  /// Slots of the window that are no token's.
  static constexpr int64_t kSpareSlots = 16;

  ExactPlacesCuda(const KvModel& model, const ExactOptions& options);

  int64_t take();               ///< an empty place
  int64_t copy(int64_t place);  ///< a place with the same content
  void give_back(int64_t place);
  /// Forgets sinks from position kv_len on.
  void truncate(int64_t place, int64_t kv_len);
  /// Makes room for the page masks of sequences of so many tokens.
  void reserve_tokens(int64_t n_tokens);

  /// What the kernels want to know. Addresses change where epoch() does.
  kernels::ExactTokens view() const;
  uint64_t epoch() const { return epoch_; }
  const at::Tensor& magnitudes() const { return magnitudes_; }  ///< [places, n_layers, n_entries] fp32, largest first; -1: none
  const at::Tensor& entries() const { return entries_; }        ///< [places, n_layers, n_entries] int64 positions; -1: none

  /// All that a place holds, for taking a step back. @param whole the 16-bit tokens too, for a step of several tokens
  struct Saved {
    int64_t place;
    at::Tensor bytes, sink_positions, magnitudes, entries;
  };
  Saved save(int64_t place, bool whole) const;
  void restore(const Saved& saved);

  int64_t window_bytes() const;  ///< of a place, all layers
  int64_t sink_bytes() const;

  /// As the cache on the CPU writes and reads it. @param stored_len, kv_len of the sequence
  void export_to(int64_t place, int64_t stored_len, int64_t kv_len, ops::TensorBundle& bundle) const;
  /// @throws Error{kUser} where a tensor is missing or does not fit.
  void import_from(int64_t place, const ops::TensorBundle& bundle, int64_t stored_len, int64_t kv_len);

 private:
  void grow(int64_t n_places);

  int n_layers_;
  int n_kv_heads_;
  int head_dim_;
  ExactOptions options_;
  int window_blocks_;
  int sink_blocks_;
  uint64_t epoch_ = 1;
  at::Tensor bytes_;           // [places, n_layers, piece bytes] uint8
  at::Tensor sink_positions_;  // [places, n_layers, 16 sink_blocks] int32
  at::Tensor magnitudes_, entries_;
  at::Tensor page_masks_;  // [n_layers, places, entries] int16
  std::vector<int64_t> free_;
};

}  // namespace rotunda::kv
