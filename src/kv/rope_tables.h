#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "kernels/attention/token_block.h"
#include "ops/rope.h"

namespace rotunda::kv {

/// Pure cosines and sines (no attention factor) of page starts and of places within a page: R_n = R_page R_place, so
/// that positions far out cost no table of their own.
class RopeTables {
 public:
  RopeTables() = default;
  /// @param inv_freq [head_dim / 2]
  RopeTables(std::vector<double> inv_freq, int64_t page_tokens);

  const std::vector<double>& inv_freq() const { return inv_freq_; }
  /// Grows the page table to `n_pages`.
  void reserve_pages(int64_t n_pages);
  const float* page_cos() const { return page_cos_.data(); }  ///< [n_pages][head_dim / 2]
  const float* page_sin() const { return page_sin_.data(); }
  const float* token_cos() const { return token_cos_.data(); }  ///< [blocks][head_dim / 2][16]
  const float* token_sin() const { return token_sin_.data(); }

  /// cos and sin times `factor` of the 16 positions of block `block` of the sequence: each [head_dim / 2][16].
  void block(int64_t block, float factor, float* cos, float* sin) const;

 private:
  std::vector<double> inv_freq_;
  int64_t page_tokens_ = 0;
  std::vector<float> page_cos_, page_sin_, token_cos_, token_sin_;
};

/// The tables of a cache, by the sequence length that RoPE is reckoned with: one, but for `dynamic` RoPE.
class RopeTableSet {
 public:
  RopeTableSet(ops::Rope rope, int64_t page_tokens) : rope_(std::move(rope)), page_tokens_(page_tokens) {}

  /// Makes the table of this length where it is not there yet, for `n_pages` pages at least.
  const RopeTables& prepare(int64_t rope_len, int64_t n_pages);
  /// One that is there. @throws Error{kBug} for a length that was not prepared.
  const RopeTables& at(int64_t rope_len) const;
  /// Forgets the tables of all other lengths.
  void keep_only(const std::vector<int64_t>& rope_lens);

 private:
  // Lengths that RoPE does not look at share the table of length 0.
  int64_t key(int64_t rope_len) const;

  ops::Rope rope_;
  int64_t page_tokens_;
  std::map<int64_t, RopeTables> tables_;
};

}  // namespace rotunda::kv
