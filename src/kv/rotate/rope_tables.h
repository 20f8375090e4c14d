#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention/token_block.h"
#include "ops/rope.h"

namespace rotunda::kv::rotate {

/// Pure cosines and sines (no attention factor) of page starts and of places within a page: R_n = R_page R_place, so that positions
/// far out cost no table of their own.
class RopeTables {
 public:
  RopeTables() = default;
  /// @param inv_freq [head_dim / 2]
  RopeTables(std::vector<double> inv_freq, int64_t page_tokens);

  const std::vector<double>& inv_freq() const { return inv_freq_; }
  /// Grows the page table to `n_pages`.
  void reserve_pages(int64_t n_pages);
  const float* page_cos() const { return page_cos_.data(); }    ///< [n_pages][head_dim / 2]
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

}  // namespace rotunda::kv::rotate
