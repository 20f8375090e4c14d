#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels/hadamard/hadamard.h"

namespace rotunda::kv::grouped {

/// An orthogonal change of basis of the channels of each kv head of a layer: y = x B. Scores do not see it where queries and keys
/// both undergo it.
class HeadBasis {
 public:
  HeadBasis() = default;  ///< changes nothing
  /// y[i] = x[order[i]]. @param order [n_kv_heads, d] int64, a permutation per head
  static HeadBasis permutation(const at::Tensor& order);
  /// y = x H
  static HeadBasis hadamard(int head_dim);
  /// y = x M. @param matrix [n_kv_heads, d, d] fp32, orthogonal
  static HeadBasis dense(const at::Tensor& matrix);

  /// x <- x B for rows of one kv head. @param rows [n_rows][d], row_stride in elements
  void apply(int head, float* rows, int64_t n_rows, int64_t row_stride) const;
  /// The inverse, of 16 tokens as lanes. @param lanes [d][16], 64-byte aligned
  void undo_lanes(int head, float* lanes) const;

  /// B as matrices [n_kv_heads, d, d] fp32; undefined where it changes nothing.
  at::Tensor matrix() const;

 private:
  at::Tensor order_, matrix_;
  kernels::HadamardPlan plan_;  // n = 0: none
};

}  // namespace rotunda::kv::grouped
