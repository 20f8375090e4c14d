#include "kv/rotate/rotate_format.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kv/head_rotation.h"
#include "kv/rotate/rotate_cache.h"
#include "kv/rotate/rotate_calibrator.h"
#include "kv/rotate/rotate_options.h"
#include "kv/windowed_cache.h"
#ifdef ROTUNDA_CUDA
#include "kv/cache_cuda.h"
#include "kv/rotate/rotate_codec_cuda.h"
#endif

namespace rotunda::kv::rotate {

std::string RotateFormat::summary() const {
  return "RotateKV (arXiv:2501.16383): " + std::to_string(bits_) + "-bit codes of keys and values, rotated and reordered by calibration";
}

std::vector<KvOption> RotateFormat::options() const { return RotateOptions::describe(bits_); }

void RotateFormat::validate(const KvSpec& spec) const { RotateOptions::from_spec(spec, bits_); }

std::optional<std::string> RotateFormat::unsupported_reason(const KvSpec& spec, const KvModel& model) const {
  if (const auto reason = device_unsupported_reason(*this, model, /*has_cuda_half=*/true)) return reason;
  if (model.head_dim % 16 != 0) return concat(name(), ": head_dim ", model.head_dim, " is not a multiple of 16");
  try {
    rotate_layout(RotateOptions::from_spec(spec, bits_), model);
  } catch (const Error& error) {
    return error.what();
  }
  return std::nullopt;
}

CalibrationUse RotateFormat::calibration_use(const KvSpec& spec) const {
  return RotateOptions::from_spec(spec, bits_).reorder == Reorder::kNone ? CalibrationUse::kNone : CalibrationUse::kRequired;
}

std::unique_ptr<KvCalibrator> RotateFormat::make_calibrator(const KvModel& model) const { return make_rotate_calibrator(model); }

void RotateFormat::check_calibration(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& calibration) const {
  key_groups(RotateOptions::from_spec(spec, bits_), model, calibration);
}

void RotateFormat::fuse(const KvSpec&, const KvModel& model, int, ProjectionWeights& weights, ops::TensorBundle&) const {
  if (!model.key_norm) {
    const at::Tensor group_matrix = hadamard_matrix(heads_per_group(model) * model.head_dim, at::kFloat);
    rotate_outputs(weights.k_weight, group_matrix);
    rotate_outputs(weights.k_bias, group_matrix);
  }
  rotate_values(model, weights);
}

int64_t RotateFormat::planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const {
  const RotateOptions options = RotateOptions::from_spec(spec, bits_);
  const int64_t page_bytes = rotate_layout(options, model).page_bytes();
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda()) return planned_cuda_bytes(options.exact, model, page_bytes, kv_len);
#endif
  return planned_windowed_bytes(options.exact, model, page_bytes, kv_len);
}

std::unique_ptr<KvCache> RotateFormat::make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& setup) const {
  const RotateOptions options = RotateOptions::from_spec(spec, bits_);
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda())
    return make_cache_cuda(spec, model, options.exact, make_rotate_codec_cuda(model, options, key_groups(options, model, setup)));
#endif
  return make_rotate_cache(spec, model, options, key_groups(options, model, setup));
}

}  // namespace rotunda::kv::rotate
