#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace rotunda::model::nn {

/// Several projections of the same input: one weight with their rows stacked, so that one GEMM does all of them, or, where
/// stacking would cost a copy of the checkpoint's bytes, one weight for each.
struct LinearStack {
  std::vector<at::Tensor> weights;  ///< one [sum of out_features, in_features], or one [out_features, in_features] each
  std::vector<at::Tensor> biases;   ///< as `weights`, [rows]; undefined where there is none
  std::vector<int64_t> out_features;

  bool stacked() const { return weights.size() == 1; }
  /// The weight of one projection: a view, [out_features, in_features].
  at::Tensor weight(size_t index) const;
  /// Likewise the bias, [out_features]; undefined where there is none.
  at::Tensor bias(size_t index) const;
  /// @param x [T, in_features]
  /// @return each [T, out_features]; channels have stride 1, rows are views with a wider stride where stacked
  std::vector<at::Tensor> operator()(const at::Tensor& x) const;

 private:
  int64_t first_row(size_t index) const;
};

/// x times the transpose of `weight`, plus `bias` where it is defined, plus `residual`.
/// @param x [T, in]   @param weight [out, in]   @param bias [out]   @param residual [T, out], left as it is
at::Tensor linear_add(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& residual);

}  // namespace rotunda::model::nn
