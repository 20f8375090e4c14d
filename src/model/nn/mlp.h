#pragma once

#include <ATen/core/Tensor.h>

#include "model/nn/linear.h"
#include "model/nn/residual_stream.h"

namespace rotunda::model::nn {

/// SwiGLU feed-forward network (arXiv:2002.05202): adds W_down (silu(W_gate x) * W_up x), where x is the stream's norm.
struct SwigluMlp {
  LinearStack gate_up;     ///< the gate projection, then the up projection
  at::Tensor down_weight;  ///< [hidden_size, intermediate_size]
  at::Tensor down_bias;    ///< [hidden_size] or undefined

  /// @param x [T, hidden_size]
  void operator()(const at::Tensor& x, ResidualStream& stream) const;

 private:
  /// silu(W_gate x) * W_up x   @return [T, intermediate_size]
  at::Tensor gated(const at::Tensor& x) const;
};

}  // namespace rotunda::model::nn
