#include "model/nn/mlp.h"

#include <ATen/ATen.h>
#ifdef ROTUNDA_CUDA
#include "model/nn/fused_cuda.h"
#endif

namespace rotunda::model::nn {

at::Tensor SwigluMlp::gated(const at::Tensor& x) const {
#ifdef ROTUNDA_CUDA
  if (x.is_cuda() && gate_up.stacked()) return swiglu_cuda(at::linear(x, gate_up.weights[0], gate_up.biases[0]));
#endif
  const std::vector<at::Tensor> projected = gate_up(x);  // 2 x [T, intermediate_size]
  return at::silu(projected[0]).mul_(projected[1]);
}

void SwigluMlp::operator()(const at::Tensor& x, ResidualStream& stream) const {
  stream.add_linear(gated(x), down_weight, down_bias);
}

}  // namespace rotunda::model::nn
