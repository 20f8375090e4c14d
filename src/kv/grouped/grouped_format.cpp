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

// Sorts the channels of keys (into the setup, for the cache) and of values (fused, exactly).
void sort_channels(ChannelSort sort, const KvModel& model, int layer, ProjectionWeights& weights,
                   ops::TensorBundle& setup) {
  if (sort == ChannelSort::kNone) return;
  at::Tensor key, value;
  if (sort == ChannelSort::kCalibration) {
    const GroupedMoments moments = grouped_moments(model, layer, setup);
    key = moments.key_energy;
    value = moments.value_energy;
  } else {
    key = weight_energy(model, weights.k_weight, weights.k_bias, weights.input_gain);
    // Behind a norm a head's channels have one mean square, but for its gains.
    if (weights.k_norm.defined()) key = key * weights.k_norm.to(at::kDouble).square();
    value = weight_energy(model, weights.v_weight, weights.v_bias, weights.input_gain);
  }
  setup.tensors[concat("key_order.", layer)] = key_order(key);
  rotate_values(model, HeadBasis::permutation(value_order(value)).matrix(), weights);
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
  const bool calibrated =
      kind_.basis == Basis::kAttentionAware || GroupedOptions::from_spec(spec, kind_).sort == ChannelSort::kCalibration;
  return calibrated ? CalibrationUse::kRequired : CalibrationUse::kNone;
}

std::unique_ptr<KvCalibrator> GroupedFormat::make_calibrator(const KvModel& model) const {
  if (kind_.basis != Basis::kSorted && kind_.basis != Basis::kAttentionAware) return nullptr;
  return make_grouped_calibrator(model);
}

void GroupedFormat::check_calibration(const KvSpec&, const KvModel& model, const ops::TensorBundle& calibration) const {
  for (int layer = 0; layer < model.n_layers; ++layer) grouped_moments(model, layer, calibration);
}

void GroupedFormat::fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights,
                         ops::TensorBundle& setup) const {
  switch (kind_.basis) {
    case Basis::kPlain:
      break;
    case Basis::kSorted:
      sort_channels(GroupedOptions::from_spec(spec, kind_).sort, model, layer, weights, setup);
      break;
    case Basis::kHadamard:
      rotate_values(model, weights);
      break;
    case Basis::kRandomRotation:
      rotate_values(model, random_rotation(model, layer, /*of_keys=*/false), weights);
      break;
    case Basis::kAttentionAware: {
      const GroupedMoments moments = grouped_moments(model, layer, setup);
      setup.tensors[concat("key_basis.", layer)] = spread_eigenvectors(moments.query);
      rotate_values(model, spread_eigenvectors(moments.value), weights);
      break;
    }
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
