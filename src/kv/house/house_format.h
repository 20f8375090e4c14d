#pragma once

#include "kv/kv_format.h"

namespace rotunda::kv::house {

/// Of a code.
inline constexpr int kLeastBits = 2;
inline constexpr int kMostBits = 4;

/// The product's own cache format with packed codes of 2, 3 or 4 bits: rotunda2, rotunda3, rotunda4. README.md beside this file says how it
/// works and where its parts come from; kernels/house_page.h defines the bytes.
class HouseFormat : public KvFormat {
 public:
  explicit HouseFormat(int bits) : bits_(bits) {}

  std::string name() const override { return "rotunda" + std::to_string(bits_); }
  std::string summary() const override;
  bool recommended() const override { return true; }
  std::vector<KvOption> options() const override;
  void validate(const KvSpec& spec) const override;
  /// Values of rotunda2, 3 or 4: the option `values`. Other options stand behind the keys' format, or the same behind both.
  std::optional<KvSpec> with_values(const KvSpec& keys, const KvSpec& values) const override;
  std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const override;
  CalibrationUse calibration_use(const KvSpec& spec) const override;
  std::string calibration_name() const override { return "rotunda"; }
  std::unique_ptr<KvCalibrator> make_calibrator(const KvModel& model) const override;
  void check_calibration(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& calibration) const override;
  KvSpec resolved(const KvSpec& spec, const KvModel& model, const ops::TensorBundle* calibration) const override;
  bool fuses_projections() const override { return true; }
  /// Balance into W_q and W_k (or the gains of the norms behind them), the value rotation into W_v and W_o. Leaves in `setup`, per layer l:
  ///   balance.l [n_kv_heads, d / 2] fp32, lambda of every RoPE pair; shift.l [n_kv_heads, d] fp32, mu in balanced keys;
  ///   feedback.l [n_kv_heads, d, d] fp32, where there is feedback.
  void fuse(const KvSpec& spec, const KvModel& model, int layer, ProjectionWeights& weights,
            ops::TensorBundle& setup) const override;
  int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const override;
  std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model,
                                      const ops::TensorBundle& setup) const override;

 private:
  int bits_;
};

}  // namespace rotunda::kv::house
