#include "model/decoder/rope_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/log.h"

namespace rotunda::model {

namespace {

constexpr int64_t kMaxPositions = int64_t{1} << 40;

struct RopeTypeName {
  std::string_view name;
  ops::RopeType type;
};

constexpr std::array<RopeTypeName, 5> kRopeTypes = {{{"default", ops::RopeType::kDefault},
                                                     {"linear", ops::RopeType::kLinear},
                                                     {"dynamic", ops::RopeType::kDynamic},
                                                     {"llama3", ops::RopeType::kLlama3},
                                                     {"yarn", ops::RopeType::kYarn}}};

ops::RopeType read_rope_type(const ConfigFile& settings, bool type_may_be_absent) {
  const char* key = settings.has("rope_type") ? "rope_type" : settings.has("type") ? "type" : "rope_type";
  const std::string name = type_may_be_absent ? settings.text(key, "default") : settings.text(key);
  std::string known;
  for (const RopeTypeName& entry : kRopeTypes) {
    if (entry.name == name) return entry.type;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw_user_error(concat(settings.where(key), " is \"", name.substr(0, 60), "\", expected one of ", known));
}

void check_keys(const ConfigFile& settings) {
  static constexpr std::array<std::string_view, 14> kKnown = {"rope_type",
                                                              "type",
                                                              "rope_theta",
                                                              "factor",
                                                              "original_max_position_embeddings",
                                                              "attention_factor",
                                                              "beta_fast",
                                                              "beta_slow",
                                                              "mscale",
                                                              "mscale_all_dim",
                                                              "truncate",
                                                              "low_freq_factor",
                                                              "high_freq_factor",
                                                              "partial_rotary_factor"};
  for (const std::string& key : settings.keys()) {
    // Settings per layer type would make one rotary embedding per layer.
    ROTUNDA_CHECK(!settings.is_object(key), settings.where(key),
                  " is an object, expected the settings of one rotary embedding for all layers");
    if (std::find(kKnown.begin(), kKnown.end(), key) == kKnown.end())
      ROTUNDA_LOG_WARN("{} is not a known setting; ignored", settings.where(key));
  }
}

// YaRN, arXiv:2309.00071 section 3.4: the temperature of the softmax, as a factor on cos and sin.
double yarn_mscale(double factor, double mscale) { return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0; }

double read_attention_factor(const ConfigFile& settings, double factor) {
  if (settings.has("attention_factor")) return settings.positive("attention_factor");
  const double mscale = settings.number("mscale", 0.0);
  const double mscale_all_dim = settings.number("mscale_all_dim", 0.0);
  if (mscale == 0.0 || mscale_all_dim == 0.0) return yarn_mscale(factor, 1.0);
  const double ratio = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim);
  ROTUNDA_CHECK(std::isfinite(ratio) && ratio > 0.0, settings.where("mscale"), " is ", mscale, " with mscale_all_dim ",
                mscale_all_dim, ", expected values that give a positive attention factor");
  return ratio;
}

// 0 counts as absent for beta_fast and beta_slow, as in transformers.
double read_beta(const ConfigFile& settings, const std::string& key, double fallback) {
  const double beta = settings.number(key, 0.0);
  return beta == 0.0 ? fallback : settings.positive(key);
}

void read_scaling(const ConfigFile& settings, int64_t max_position_embeddings, ops::RopeSpec& spec) {
  if (spec.type == ops::RopeType::kDefault) return;
  spec.factor = settings.positive("factor");
  if (spec.type == ops::RopeType::kLlama3) {
    spec.original_max_position_embeddings = settings.integer("original_max_position_embeddings", 1, kMaxPositions);
    spec.low_freq_factor = settings.positive("low_freq_factor");
    spec.high_freq_factor = settings.positive("high_freq_factor");
    ROTUNDA_CHECK(spec.high_freq_factor > spec.low_freq_factor, settings.where("high_freq_factor"), " is ",
                  spec.high_freq_factor, ", expected more than low_freq_factor, ", spec.low_freq_factor);
  }
  if (spec.type == ops::RopeType::kYarn) {
    spec.original_max_position_embeddings = settings.integer("original_max_position_embeddings", 0, kMaxPositions, 0);
    if (spec.original_max_position_embeddings == 0) spec.original_max_position_embeddings = max_position_embeddings;
    spec.beta_fast = read_beta(settings, "beta_fast", 32.0);
    spec.beta_slow = read_beta(settings, "beta_slow", 1.0);
    ROTUNDA_CHECK(spec.beta_fast >= spec.beta_slow, settings.where("beta_fast"), " is ", spec.beta_fast,
                  ", expected at least beta_slow, ", spec.beta_slow);
    spec.attention_factor = read_attention_factor(settings, spec.factor);
    spec.truncate = settings.flag("truncate", true);
  }
}

}  // namespace

ops::RopeSpec read_rope_spec(const ConfigFile& config, int head_dim, int64_t max_position_embeddings) {
  ops::RopeSpec spec;
  spec.head_dim = head_dim;
  spec.max_position_embeddings = max_position_embeddings;
  spec.theta = config.positive("rope_theta", 10000.0);

  std::optional<ConfigFile> settings;
  if (config.has("rope_scaling")) {
    settings = config.object("rope_scaling");
    spec.type = read_rope_type(*settings, /*type_may_be_absent=*/false);
  } else if (config.has("rope_parameters")) {
    settings = config.object("rope_parameters");
    check_keys(*settings);  // before the type: settings per layer type have none at this level
    spec.type = read_rope_type(*settings, /*type_may_be_absent=*/true);
  }
  std::string theta_at = config.where("rope_theta");
  if (settings) {
    check_keys(*settings);
    if (settings->has("rope_theta")) {
      const double theta = settings->positive("rope_theta");
      ROTUNDA_CHECK(!config.has("rope_theta") || theta == spec.theta, settings->where("rope_theta"), " is ", theta,
                    ", expected rope_theta, ", spec.theta);
      spec.theta = theta;
      theta_at = settings->where("rope_theta");
    }
    read_scaling(*settings, max_position_embeddings, spec);
  }
  constexpr double kMaxTheta = 1e30;  // its powers stay finite in fp32
  ROTUNDA_CHECK(spec.theta > 1.0 && spec.theta <= kMaxTheta, theta_at, " is ", spec.theta,
                ", expected a number above 1, up to ", kMaxTheta);
  for (const ConfigFile& holder :
       settings ? std::vector<ConfigFile>{config, *settings} : std::vector<ConfigFile>{config})
    ROTUNDA_CHECK(holder.number("partial_rotary_factor", 1.0) == 1.0, holder.where("partial_rotary_factor"), " is ",
                  holder.number("partial_rotary_factor"), ", expected 1: every channel of a head is turned");
  return spec;
}

}  // namespace rotunda::model
