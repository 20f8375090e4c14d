#pragma once

#include <ATen/core/Tensor.h>

namespace rotunda::model::nn {

/// RMSNorm over the last axis (arXiv:1910.07467), rounded as Hugging Face does: the mean square and the scaling in fp32, the
/// result in the dtype of `x`, then the product with `weight` in that dtype.
/// @param x [..., D]   @param weight [D], dtype of `x`   @return [..., D] contiguous
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace rotunda::model::nn
