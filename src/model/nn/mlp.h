#pragma once

#include <ATen/core/Tensor.h>

#include "model/nn/linear.h"

namespace rotunda::model::nn {

/// SwiGLU feed-forward network (arXiv:2002.05202) on top of a residual: residual + W_down (silu(W_gate x) * W_up x).
struct SwigluMlp {
  LinearStack gate_up;     ///< the gate projection, then the up projection
  at::Tensor down_weight;  ///< [hidden_size, intermediate_size]
  at::Tensor down_bias;    ///< [hidden_size] or undefined

  /// @param x, residual [T, hidden_size]   @return [T, hidden_size]
  at::Tensor operator()(const at::Tensor& x, const at::Tensor& residual) const;

 private:
  /// silu(W_gate x) * W_up x   @return [T, intermediate_size]
  at::Tensor gated(const at::Tensor& x) const;
};

}  // namespace rotunda::model::nn
