#include "kv/mix/mix_format.h"

#include <algorithm>

#include "base/check.h"
#include "kv/kv_registry.h"
#include "kv/mix/mix_cache.h"
#include "kv/mix/mix_plan.h"

namespace rotunda::kv::mix {

KvSpec MixFormat::with_defaults(const KvSpec& spec) const {
  KvSpec full = spec;
  for (KvSpecPart& part : full.parts) part.spec = kv_registry().get(part.spec).with_defaults(part.spec);
  return full;
}

void MixFormat::validate(const KvSpec& spec) const {
  for (const KvSpecPart& part : spec.parts) {
    ROTUNDA_ASSERT(part.spec.parts.empty(), "a mix in a mix: ", spec.to_string());
    kv_registry().get(part.spec).validate(part.spec);
  }
}

std::optional<std::string> MixFormat::unsupported_reason(const KvSpec& spec, const KvModel& model) const {
  try {
    for (const MixPart& part : MixPlan(spec, model).parts)
      if (const auto reason = part.format->unsupported_reason(part.spec, part.model)) return reason;
  } catch (const Error& error) {
    return error.what();
  }
  return std::nullopt;
}

CalibrationUse MixFormat::calibration_use(const KvSpec& spec) const {
  CalibrationUse most = CalibrationUse::kNone;
  for (const KvSpecPart& part : spec.parts)
    most = std::max(most, kv_registry().get(part.spec).calibration_use(part.spec));
  return most;
}

void MixFormat::check_calibration(const KvSpec& spec, const KvModel& model,
                                  const ops::TensorBundle& calibration) const {
  for (const MixPart& part : MixPlan(spec, model).parts) {
    const ops::TensorBundle own = part_calibration(part, model, calibration);
    if (!own.tensors.empty()) part.format->check_calibration(part.spec, part.model, own);
  }
}

KvSpec MixFormat::resolved(const KvSpec& spec, const KvModel& model, const ops::TensorBundle* calibration) const {
  MixPlan plan(spec, model);
  for (MixPart& part : plan.parts) {
    const ops::TensorBundle own =
        calibration == nullptr ? ops::TensorBundle() : part_calibration(part, model, *calibration);
    part.spec = part.format->resolved(part.spec, part.model, own.tensors.empty() ? nullptr : &own);
  }
  return MixPlan(plan.spec(), model).spec();
}

bool MixFormat::fuses_layer(const KvSpec& spec, const KvModel& model, int layer) const {
  const MixPlan plan(spec, model);
  const MixPlace& place = plan.places[static_cast<size_t>(layer)];
  const MixPart& part = plan.parts[static_cast<size_t>(place.part)];
  return part.format->fuses_layer(part.spec, part.model, place.layer);
}

void MixFormat::fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights,
                     ops::TensorBundle& setup) const {
  const MixPlan plan(spec, model);
  const MixPlace& place = plan.places[static_cast<size_t>(layer)];
  const MixPart& part = plan.parts[static_cast<size_t>(place.part)];
  const ops::TensorBundle calibration = part_calibration(part, model, setup);
  ops::TensorBundle made = calibration;
  part.format->fuse(part.spec, part.model, place.layer, weights, made);
  for (const auto& [name, tensor] : calibration.tensors) made.tensors.erase(name);
  for (const auto& [key, value] : calibration.metadata) made.metadata.erase(key);
  setup.add(part_prefix(static_cast<size_t>(place.part)), made);
}

int64_t MixFormat::planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const {
  int64_t bytes = 0;
  for (const MixPart& part : MixPlan(spec, model).parts)
    bytes += part.format->planned_bytes(part.spec, part.model, kv_len);
  return bytes;
}

std::unique_ptr<KvCache> MixFormat::make_cache(const KvSpec& spec, const KvModel& model,
                                               const ops::TensorBundle& setup) const {
  const MixPlan plan(spec, model);
  std::vector<std::unique_ptr<KvCache>> caches;
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    const MixPart& part = plan.parts[i];
    ops::TensorBundle own = part_calibration(part, model, setup);
    own.add("", setup.part(part_prefix(i)));
    caches.push_back(part.format->make_cache(part.spec, part.model, own));
  }
  return make_mix_cache(spec, model, std::move(caches), plan.places);
}

}  // namespace rotunda::kv::mix
