#pragma once

#include <vector>

#include "kv/house/kernels/house_codec.h"
#include "kv/kv_format.h"
#include "kv/kv_options.h"

namespace rotunda::kv::house {

/// Where the format takes second moments of queries and keys from.
enum class Moments {
  kAuto,     ///< the calibration if there is one, else the weights
  kWeights,  ///< W diag(g^2) W^T with g the gain of the norm in front: no data
  kCalibrated,
  kNone,
};

/// What is subtracted from keys before RoPE.
enum class Shift {
  kAuto,  ///< the mean if there is a calibration, else the bias
  kBias,  ///< the key projection's bias
  kMean,  ///< the calibrated mean, bias included
  kNone,
};

/// The options of rotunda2, rotunda3 and rotunda4, read from a KvSpec.
struct HouseOptions {
  int key_bits = 2;
  int value_bits = 2;
  ExactOptions exact{.recent = 64, .sinks = 20, .sink_select = SinkSelect::kPrompt, .n_first = 4};
  Moments balance = Moments::kAuto;
  Shift shift = Shift::kAuto;
  double shift_pairs = 0.99;  ///< share of the shift's energy that is subtracted, by the fewest RoPE pairs that hold it
  Moments feedback = Moments::kAuto;
  ScaleRule scale = ScaleRule::kUnbiased;

  /// @throws Error{kUser} naming format, option, got and expected.
  static HouseOptions from_spec(const KvSpec& spec, int bits);
  /// Name, default and help of each.
  static std::vector<KvOption> describe(int bits);

  /// The same with nothing left at kAuto.
  HouseOptions resolved(bool calibrated) const;
  CalibrationUse calibration_use() const;
};

/// The page of one layer.
HousePageLayout house_layout(const HouseOptions& options, const KvModel& model);

}  // namespace rotunda::kv::house
