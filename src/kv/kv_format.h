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

/// The attention projections of one layer, weights [out, in]. A format may fold its rotations and scalings into them at load.
/// Biases are undefined tensors where the model has none.
struct ProjectionWeights {
  at::Tensor q_weight, q_bias;
  at::Tensor k_weight, k_bias;
  at::Tensor v_weight, v_bias;
  at::Tensor o_weight;
  at::Tensor q_norm, k_norm;  ///< [head_dim] gains of the norms between projection and RoPE; undefined where there is none
  at::Tensor input_gain;      ///< [hidden_size] gain of the norm whose output is projected; for reading only
};

/// What a calibration is to a cache.
enum class CalibrationUse {
  kNone,      ///< not read
  kOptional,  ///< makes the cache better
  kRequired,  ///< no cache without one
};

/// Sees the keys and values of a calibration text go by, unfused, and turns them into what the format keeps.
class KvCalibrator {
 public:
  virtual ~KvCalibrator() = default;
  /// One layer's input of one step that holds one sequence from position 0 on; see AttendInput.
  virtual void observe(int layer, const AttendInput& in) = 0;
  /// The calibration's tensors and settings. @throws Error{kUser} if nothing was observed.
  virtual ops::TensorBundle finish() = 0;
};

/// A cache format: its name, its options, and how to make caches of it. One folder below kv/ each.
///
/// Where a function takes a calibration or a setup, that of a mix holds what its parts' formats want, each under
/// "<calibration_name>/...", as a calibration file does.
class KvFormat {
 public:
  virtual ~KvFormat() = default;

  virtual std::string name() const = 0;
  virtual std::string summary() const = 0;  ///< one line
  /// Whether it may be named to a user who asks for a better cache: of all formats of its size the one to take.
  virtual bool recommended() const { return false; }
  virtual std::vector<KvOption> options() const = 0;
  /// The spec with every option that it leaves out at its default.
  virtual KvSpec with_defaults(const KvSpec& spec) const;
  /// The one spec that stores keys as `keys`, which is of this format, and values as `values`; nothing where no cache can.
  virtual std::optional<KvSpec> with_values(const KvSpec& /*keys*/, const KvSpec& /*values*/) const { return std::nullopt; }
  /// @throws Error{kUser} naming the option, got and expected.
  virtual void validate(const KvSpec& spec) const = 0;
  /// Why this model cannot have this cache, or nothing where it can. `spec` is valid.
  virtual std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const = 0;

  virtual CalibrationUse calibration_use(const KvSpec&) const { return CalibrationUse::kNone; }
  /// The name of this format's part of a calibration file. Formats that want the same of a text share it.
  virtual std::string calibration_name() const { return name(); }
  /// Null where the format has nothing to calibrate.
  virtual std::unique_ptr<KvCalibrator> make_calibrator(const KvModel&) const { return nullptr; }
  /// @throws Error{kUser} naming what of the calibration does not fit this model.
  virtual void check_calibration(const KvSpec&, const KvModel&, const ops::TensorBundle&) const {}
  /// Of a calibration for a whole model what concerns some of its layers, in this order. Here every tensor is [n_layers, ...].
  /// @throws Error{kUser} naming a tensor that is not.
  virtual ops::TensorBundle calibration_of_layers(const ops::TensorBundle& calibration, const KvModel& model,
                                                  const std::vector<int>& layers) const;
  /// The spec with options set that were left to the model or to whether there is a calibration (null: none).
  virtual KvSpec resolved(const KvSpec& spec, const KvModel&, const ops::TensorBundle* /*calibration*/) const { return spec; }

  /// Whether fuse() changes anything. Where it does not, the projections need not be read and cast for it at load.
  virtual bool fuses_projections() const { return false; }
  /// The same of one layer, for a format that treats layers differently.
  virtual bool fuses_layer(const KvSpec&, const KvModel&, int /*layer*/) const { return fuses_projections(); }
  /// Folds what the format wants into the projections of one layer: fp32 tensors in, fp32 out; the caller casts them back.
  /// A cache made of the same spec expects keys and values of such fused projections. Called only where fuses_layer(),
  /// for every such layer once, in any order.
  /// @param setup holds the calibration, if any; the format adds what make_cache will want to know of this layer's weights
  /// @throws Error{kUser} for weights that the format cannot do its work on, or a calibration that does not fit.
  virtual void fuse(const KvSpec&, const KvModel&, int /*layer*/, ProjectionWeights&, ops::TensorBundle& /*setup*/) const {}

  /// Bytes that `kv_len` tokens of one sequence will take, all metadata and page slack counted (what KvUsage::cache_bytes
  /// will say), without making a cache.
  virtual int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const = 0;

  /// @param setup the calibration, if any, with what fuse() added; must outlive the call only.
  /// @throws Error{kUser} for an unsupported model, or a setup in which something is missing or does not fit.
  virtual std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& setup) const = 0;
};

/// Why a format cannot have a cache on the model's device at all: the build, or the format, has no CUDA half. Nothing where it can.
std::optional<std::string> device_unsupported_reason(const KvFormat& format, const KvModel& model, bool has_cuda_half);

}  // namespace rotunda::kv
