#pragma once

#include <ATen/core/Tensor.h>

#include "kv/kv_format.h"

namespace rotunda::kv {

/// The normalized Hadamard matrix H of kernels::hadamard_plan(n), [n, n].
at::Tensor hadamard_matrix(int n, at::ScalarType dtype);

/// y <- y M for every run of M's size among a projection's output channels: a weight [channels, in] or a bias [channels], replaced.
/// An undefined tensor stays so.
void rotate_outputs(at::Tensor& weight, const at::Tensor& matrix);

/// Values rotated by H of one head's size, and back behind the attention: W_v (and its bias) <- H^T W_v, W_o <- W_o H, head by head.
void rotate_values(const KvModel& model, ProjectionWeights& weights);
/// The same by a matrix of its own for every kv head, orthogonal: [n_kv_heads, d, d]. A permutation is exact.
void rotate_values(const KvModel& model, const at::Tensor& matrices, ProjectionWeights& weights);

}  // namespace rotunda::kv
