#pragma once

#include "kv/grouped/grouped_kind.h"
#include "kv/kv_format.h"

namespace rotunda::kv::grouped {

/// A format of groups of channels with a scale each: integers, block floating point, microscaling, codebooks. README.md beside this
/// file lists them; register.cpp says what each is.
class GroupedFormat : public KvFormat {
 public:
  explicit GroupedFormat(const GroupedKind& kind) : kind_(kind) {}

  std::string name() const override { return kind_.name; }
  std::string summary() const override { return kind_.summary; }
  std::vector<KvOption> options() const override;
  void validate(const KvSpec& spec) const override;
  std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const override;
  CalibrationUse calibration_use(const KvSpec& spec) const override;
  std::string calibration_name() const override { return "grouped"; }
  std::unique_ptr<KvCalibrator> make_calibrator(const KvModel& model) const override;
  void check_calibration(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& calibration) const override;
  std::optional<KvSpec> with_values(const KvSpec& keys, const KvSpec& values) const override;
  bool fuses_projections() const override { return kind_.basis != Basis::kPlain; }
  bool fuses_layer(const KvSpec& spec, const KvModel& model, int layer) const override;
  /// Values into their basis: W_v and W_o. The basis of keys, where it follows from weights or a calibration, into the setup.
  void fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights,
            ops::TensorBundle& setup) const override;
  int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const override;
  std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model,
                                      const ops::TensorBundle& setup) const override;

 private:
  GroupedKind kind_;
};

}  // namespace rotunda::kv::grouped
