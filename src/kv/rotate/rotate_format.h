#pragma once

#include "kv/kv_format.h"

namespace rotunda::kv::rotate {

/// RotateKV (arXiv:2501.16383) with packed codes of 2, 3 or 4 bits: rotate2, rotate3, rotate4. README.md beside this file draws the bytes.
class RotateFormat : public KvFormat {
 public:
  explicit RotateFormat(int bits) : bits_(bits) {}

  std::string name() const override { return "rotate" + std::to_string(bits_); }
  std::string summary() const override;
  std::vector<KvOption> options() const override;
  void validate(const KvSpec& spec) const override;
  std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const override;
  CalibrationUse calibration_use(const KvSpec& spec) const override;
  std::unique_ptr<KvCalibrator> make_calibrator(const KvModel& model) const override;
  void check_calibration(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& calibration) const override;
  bool fuses_projections() const override { return true; }
  /// Keys: W_k <- W_G^T W_k over each rotation group, unless a key norm stands between. Values: W_v <- W_d^T W_v, W_o <- W_o W_d per head.
  void fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights, ops::TensorBundle& setup) const override;
  int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const override;
  std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& setup) const override;

 private:
  int bits_;
};

}  // namespace rotunda::kv::rotate
