#include "model/nn/residual_stream.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "model/nn/linear.h"
#include "model/nn/rms_norm.h"
#ifdef ROTUNDA_CUDA
#include "model/nn/fused_cuda.h"
#endif

namespace rotunda::model::nn {

void ResidualStream::add_linear(const at::Tensor& y, const at::Tensor& weight, const at::Tensor& bias) {
  if (!x_.is_cuda()) {
    x_ = linear_add(y, weight, bias, x_);
    return;
  }
  ROTUNDA_ASSERT(!update_.defined(), "two sums without a norm between them");
  update_ = at::linear(y, weight, bias);
}

at::Tensor ResidualStream::norm(const at::Tensor& weight, double eps) {
#ifdef ROTUNDA_CUDA
  if (update_.defined()) {
    auto [sum, normed] = add_rms_norm_cuda(x_, update_, weight, eps);
    x_ = sum;
    update_.reset();
    return normed;
  }
#endif
  return rms_norm(x_, weight, eps);
}

}  // namespace rotunda::model::nn
