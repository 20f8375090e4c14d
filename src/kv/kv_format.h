#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kv/kv_cache.h"

namespace rotunda::kv {

/// One option of a format, for `rotunda formats` and for checking specs.
struct KvOption {
  std::string name;
  std::string default_value;
  std::string help;  ///< one line, with the values allowed
};

/// The attention projections of one layer, weights [out, in]. A format may fold its rotations into them at load.
/// Biases are undefined tensors where the model has none.
struct ProjectionWeights {
  at::Tensor q_weight, q_bias;
  at::Tensor k_weight, k_bias;
  at::Tensor v_weight, v_bias;
  at::Tensor o_weight;
};

/// Sees the keys and values of a calibration text go by, unfused, and turns them into what the format keeps.
class KvCalibrator {
 public:
  virtual ~KvCalibrator() = default;
  /// One layer's input of one step; see AttendInput.
  virtual void observe(int layer, const AttendInput& in) = 0;
  /// The calibration's tensors and settings. @throws Error{kUser} if nothing was observed.
  virtual ops::TensorBundle finish() = 0;
};

/// A cache format: its name, its options, and how to make caches of it. One folder below kv/ each.
class KvFormat {
 public:
  virtual ~KvFormat() = default;

  virtual std::string name() const = 0;
  virtual std::string summary() const = 0;  ///< one line
  virtual std::vector<KvOption> options() const = 0;
  /// @throws Error{kUser} naming the option, got and expected.
  virtual void validate(const KvSpec& spec) const = 0;
  /// Why this model cannot have this cache, or nothing where it can. `spec` is valid.
  virtual std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const = 0;

  /// Whether make_cache wants a calibration for this spec.
  virtual bool needs_calibration(const KvSpec&) const { return false; }
  /// Null where the format has nothing to calibrate.
  virtual std::unique_ptr<KvCalibrator> make_calibrator(const KvModel&) const { return nullptr; }

  /// Whether fuse() changes anything. Where it does not, the projections need not be read and cast for it at load.
  virtual bool fuses_projections() const { return false; }
  /// Folds what the format wants into the projections of one layer: fp32 tensors in, fp32 out; the caller casts them back.
  /// A cache made of the same spec expects keys and values of such fused projections. Called only
  /// where fuses_projections().
  virtual void fuse(const KvSpec&, const KvModel&, ProjectionWeights&) const {}

  /// Bytes that `kv_len` tokens of one sequence will take, all metadata and page slack counted (what KvUsage::cache_bytes
  /// will say), without making a cache.
  virtual int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const = 0;

  /// @param calibration from make_calibrator, or null; must outlive the call only.
  /// @throws Error{kUser} for an unsupported model, or a calibration that is missing or does not fit.
  virtual std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model,
                                              const ops::TensorBundle* calibration) const = 0;
};

}  // namespace rotunda::kv
