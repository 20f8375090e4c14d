#include "model/nn/rms_norm.h"

#include <ATen/ATen.h>
#ifdef ROTUNDA_CUDA
#include "model/nn/fused_cuda.h"
#endif

namespace rotunda::model::nn {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
#ifdef ROTUNDA_CUDA
  if (x.is_cuda()) return rms_norm_cuda(x, weight, eps);
#endif
  // In fp32 LibTorch's own operator does the same arithmetic in one call. In 16 bits it multiplies by the weight before it
  // rounds, which Hugging Face does not.
  if (x.scalar_type() == at::kFloat) return at::rms_norm(x, weight.sizes(), weight, eps);
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor scale = wide.square().mean(-1, /*keepdim=*/true).add_(eps).rsqrt_();
  return (wide * scale).to(x.scalar_type()).mul_(weight);
}

}  // namespace rotunda::model::nn
