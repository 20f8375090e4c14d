#include "kv/head_rotation.h"

#include <ATen/ATen.h>

#include "kernels/hadamard/hadamard.h"

namespace rotunda::kv {

at::Tensor hadamard_matrix(int n, at::ScalarType dtype) {
  const at::Tensor matrix = at::empty({n, n}, at::kDouble);
  kernels::hadamard_dense(kernels::hadamard_plan(n), matrix.data_ptr<double>());
  return matrix.to(dtype);
}

void rotate_outputs(at::Tensor& weight, const at::Tensor& matrix) {
  if (!weight.defined()) return;
  const at::Tensor runs = weight.reshape({-1, matrix.size(0), weight.dim() == 2 ? weight.size(1) : 1});
  weight = at::matmul(matrix.t(), runs).reshape(weight.sizes());
}

void rotate_values(const KvModel& model, ProjectionWeights& weights) {
  const at::Tensor matrix = hadamard_matrix(model.head_dim, at::kFloat);
  rotate_outputs(weights.v_weight, matrix);
  rotate_outputs(weights.v_bias, matrix);
  // y = o W_o^T with o = o' H^T, so W_o <- W_o H for the columns of every query head.
  const at::Tensor heads = weights.o_weight.view({weights.o_weight.size(0), model.n_heads, model.head_dim});
  weights.o_weight = at::matmul(heads, matrix).reshape(weights.o_weight.sizes());
}

void rotate_values(const KvModel& model, const at::Tensor& matrices, ProjectionWeights& weights) {
  const int64_t d = model.head_dim;
  const at::Tensor transposed = matrices.transpose(1, 2);
  weights.v_weight =
      at::matmul(transposed, weights.v_weight.view({model.n_kv_heads, d, -1})).reshape(weights.v_weight.sizes());
  if (weights.v_bias.defined())
    weights.v_bias = at::matmul(transposed, weights.v_bias.view({model.n_kv_heads, d, 1})).reshape(weights.v_bias.sizes());
  // [out, kv heads, query heads of each, d]: those of a kv head share its matrix.
  const at::Tensor heads = weights.o_weight.view({weights.o_weight.size(0), model.n_kv_heads, -1, d});
  weights.o_weight = at::matmul(heads, matrices).reshape(weights.o_weight.sizes());
}

}  // namespace rotunda::kv
