#include "kv/house/house_options.h"

#include "base/check.h"
#include "kv/paged_cache.h"

namespace rotunda::kv::house {

namespace {

Moments parse_moments(const KvSpec& spec, const std::string& key) {
  return parse_choice<Moments>(spec, key,
                               {{"auto", Moments::kAuto},
                                {"weights", Moments::kWeights},
                                {"calibrated", Moments::kCalibrated},
                                {"none", Moments::kNone}});
}

}  // namespace

HouseOptions HouseOptions::from_spec(const KvSpec& spec, int bits) {
  HouseOptions options;
  options.key_bits = options.value_bits = bits;
  for (const auto& [key, text] : spec.options) {
    if (parse_exact_option(spec, key, options.exact)) continue;
    if (key == "balance") {
      options.balance = parse_moments(spec, key);
    } else if (key == "shift") {
      options.shift = parse_choice<Shift>(
          spec, key, {{"auto", Shift::kAuto}, {"bias", Shift::kBias}, {"mean", Shift::kMean}, {"none", Shift::kNone}});
    } else if (key == "shift_pairs") {
      options.shift_pairs = parse_number(spec, key, 0.01F, 1.0F);
    } else if (key == "feedback") {
      options.feedback = parse_moments(spec, key);
    } else if (key == "scale") {
      options.scale = parse_choice<ScaleRule>(
          spec, key, {{"unbiased", ScaleRule::kUnbiased}, {"least_squares", ScaleRule::kLeastSquares}});
    } else if (key == "values") {
      options.value_bits = parse_number(spec, key, 2, 4);
    } else {
      throw_user_error(concat(spec.format, ": option '", key,
                              "' is unknown, expected one of: balance, feedback, first, recent, scale, shift, "
                              "shift_pairs, sink_select, sinks, values"));
    }
  }
  return options;
}

std::vector<KvOption> HouseOptions::describe(int bits) {
  std::vector<KvOption> options = describe_exact_options(HouseOptions().exact);
  const std::vector<KvOption> own = {
      {"balance", "auto",
       "evens out queries and keys by RoPE pair: from the weights, calibrated, none; auto: calibrated if there is a "
       "calibration"},
      {"shift", "auto",
       "subtracted from keys before RoPE: bias (of the key projection), mean (calibrated), none; auto: mean if there "
       "is a calibration"},
      {"shift_pairs", "0.99", "share of the shift's energy to subtract, by the fewest RoPE pairs, 0.01 to 1"},
      {"feedback", "auto",
       "rounds keys by what queries see of the error: from the weights, calibrated, none; auto: as for balance"},
      {"scale", "unbiased", "scale of a token: unbiased (scores are not shrunk) or least_squares (for comparison)"},
      {"values", std::to_string(bits), "bits of a value's code, 2 to 4"},
  };
  options.insert(options.end(), own.begin(), own.end());
  return options;
}

HouseOptions HouseOptions::resolved(bool calibrated) const {
  HouseOptions options = *this;
  const Moments moments = calibrated ? Moments::kCalibrated : Moments::kWeights;
  if (balance == Moments::kAuto) options.balance = moments;
  if (feedback == Moments::kAuto) options.feedback = moments;
  if (shift == Shift::kAuto) options.shift = calibrated ? Shift::kMean : Shift::kBias;
  return options;
}

CalibrationUse HouseOptions::calibration_use() const {
  if (balance == Moments::kCalibrated || feedback == Moments::kCalibrated || shift == Shift::kMean)
    return CalibrationUse::kRequired;
  const bool open = balance == Moments::kAuto || feedback == Moments::kAuto || shift == Shift::kAuto;
  return open ? CalibrationUse::kOptional : CalibrationUse::kNone;
}

HousePageLayout house_layout(const HouseOptions& options, const KvModel& model) {
  return {options.key_bits, options.value_bits, model.n_kv_heads, model.head_dim, kBlocksPerPage};
}

}  // namespace rotunda::kv::house
