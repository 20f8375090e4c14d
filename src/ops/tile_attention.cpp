#include "ops/tile_attention.h"

#include <ATen/ATen.h>

#include <limits>

#include "base/check.h"

namespace rotunda::ops {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// exp(a - b) where a row without tokens has a = -inf, and b may be -inf too: 0 instead of NaN.
at::Tensor exp_difference(const at::Tensor& a, const at::Tensor& b) {
  return at::exp(a - b).masked_fill_(a == kMinusInfinity, 0.0);
}

}  // namespace

TileAttention::TileAttention(at::Tensor q) : q_(std::move(q)) {
  ROTUNDA_ASSERT(q_.dim() == 3 && q_.scalar_type() == at::kFloat);
  max_ = at::full({q_.size(0), q_.size(1), 1}, kMinusInfinity, q_.options());
  sum_ = at::zeros_like(max_);
  acc_ = at::zeros_like(q_);
}

void TileAttention::add(const at::Tensor& k_t, const at::Tensor& v, const at::Tensor& mask) {
  at::Tensor scores = at::bmm(q_, k_t);  // [B, M, N]
  if (mask.defined()) scores.masked_fill_(mask.logical_not(), kMinusInfinity);
  const at::Tensor new_max = at::maximum(max_, scores.amax(-1, /*keepdim=*/true));  // [B, M, 1]
  // A row that has seen nothing yet keeps max = -inf; subtracting 0 instead leaves its scores at -inf and exp at 0.
  const at::Tensor base = new_max.masked_fill(new_max == kMinusInfinity, 0.0);
  scores.sub_(base).exp_();
  const at::Tensor decay = exp_difference(max_, base);
  sum_.mul_(decay).add_(scores.sum(-1, /*keepdim=*/true));
  acc_.mul_(decay).baddbmm_(scores, v);
  max_ = new_max;
}

void TileAttention::add_finished(const at::Tensor& out, const at::Tensor& lse) {
  const at::Tensor other_max = lse.unsqueeze(-1);
  const at::Tensor new_max = at::maximum(max_, other_max);
  const at::Tensor base = new_max.masked_fill(new_max == kMinusInfinity, 0.0);
  const at::Tensor decay = exp_difference(max_, base);
  const at::Tensor weight = exp_difference(other_max, base);
  sum_.mul_(decay).add_(weight);
  acc_.mul_(decay).addcmul_(out, weight);
  max_ = new_max;
}

at::Tensor TileAttention::finish() const { return acc_ / sum_.masked_fill(sum_ == 0.0, 1.0); }

std::pair<at::Tensor, at::Tensor> chunk_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double softmax_scale,
                                                  int64_t sliding_window) {
  const int64_t n_tokens = q.size(0);
  const int64_t n_heads = q.size(1);
  const int64_t n_kv_heads = k.size(1);
  const auto batched = [](const at::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); };  // [1, H, T, d]
  const bool windowed = sliding_window > 0 && sliding_window < n_tokens;
  std::optional<at::Tensor> mask;
  if (windowed) {
    const at::Tensor place = at::arange(n_tokens, q.options().dtype(at::kLong));
    const at::Tensor distance = place.unsqueeze(1) - place.unsqueeze(0);
    const at::Tensor seen = distance.ge(0).logical_and_(distance.lt(sliding_window));
    mask = at::zeros({n_tokens, n_tokens}, q.options()).masked_fill_(seen.logical_not(), kMinusInfinity);
  }
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(batched(q), batched(k), batched(v), /*dropout_p=*/0.0,
                                                                    /*is_causal=*/!windowed, mask, softmax_scale);
  // [1, n_heads, T, d] -> [n_kv_heads, rep * T, d]: query heads of a group are neighbours.
  const int64_t rows = n_heads / n_kv_heads * n_tokens;
  return {out.squeeze(0).to(at::kFloat).reshape({n_kv_heads, rows, q.size(2)}),
          lse.squeeze(0).to(at::kFloat).reshape({n_kv_heads, rows})};
}

at::Tensor stack_query_heads(const at::Tensor& q, int64_t n_kv_heads) {
  return q.transpose(0, 1).reshape({n_kv_heads, q.size(1) / n_kv_heads * q.size(0), q.size(2)});
}

at::Tensor unstack_query_heads(const at::Tensor& stacked, int64_t n_tokens) {
  const int64_t n_heads = stacked.size(0) * stacked.size(1) / n_tokens;
  return stacked.reshape({n_heads, n_tokens, stacked.size(2)}).transpose(0, 1);
}

}  // namespace rotunda::ops
