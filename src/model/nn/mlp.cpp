#include "model/nn/mlp.h"

#include <ATen/ATen.h>

namespace rotunda::model::nn {

at::Tensor SwigluMlp::operator()(const at::Tensor& x, const at::Tensor& residual) const {
  const std::vector<at::Tensor> projected = gate_up(x);                // 2 x [T, intermediate_size]
  const at::Tensor gated = at::silu(projected[0]).mul_(projected[1]);  // [T, intermediate_size]
  return linear_add(gated, down_weight, down_bias, residual);          // [T, hidden_size]
}

}  // namespace rotunda::model::nn
