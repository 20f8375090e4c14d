#include "ops/rope.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <numbers>

#include "base/check.h"

namespace rotunda::ops {

namespace {

bool positive(double x) { return std::isfinite(x) && x > 0.0; }

// Everything below is reckoned in fp32 tensors, operation by operation as transformers' ROPE_INIT_FUNCTIONS do: a frequency
// one ulp off shifts the angle of position 100,000 by a hundredth of a radian.

at::Tensor exponents(int head_dim) {  // i / head_dim for i = 0, 2, ...
  return at::arange(0, head_dim, 2, at::TensorOptions().dtype(at::kLong)).to(at::kFloat) / head_dim;
}

at::Tensor default_inv_freq(const RopeSpec& spec) {
  return at::reciprocal(at::pow(spec.theta, exponents(spec.head_dim)));
}

at::Tensor dynamic_inv_freq(const RopeSpec& spec, int64_t seq_len) {
  const int64_t len = std::max(seq_len, spec.max_position_embeddings);
  // The base grows with the length (NTK scaling); transformers holds the length, and so the base, in an fp32 tensor.
  at::Tensor base = at::scalar_tensor(len, at::TensorOptions().dtype(at::kLong));
  base = at::div(base.mul(spec.factor), static_cast<double>(spec.max_position_embeddings)).sub(spec.factor - 1.0);
  base = at::pow(base, static_cast<double>(spec.head_dim) / (spec.head_dim - 2)).mul(spec.theta);
  return at::reciprocal(at::pow(base, exponents(spec.head_dim)));
}

at::Tensor llama3_inv_freq(const RopeSpec& spec) {
  const at::Tensor inv_freq = default_inv_freq(spec);
  const double old_len = static_cast<double>(spec.original_max_position_embeddings);
  const double low_freq_wavelen = old_len / spec.low_freq_factor;
  const double high_freq_wavelen = old_len / spec.high_freq_factor;
  const at::Tensor wavelen = at::reciprocal(inv_freq).mul(2.0 * std::numbers::pi);
  const at::Tensor slow = at::where(wavelen.gt(low_freq_wavelen), inv_freq.div(spec.factor), inv_freq);
  // Between the two wavelengths: a blend of scaled and unscaled.
  const at::Tensor smooth =
      at::reciprocal(wavelen).mul(old_len).sub(spec.low_freq_factor).div(spec.high_freq_factor - spec.low_freq_factor);
  const at::Tensor blend = (1.0 - smooth).mul(slow).div(spec.factor).add(smooth.mul(slow));
  const at::Tensor medium =
      wavelen.lt(high_freq_wavelen).logical_not().logical_and(wavelen.gt(low_freq_wavelen).logical_not());
  return at::where(medium, blend, slow);
}

// YaRN, arXiv:2309.00071: dimensions that turn often keep their frequency, slow ones are interpolated, a ramp lies between.
at::Tensor yarn_inv_freq(const RopeSpec& spec) {
  const double dim = spec.head_dim;
  const auto correction_dim = [&](double n_rotations) {
    const double len = static_cast<double>(spec.original_max_position_embeddings);
    return dim * std::log(len / (n_rotations * 2.0 * std::numbers::pi)) / (2.0 * std::log(spec.theta));
  };
  double low = correction_dim(spec.beta_fast);
  double high = correction_dim(spec.beta_slow);
  if (spec.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;  // no division by zero

  const at::Tensor pos_freqs = at::pow(spec.theta, exponents(spec.head_dim));
  const at::Tensor extrapolation = at::reciprocal(pos_freqs);
  const at::Tensor interpolation = at::reciprocal(pos_freqs.mul(spec.factor));
  const at::Tensor ramp =
      at::arange(spec.head_dim / 2, at::TensorOptions().dtype(at::kFloat)).sub(low).div(high - low).clamp(0, 1);
  const at::Tensor keep = 1.0 - ramp;
  return interpolation.mul(1.0 - keep).add(extrapolation.mul(keep));
}

std::vector<double> to_vector(const at::Tensor& inv_freq) {
  const at::Tensor x = inv_freq.to(at::kDouble).contiguous();
  return {x.const_data_ptr<double>(), x.const_data_ptr<double>() + x.numel()};
}

}  // namespace

Rope::Rope(const RopeSpec& spec) : spec_(spec) {
  ROTUNDA_CHECK(spec.head_dim >= 2 && spec.head_dim % 2 == 0, "rope: head_dim ", spec.head_dim,
                ", expected a positive even number");
  ROTUNDA_CHECK(std::isfinite(spec.theta) && spec.theta > 1.0, "rope: rope_theta ", spec.theta,
                ", expected a number above 1");
  ROTUNDA_CHECK(positive(spec.factor), "rope: factor ", spec.factor, ", expected a positive number");
  ROTUNDA_CHECK(positive(spec.attention_factor), "rope: attention_factor ", spec.attention_factor,
                ", expected a positive number");
  switch (spec.type) {
    case RopeType::kDefault:
      inv_freq_ = to_vector(default_inv_freq(spec));
      return;
    case RopeType::kLinear:
      inv_freq_ = to_vector(default_inv_freq(spec).div(spec.factor));
      return;
    case RopeType::kDynamic:
      ROTUNDA_CHECK(spec.head_dim > 2, "rope: head_dim 2, expected more for rope type dynamic");
      ROTUNDA_CHECK(spec.max_position_embeddings > 0, "rope: max_position_embeddings ", spec.max_position_embeddings,
                    ", expected a positive number");
      inv_freq_ = to_vector(dynamic_inv_freq(spec, 0));
      return;
    case RopeType::kLlama3:
      ROTUNDA_CHECK(positive(spec.low_freq_factor) && positive(spec.high_freq_factor) &&
                        spec.high_freq_factor > spec.low_freq_factor,
                    "rope: low_freq_factor ", spec.low_freq_factor, " and high_freq_factor ", spec.high_freq_factor,
                    ", expected positive numbers, the second one greater");
      ROTUNDA_CHECK(spec.original_max_position_embeddings > 0, "rope: original_max_position_embeddings ",
                    spec.original_max_position_embeddings, ", expected a positive number");
      inv_freq_ = to_vector(llama3_inv_freq(spec));
      return;
    case RopeType::kYarn:
      ROTUNDA_CHECK(positive(spec.beta_fast) && positive(spec.beta_slow), "rope: beta_fast ", spec.beta_fast,
                    " and beta_slow ", spec.beta_slow, ", expected positive numbers");
      ROTUNDA_CHECK(spec.original_max_position_embeddings > 0, "rope: original_max_position_embeddings ",
                    spec.original_max_position_embeddings, ", expected a positive number");
      inv_freq_ = to_vector(yarn_inv_freq(spec));
      return;
  }
  ROTUNDA_ASSERT(false, "rope type ", static_cast<int>(spec.type));
}

std::vector<double> Rope::inv_freq(int64_t seq_len) const {
  if (depends_on_length() && seq_len > spec_.max_position_embeddings)
    return to_vector(dynamic_inv_freq(spec_, seq_len));
  return inv_freq_;
}

std::pair<at::Tensor, at::Tensor> Rope::cos_sin(const at::Tensor& positions, int64_t seq_len) const {
  ROTUNDA_CHECK(positions.dim() == 1 && positions.scalar_type() == at::kLong, "rope: positions ", positions.sizes(),
                " ", positions.scalar_type(), ", expected [T] int64");
  const std::vector<double> inv_freq = this->inv_freq(seq_len);
  const int64_t half = static_cast<int64_t>(inv_freq.size());
  if (!positions.is_cpu()) {
    const at::Tensor frequencies = at::tensor(inv_freq, at::kDouble).to(positions.device());
    const at::Tensor angles = positions.to(at::kDouble).unsqueeze(1).mul(frequencies);  // [T, half]
    return {angles.cos().mul_(spec_.attention_factor).to(at::kFloat), angles.sin().mul_(spec_.attention_factor).to(at::kFloat)};
  }
  const int64_t n = positions.size(0);
  at::Tensor cos = at::empty({n, half}, at::TensorOptions().dtype(at::kFloat));
  at::Tensor sin = at::empty_like(cos);
  const at::Tensor contiguous_positions = positions.contiguous();
  const int64_t* position = contiguous_positions.const_data_ptr<int64_t>();
  float* const cos_data = cos.mutable_data_ptr<float>();
  float* const sin_data = sin.mutable_data_ptr<float>();
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position[t]) * inv_freq[static_cast<size_t>(i)];
        cos_data[t * half + i] = static_cast<float>(std::cos(angle) * spec_.attention_factor);
        sin_data[t * half + i] = static_cast<float>(std::sin(angle) * spec_.attention_factor);
      }
    }
  });
  return {cos, sin};
}

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  ROTUNDA_CHECK(x.dim() == 3 && cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.size(0) == x.size(0) &&
                    2 * cos.size(1) == x.size(2),
                "apply_rope: x ", x.sizes(), ", cos ", cos.sizes(), ", sin ", sin.sizes(),
                ", expected [T, n_heads, head_dim] and twice [T, head_dim / 2]");
  const int64_t half = cos.size(1);
  const at::Tensor first = x.narrow(2, 0, half).to(at::kFloat);
  const at::Tensor second = x.narrow(2, half, half).to(at::kFloat);
  const at::Tensor c = cos.unsqueeze(1);  // [T, 1, head_dim / 2]
  const at::Tensor s = sin.unsqueeze(1);
  return at::cat({first * c - second * s, second * c + first * s}, 2).to(x.scalar_type());
}

}  // namespace rotunda::ops
