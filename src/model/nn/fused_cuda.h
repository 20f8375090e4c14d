#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace rotunda::model::nn {

/// rms_norm() of tensors on a GPU, one kernel. @throws Error{kBug} where the launch fails
at::Tensor rms_norm_cuda(const at::Tensor& x, const at::Tensor& weight, double eps);

/// x + update, and rms_norm() of it, one kernel.
/// @param x, update [T, D] of one dtype   @return the sum and its norm, [T, D] each
std::pair<at::Tensor, at::Tensor> add_rms_norm_cuda(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight, double eps);

/// silu(gate) * up on a GPU, one kernel, rounded as LibTorch's two operators round.
/// @param gate_up [T, 2 intermediate_size] contiguous, gate first   @return [T, intermediate_size]
at::Tensor swiglu_cuda(const at::Tensor& gate_up);

}  // namespace rotunda::model::nn
