#include "model/nn/fused_cuda.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>

#include "base/check.h"
#include "kernels/nn/nn_cuda.h"
#include "ops/launch_cuda.h"

namespace rotunda::model::nn {

namespace {

using ops::check_launch;

// @param x, update, sum [..., D] contiguous; the last two undefined, or see kernels::RmsNorm   @return as x
at::Tensor launch_rms_norm(const at::Tensor& x, const at::Tensor& update, const at::Tensor& sum, const at::Tensor& weight, double eps) {
  ROTUNDA_ASSERT(weight.dim() == 1 && x.size(-1) == weight.size(0) && x.scalar_type() == weight.scalar_type() && weight.is_contiguous(),
                 "rms_norm: x ", x.sizes(), " ", x.scalar_type(), ", weight ", weight.sizes(), " ", weight.scalar_type());
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor y = at::empty_like(x);
  kernels::RmsNorm p;
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.row_size = weight.size(0);
  p.n_rows = x.numel() / p.row_size;
  p.eps = static_cast<float>(eps);
  if (update.defined()) {
    p.update = update.const_data_ptr();
    p.sum = sum.mutable_data_ptr();
  }
  check_launch(kernels::rms_norm_cuda(p, ops::element_type(x.scalar_type()), ops::current_stream()), "rms_norm_cuda");
  return y;
}

}  // namespace

at::Tensor rms_norm_cuda(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return launch_rms_norm(x.contiguous(), {}, {}, weight, eps);
}

std::pair<at::Tensor, at::Tensor> add_rms_norm_cuda(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight, double eps) {
  ROTUNDA_ASSERT(x.sizes() == update.sizes() && x.scalar_type() == update.scalar_type() && x.is_contiguous() && update.is_contiguous(),
                 "add_rms_norm: x ", x.sizes(), ", update ", update.sizes());
  const at::Tensor sum = at::empty_like(x);
  const at::Tensor y = launch_rms_norm(x, update, sum, weight, eps);
  return {sum, y};
}

at::Tensor swiglu_cuda(const at::Tensor& gate_up) {
  ROTUNDA_ASSERT(gate_up.dim() == 2 && gate_up.is_contiguous() && gate_up.size(1) % 2 == 0, "swiglu: gate_up ", gate_up.sizes());
  const c10::cuda::CUDAGuard guard(gate_up.device());
  at::Tensor y = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
  kernels::Swiglu p;
  p.gate_up = gate_up.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.n_rows = y.size(0);
  p.row_size = y.size(1);
  check_launch(kernels::swiglu_cuda(p, ops::element_type(gate_up.scalar_type()), ops::current_stream()), "swiglu_cuda");
  return y;
}

}  // namespace rotunda::model::nn
