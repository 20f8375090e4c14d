#include "kv/house/house_format.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kv/head_rotation.h"
#include "kv/house/house_cache.h"
#include "kv/house/house_calibrator.h"
#include "kv/house/house_moments.h"
#include "kv/house/house_options.h"
#include "kv/windowed_cache.h"
#ifdef ROTUNDA_CUDA
#include "kv/cache_cuda.h"
#include "kv/house/house_codec_cuda.h"
#endif

namespace rotunda::kv::house {

namespace {

// [heads, d] per channel -> [heads, d / 2] per RoPE pair (channels i and i + d / 2), and back.
at::Tensor pair_sums(const at::Tensor& channels) {
  return channels.narrow(1, 0, channels.size(1) / 2) + channels.narrow(1, channels.size(1) / 2, channels.size(1) / 2);
}
at::Tensor to_channels(const at::Tensor& pairs) { return at::cat({pairs, pairs}, -1); }

const char* to_text(Moments moments) {
  switch (moments) {
    case Moments::kAuto:
      return "auto";
    case Moments::kWeights:
      return "weights";
    case Moments::kCalibrated:
      return "calibrated";
    case Moments::kNone:
      return "none";
  }
  ROTUNDA_ASSERT(false);
}

const char* to_text(Shift shift) {
  switch (shift) {
    case Shift::kAuto:
      return "auto";
    case Shift::kBias:
      return "bias";
    case Shift::kMean:
      return "mean";
    case Shift::kNone:
      return "none";
  }
  ROTUNDA_ASSERT(false);
}

// lambda = (E[q^2] / E[k^2])^(1/4) of every RoPE pair, [n_kv_heads, d / 2]: makes (sum E[q^2]) (sum E[k^2]) least, which is what the error of a
// score is proportional to once both are rotated. A pair without energy on one side is left alone.
at::Tensor balance_of(const KvModel& model, at::Tensor query_energy, at::Tensor key_energy) {
  if (model.key_norm) {  // one gain for all heads
    query_energy = query_energy.sum(0, /*keepdim=*/true).expand_as(query_energy);
    key_energy = key_energy.sum(0, /*keepdim=*/true).expand_as(key_energy);
  }
  const at::Tensor idle = query_energy.le(0.0).logical_or(key_energy.le(0.0));
  const at::Tensor ratio = at::where(idle, at::ones_like(key_energy), query_energy / key_energy);
  return ratio.pow(0.25);
}

// Which pairs of each head to shift: the fewest that hold `share` of the energy, [n_kv_heads, d / 2] bool.
at::Tensor strongest_pairs(const at::Tensor& energy, double share) {
  const auto [sorted, order] = energy.sort(/*dim=*/1, /*descending=*/true);
  const at::Tensor before = sorted.cumsum(1) - sorted;
  const at::Tensor keep = before.lt(share * sorted.sum(1, /*keepdim=*/true)).logical_and(sorted.gt(0.0));
  return at::zeros_like(keep).scatter(1, order, keep);
}

// W_k (or the key norm's gain) times lambda, W_q over it.
void fold_balance(const KvModel& model, const at::Tensor& balance, ProjectionWeights& weights) {
  const at::Tensor key_factor = to_channels(balance).to(at::kFloat);  // [n_kv_heads, d]
  if (model.key_norm) {
    weights.k_norm = weights.k_norm * key_factor[0];
    weights.q_norm = weights.q_norm / key_factor[0];
    return;
  }
  const at::Tensor query_factor =
      key_factor.reciprocal().repeat_interleave(model.n_heads / model.n_kv_heads, 0).flatten();
  const auto scale = [](at::Tensor& weight, at::Tensor& bias, const at::Tensor& factor) {
    weight = weight * factor.unsqueeze(1);
    if (bias.defined()) bias = bias * factor;
  };
  scale(weights.k_weight, weights.k_bias, key_factor.flatten());
  scale(weights.q_weight, weights.q_bias, query_factor);
}

}  // namespace

std::string HouseFormat::summary() const {
  return "our own: " + std::to_string(bits_) +
         "-bit codes, balanced, shifted, rotated; needs no data, better with a calibration";
}

std::vector<KvOption> HouseFormat::options() const { return HouseOptions::describe(bits_); }

void HouseFormat::validate(const KvSpec& spec) const { HouseOptions::from_spec(spec, bits_); }

std::optional<KvSpec> HouseFormat::with_values(const KvSpec& keys, const KvSpec& values) const {
  const bool shared_options = values.options.empty() || values.options == keys.options;
  for (int bits = kLeastBits; bits <= kMostBits; ++bits) {
    if (values.format != HouseFormat(bits).name() || !shared_options) continue;
    KvSpec both = keys;
    if (both.options.emplace("values", std::to_string(bits)).second) return both;
  }
  return std::nullopt;
}

std::optional<std::string> HouseFormat::unsupported_reason(const KvSpec&, const KvModel& model) const {
  if (const auto reason = device_unsupported_reason(*this, model, /*has_cuda_half=*/true)) return reason;
  if (model.head_dim % 16 != 0) return concat(name(), ": head_dim ", model.head_dim, " is not a multiple of 16");
  if (model.device.is_cuda() && model.head_dim % 32 != 0) return concat(name(), " on ", model.device, ": head_dim ", model.head_dim, " is not a multiple of 32");
  return std::nullopt;
}

CalibrationUse HouseFormat::calibration_use(const KvSpec& spec) const {
  return HouseOptions::from_spec(spec, bits_).calibration_use();
}

std::unique_ptr<KvCalibrator> HouseFormat::make_calibrator(const KvModel& model) const {
  return make_house_calibrator(model);
}

void HouseFormat::check_calibration(const KvSpec&, const KvModel& model, const ops::TensorBundle& calibration) const {
  for (int layer = 0; layer < model.n_layers; ++layer) calibrated_moments(model, layer, calibration);
}

KvSpec HouseFormat::resolved(const KvSpec& spec, const KvModel&, const ops::TensorBundle* calibration) const {
  const HouseOptions options = HouseOptions::from_spec(spec, bits_).resolved(calibration != nullptr);
  KvSpec made = spec;
  made.options["balance"] = to_text(options.balance);
  made.options["shift"] = to_text(options.shift);
  made.options["feedback"] = to_text(options.feedback);
  return made;
}

void HouseFormat::fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights,
                       ops::TensorBundle& setup) const {
  const bool calibrated = setup.tensors.count("query_moment") != 0;
  const HouseOptions options = HouseOptions::from_spec(spec, bits_).resolved(calibrated);
  ROTUNDA_CHECK(
      options.balance == Moments::kNone || !model.key_norm || (weights.q_norm.defined() && weights.k_norm.defined()),
      name(), ": cannot balance queries and keys that pass a norm without gains; balance=none runs without");
  std::optional<LayerMoments> by_weights, by_calibration;
  const auto moments = [&](bool of_calibration) -> const LayerMoments& {
    auto& made = of_calibration ? by_calibration : by_weights;
    if (!made) made = of_calibration ? calibrated_moments(model, layer, setup) : weight_moments(model, weights);
    return *made;
  };
  const int64_t heads = model.n_kv_heads, d = model.head_dim;

  at::Tensor shift = at::zeros({heads, d}, at::kDouble);
  if (options.shift == Shift::kMean) shift = moments(true).key_mean;
  // A bias in front of a norm is no constant behind it.
  if (options.shift == Shift::kBias && weights.k_bias.defined() && !model.key_norm)
    shift = weights.k_bias.to(at::kDouble).view({heads, d});

  at::Tensor balance = at::ones({heads, d / 2}, at::kDouble);
  const auto rebalance = [&] {
    if (options.balance == Moments::kNone) return;
    const LayerMoments& m = moments(options.balance == Moments::kCalibrated);
    // Of the mean, weights know the bias only.
    const at::Tensor mean = options.shift == Shift::kMean ? moments(true).key_mean : m.key_mean;
    const at::Tensor key = m.key_variance + (mean - shift).square();
    balance = balance_of(model, pair_sums(m.query.diagonal(0, 1, 2)), pair_sums(key));
  };
  rebalance();
  // Pairs that hold next to nothing of the shift (as the rotation will see it, that is balanced) are not worth their share of the decode.
  const at::Tensor shifted = strongest_pairs(pair_sums((shift * to_channels(balance)).square()), options.shift_pairs);
  shift = shift * to_channels(shifted).to(at::kDouble);
  rebalance();

  if (options.feedback != Moments::kNone) {
    const at::Tensor factor = to_channels(balance).reciprocal();
    const at::Tensor s =
        moments(options.feedback == Moments::kCalibrated).query * factor.unsqueeze(2) * factor.unsqueeze(1);
    const at::Tensor rotation = hadamard_matrix(model.head_dim, at::kDouble);
    setup.tensors[concat("feedback.", layer)] = feedback_triangle(at::matmul(at::matmul(rotation.t(), s), rotation));
  }
  setup.tensors[concat("balance.", layer)] = balance.to(at::kFloat);
  setup.tensors[concat("shift.", layer)] = (shift * to_channels(balance)).to(at::kFloat);
  if (options.balance != Moments::kNone) fold_balance(model, balance, weights);
  rotate_values(model, weights);
}

int64_t HouseFormat::planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const {
  const HouseOptions options = HouseOptions::from_spec(spec, bits_);
  const int64_t page_bytes = house_layout(options, model).page_bytes();
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda()) return planned_cuda_bytes(options.exact, model, page_bytes, kv_len);
#endif
  return planned_windowed_bytes(options.exact, model, page_bytes, kv_len);
}

std::unique_ptr<KvCache> HouseFormat::make_cache(const KvSpec& spec, const KvModel& model,
                                                 const ops::TensorBundle& setup) const {
  const HouseOptions options = HouseOptions::from_spec(spec, bits_);
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda()) return make_cache_cuda(spec, model, options.exact, make_house_codec_cuda(model, options, setup));
#endif
  return make_house_cache(spec, model, options, setup);
}

}  // namespace rotunda::kv::house
