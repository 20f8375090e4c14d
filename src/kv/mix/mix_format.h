#pragma once

#include "kv/kv_format.h"

namespace rotunda::kv::mix {

/// Layers with formats of their own: `layers 0,1,-1=bf16;rotunda2`. Every format sees a model of its own layers alone; what it asks and
/// what it is asked passes through here. The registry keeps this one apart, because it has no name or option of its own.
class MixFormat : public KvFormat {
 public:
  std::string name() const override { return kMixFormat; }
  std::string summary() const override { return "layers with formats of their own"; }
  std::vector<KvOption> options() const override { return {}; }
  KvSpec with_defaults(const KvSpec& spec) const override;
  void validate(const KvSpec& spec) const override;
  std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const override;
  /// The most that a part asks for.
  CalibrationUse calibration_use(const KvSpec& spec) const override;
  void check_calibration(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& calibration) const override;
  /// Layers by plain numbers, and parts that have come to the same spec as one.
  KvSpec resolved(const KvSpec& spec, const KvModel& model, const ops::TensorBundle* calibration) const override;
  bool fuses_layer(const KvSpec& spec, const KvModel& model, int layer) const override;
  /// What part p leaves stands in `setup` under "part.p/".
  void fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights,
            ops::TensorBundle& setup) const override;
  int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const override;
  std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model,
                                      const ops::TensorBundle& setup) const override;
};

}  // namespace rotunda::kv::mix
