#pragma once

#include <map>
#include <string>
#include <vector>

#include "kv/kv_format.h"
#include "kv/kv_options.h"
#include "kv/rotate/kernels/rotate_codec.h"

namespace rotunda::kv::rotate {

/// Which channels a quantization group may gather.
enum class Reorder {
  kLayer,  ///< any of the layer, by the calibrated order (RotateKV as published)
  kGroup,  ///< any of one rotation group
  kNone,   ///< neighbours, no calibration
};

/// The options of rotate2, rotate3 and rotate4 (RotateKV, arXiv:2501.16383), read from a KvSpec.
struct RotateOptions {
  int bits = 2;
  ExactOptions exact;  ///< recent=0: the published method; n_first stays 0
  Reorder reorder = Reorder::kLayer;
  float clip = 0.8F;
  ZeroPoint zero = ZeroPoint::kCode;
  int group = 0;  ///< channels per quantization group; 0: 128, or the largest divisor below that suits the model

  /// @throws Error{kUser} naming format, option, got and expected.
  static RotateOptions from_spec(const KvSpec& spec, int bits);
  /// Name, default and help of each.
  static std::vector<KvOption> describe(int bits);
};

/// kv heads under one key rotation: gcd(4, n_kv_heads).
int heads_per_group(const KvModel& model);

/// The page of one layer. @throws Error{kUser} where the group size does not divide the channels that it must.
RotatePageLayout rotate_layout(const RotateOptions& options, const KvModel& model);

/// What a saved sequence must share with the cache that reads it, apart from the model and the exact tokens.
/// @param key_groups [n_layers][kv_channels]
std::map<std::string, std::string> rotate_settings(const RotatePageLayout& layout, const std::vector<std::vector<uint16_t>>& key_groups);

}  // namespace rotunda::kv::rotate
