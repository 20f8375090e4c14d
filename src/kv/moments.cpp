#include "kv/moments.h"

#include <ATen/ATen.h>

#include "base/check.h"

namespace rotunda::kv {

at::Tensor query_products(const KvModel& model, const at::Tensor& q) {
  const int64_t n_tokens = q.size(0);
  const auto [cos, sin] = model.rope.cos_sin(at::arange(n_tokens, q.options().dtype(at::kLong)), n_tokens);
  const at::Tensor turned = ops::apply_rope(q.to(at::kFloat), cos, sin)
                                .view({n_tokens, model.n_kv_heads, -1, model.head_dim})
                                .permute({1, 0, 2, 3})
                                .reshape({model.n_kv_heads, -1, model.head_dim});  // [n_kv_heads, T * rep, d]
  return at::bmm(turned.transpose(1, 2), turned);
}

at::Tensor calibrated_layer(const ops::TensorBundle& calibration, const char* name, at::IntArrayRef sizes, int layer) {
  const at::Tensor tensor = calibration.get(name, at::kFloat, sizes)[layer].to(at::kDouble);
  ROTUNDA_CHECK(tensor.isfinite().all().item<bool>(), calibration.origin, ": tensor ", name, " of layer ", layer,
                " is not finite");
  return tensor;
}

}  // namespace rotunda::kv
