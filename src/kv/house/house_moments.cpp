#include "kv/house/house_moments.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kv/moments.h"

namespace rotunda::kv::house {

namespace {

// More positions than this change nothing: only pairs that hardly turn would notice.
constexpr int64_t kMostPositions = 4096;
// Share of the mean diagonal added to it: keeps the inverse tame in directions that no query looks along.
constexpr double kDamping = 0.01;

int64_t n_positions(const KvModel& model) {
  const int64_t trained = model.rope.spec().max_position_embeddings;
  return trained > 0 ? std::min(trained, kMostPositions) : kMostPositions;
}

// The projection's rows as heads, with the gain of the norm in front: [heads, d, in] fp64.
at::Tensor head_rows(const at::Tensor& weight, const at::Tensor& gain, int64_t head_dim) {
  return (weight.to(at::kDouble) * gain.to(at::kDouble)).view({-1, head_dim, weight.size(1)});
}

at::Tensor head_bias(const at::Tensor& bias, int64_t n_heads, int64_t head_dim) {
  return bias.defined() ? bias.to(at::kDouble).view({n_heads, head_dim}) : at::zeros({n_heads, head_dim}, at::kDouble);
}

// What makes the mean square over the channels of every head 1: [heads, 1].
at::Tensor unit_mean_square(const at::Tensor& channel_energy) {
  const at::Tensor mean = channel_energy.mean(-1, /*keepdim=*/true);
  return mean.masked_fill(mean == 0.0, 1.0).reciprocal();
}

}  // namespace

LayerMoments weight_moments(const KvModel& model, const ProjectionWeights& weights) {
  const int64_t d = model.head_dim;
  const at::Tensor q_rows = head_rows(weights.q_weight, weights.input_gain, d);
  const at::Tensor q_bias = head_bias(weights.q_bias, model.n_heads, d);
  at::Tensor q =
      at::bmm(q_rows, q_rows.transpose(1, 2)) + q_bias.unsqueeze(2) * q_bias.unsqueeze(1);  // [n_heads, d, d]

  LayerMoments moments;
  moments.key_mean = head_bias(weights.k_bias, model.n_kv_heads, d);
  moments.key_variance = head_rows(weights.k_weight, weights.input_gain, d).square().sum(2);  // [n_kv_heads, d]
  if (model.key_norm) {
    // A gain of 1 stands for a norm that has none.
    const auto gain = [&](const at::Tensor& norm) {
      return norm.defined() ? norm.to(at::kDouble) : at::ones({d}, at::kDouble);
    };
    const at::Tensor q_gain = gain(weights.q_norm);
    q = q * unit_mean_square(q.diagonal(0, 1, 2)).unsqueeze(2) * q_gain.unsqueeze(1) * q_gain;
    const at::Tensor energy = moments.key_variance + moments.key_mean.square();
    moments.key_variance = energy * unit_mean_square(energy) * gain(weights.k_norm).square();
    moments.key_mean = at::zeros_like(moments.key_mean);
  }
  const at::Tensor per_kv_head = q.view({model.n_kv_heads, -1, d, d}).mean(1);
  moments.query = average_over_rope(per_kv_head, model.rope.inv_freq(0), n_positions(model));
  return moments;
}

LayerMoments calibrated_moments(const KvModel& model, int layer, const ops::TensorBundle& calibration) {
  const int64_t n_layers = model.n_layers, heads = model.n_kv_heads, d = model.head_dim;
  const auto part = [&](const char* name, at::IntArrayRef sizes) {
    return calibrated_layer(calibration, name, sizes, layer);
  };
  LayerMoments moments;
  moments.query = part("query_moment", {n_layers, heads, d, d});
  moments.key_mean = part("key_mean", {n_layers, heads, d});
  moments.key_variance = part("key_variance", {n_layers, heads, d});
  ROTUNDA_CHECK(
      moments.key_variance.ge(0.0).all().item<bool>() && moments.query.diagonal(0, 1, 2).ge(0.0).all().item<bool>(),
      calibration.origin, ": layer ", layer, " has a negative variance in key_variance or query_moment");
  return moments;
}

at::Tensor average_over_rope(const at::Tensor& moment, const std::vector<double>& inv_freq, int64_t n_positions) {
  // As complex numbers z_i = x_i + i x_{i + d/2} a position turns pair i by e^{i n w_i}, so E[z_i conj(z_j)] turns by w_i - w_j and
  // E[z_i z_j] by w_i + w_j; the mean of e^{i n w} over n is a geometric sum.
  const int64_t half = static_cast<int64_t>(inv_freq.size());
  const at::Tensor w = at::tensor(inv_freq, at::kDouble);
  const auto mean_phase = [&](const at::Tensor& angle) {
    const at::Tensor one = at::ones_like(angle);
    const at::Tensor step = at::polar(one, angle) - 1.0;
    const at::Tensor still = angle.abs() < 1e-9;
    const at::Tensor sum =
        (at::polar(one, angle * static_cast<double>(n_positions)) - 1.0) / at::where(still, at::ones_like(step), step);
    return at::where(still, at::ones_like(step), sum / static_cast<double>(n_positions));
  };
  const auto block = [&](int64_t i, int64_t j) { return moment.narrow(-2, i * half, half).narrow(-1, j * half, half); };
  const at::Tensor a = block(0, 0), b = block(0, 1), c = block(1, 0), e = block(1, 1);
  const at::Tensor covariance = at::complex(a + e, c - b) * mean_phase(w.unsqueeze(1) - w);
  const at::Tensor pseudo = at::complex(a - e, c + b) * mean_phase(w.unsqueeze(1) + w);
  const at::Tensor sum = (covariance + pseudo) / 2.0;
  const at::Tensor difference = (covariance - pseudo) / 2.0;
  return at::cat(
      {at::cat({at::real(sum), -at::imag(difference)}, -1), at::cat({at::imag(sum), at::real(difference)}, -1)}, -2);
}

at::Tensor feedback_triangle(const at::Tensor& s) {
  const at::Tensor identity = at::eye(s.size(-1), at::kDouble);
  // A head without queries still gets an invertible matrix.
  const at::Tensor level = s.diagonal(0, -2, -1).mean(-1).clamp_min(1e-30).unsqueeze(-1).unsqueeze(-1);
  const at::Tensor inverse = at::linalg_inv((s + s.transpose(-2, -1)) / (2.0 * level) + kDamping * identity);
  const at::Tensor upper = at::linalg_cholesky((inverse + inverse.transpose(-2, -1)) / 2.0, /*upper=*/true);
  const at::Tensor diagonal = upper.diagonal(0, -2, -1);
  return ((upper / diagonal.unsqueeze(-1)).triu(1) + diagonal.square().reciprocal().diag_embed()).to(at::kFloat);
}

}  // namespace rotunda::kv::house
