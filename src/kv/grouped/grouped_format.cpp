#include "kv/grouped/grouped_format.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kv/grouped/grouped_bases.h"
#include "kv/grouped/grouped_cache.h"
#include "kv/grouped/grouped_calibrator.h"
#include "kv/grouped/grouped_options.h"
#include "kv/head_rotation.h"
#include "kv/windowed_cache.h"
#ifdef ROTUNDA_CUDA
#include "kv/cache_cuda.h"
#include "kv/grouped/grouped_codec_cuda.h"
#include "kv/grouped/kernels/grouped_pages_cuda.h"
#endif

namespace rotunda::kv::grouped {

namespace {

// What the channels of keys and of values are sorted by, [n_kv_heads, d] each.
std::pair<at::Tensor, at::Tensor> channel_energies(ChannelSort sort, const KvModel& model, int layer, const ProjectionWeights& weights,
                                                   const ops::TensorBundle& setup) {
  if (sort == ChannelSort::kCalibration) {
    const GroupedMoments moments = grouped_moments(model, layer, setup);
    return {moments.key_energy, moments.value_energy};
  }
  at::Tensor key = weight_energy(model, weights.k_weight, weights.k_bias, weights.input_gain);
  // Behind a norm a head's channels have one mean square, but for its gains.
  if (weights.k_norm.defined()) key = key * weights.k_norm.to(at::kDouble).square();
  return {key, weight_energy(model, weights.v_weight, weights.v_bias, weights.input_gain)};
}

HeadBasis key_basis(const GroupedKind& kind, const GroupedOptions& options, const KvModel& model, int layer,
                    const ops::TensorBundle& setup) {
  const int64_t heads = model.n_kv_heads, d = model.head_dim;
  switch (kind.basis) {
    case Basis::kPlain:
      return {};
    case Basis::kSorted:
      if (options.sort == ChannelSort::kNone) return {};
      return HeadBasis::permutation(setup.get(concat("key_order.", layer), at::kLong, {heads, d}));
    case Basis::kHadamard:
      return HeadBasis::hadamard(model.head_dim);
    case Basis::kRandomRotation:
      return HeadBasis::dense(random_rotation(model, layer, /*of_keys=*/true));
    case Basis::kAttentionAware:
      return HeadBasis::dense(setup.get(concat("key_basis.", layer), at::kFloat, {heads, d, d}));
  }
  ROTUNDA_ASSERT(false);
}

}  // namespace

std::vector<KvOption> GroupedFormat::options() const { return GroupedOptions::describe(kind_); }

void GroupedFormat::validate(const KvSpec& spec) const { GroupedOptions::from_spec(spec, kind_); }

std::optional<std::string> GroupedFormat::unsupported_reason(const KvSpec& spec, const KvModel& model) const {
  if (const auto reason = device_unsupported_reason(*this, model, /*has_cuda_half=*/true)) return reason;
  if (model.head_dim % 16 != 0) return concat(name(), ": head_dim ", model.head_dim, " is not a multiple of 16");
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda() && model.head_dim > kMaxStoredHeadDim)
    return concat(name(), " on ", model.device, ": head_dim ", model.head_dim, ", expected ", kMaxStoredHeadDim, " at most");
#endif
  try {
    grouped_layout(GroupedOptions::from_spec(spec, kind_), kind_, model);
  } catch (const Error& error) {
    return error.what();
  }
  return std::nullopt;
}

CalibrationUse GroupedFormat::calibration_use(const KvSpec& spec) const {
  const GroupedOptions options = GroupedOptions::from_spec(spec, kind_);
  const bool calibrated = kind_.basis == Basis::kAttentionAware || options.value_kind->basis == Basis::kAttentionAware ||
                          options.sort == ChannelSort::kCalibration;
  return calibrated ? CalibrationUse::kRequired : CalibrationUse::kNone;
}

std::unique_ptr<KvCalibrator> GroupedFormat::make_calibrator(const KvModel& model) const {
  if (kind_.basis != Basis::kSorted && kind_.basis != Basis::kAttentionAware) return nullptr;
  return make_grouped_calibrator(model);
}

void GroupedFormat::check_calibration(const KvSpec&, const KvModel& model, const ops::TensorBundle& calibration) const {
  for (int layer = 0; layer < model.n_layers; ++layer) grouped_moments(model, layer, calibration);
}

std::optional<KvSpec> GroupedFormat::with_values(const KvSpec& keys, const KvSpec& values) const {
  if (find_kind(values.format) == nullptr || !(values.options.empty() || values.options == keys.options)) return std::nullopt;
  KvSpec both = keys;
  if (!both.options.emplace("values", values.format).second) return std::nullopt;
  try {
    validate(both);
  } catch (const Error&) {
    return std::nullopt;
  }
  return both;
}

bool GroupedFormat::fuses_layer(const KvSpec& spec, const KvModel&, int) const {
  return kind_.basis != Basis::kPlain || GroupedOptions::from_spec(spec, kind_).value_kind->basis != Basis::kPlain;
}

void GroupedFormat::fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights,
                         ops::TensorBundle& setup) const {
  const GroupedOptions options = GroupedOptions::from_spec(spec, kind_);
  // Keys into the setup, for the cache; before values change the weights.
  at::Tensor value_energy;
  if (options.sort != ChannelSort::kNone) {
    const auto [key, value] = channel_energies(options.sort, model, layer, weights, setup);
    if (kind_.basis == Basis::kSorted) setup.tensors[concat("key_order.", layer)] = key_order(key);
    value_energy = value;
  }
  if (kind_.basis == Basis::kAttentionAware)
    setup.tensors[concat("key_basis.", layer)] = spread_eigenvectors(grouped_moments(model, layer, setup).query);
  // Values into the projections, exactly.
  switch (options.value_kind->basis) {
    case Basis::kPlain:
      break;
    case Basis::kSorted:
      if (value_energy.defined()) rotate_values(model, HeadBasis::permutation(value_order(value_energy)).matrix(), weights);
      break;
    case Basis::kHadamard:
      rotate_values(model, weights);
      break;
    case Basis::kRandomRotation:
      rotate_values(model, random_rotation(model, layer, /*of_keys=*/false), weights);
      break;
    case Basis::kAttentionAware:
      rotate_values(model, spread_eigenvectors(grouped_moments(model, layer, setup).value), weights);
      break;
  }
}

int64_t GroupedFormat::planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const {
  const GroupedOptions options = GroupedOptions::from_spec(spec, kind_);
  const int64_t page_bytes = grouped_layout(options, kind_, model).page_bytes();
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda()) return planned_cuda_bytes(options.exact, model, page_bytes, kv_len);
#endif
  return planned_windowed_bytes(options.exact, model, page_bytes, kv_len);
}

std::unique_ptr<KvCache> GroupedFormat::make_cache(const KvSpec& spec, const KvModel& model,
                                                   const ops::TensorBundle& setup) const {
  const GroupedOptions options = GroupedOptions::from_spec(spec, kind_);
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
  std::vector<HeadBasis> bases;
  for (int layer = 0; layer < model.n_layers; ++layer) bases.push_back(key_basis(kind_, options, model, layer, setup));
  const GroupedPageLayout layout = grouped_layout(options, kind_, model);
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda()) return make_cache_cuda(spec, model, options.exact, make_grouped_codec_cuda(model, options, layout, bases));
#endif
  return make_grouped_cache(spec, model, options, layout, std::move(bases));
}

}  // namespace rotunda::kv::grouped
