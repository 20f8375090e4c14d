#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string_view>

#include "engine/cache_decorator.h"
#include "engine/scoring.h"
#include "engine/session.h"
#include "engine/step.h"
#include "kv/kv_registry.h"

namespace rotunda::engine {
namespace {

// tests/golden/rotunda_reference.py: the house format by fake quantization on transformers' weights, an independent program. It ran the
// first window of WikiText-2 test through the shipped model with every token seeing packed keys and values; so does this test, on the
// packed cache.
struct Case {
  const char* variant;
  const char* spec;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.spec; }

nlohmann::json golden() {
  return nlohmann::json::parse(std::ifstream(std::string(ROTUNDA_SOURCE_DIR) + "/tests/golden/rotunda_tiny_gqa.json"));
}

const Session& session() {
  static const Session loaded = [] {
    SessionOptions load;
    load.model_dir = std::string(ROTUNDA_SOURCE_DIR) + "/models/tiny-gqa";
    return load_session(load);
  }();
  return loaded;
}

at::Tensor run(const model::CausalLm& model, kv::KvCache& cache, const std::vector<int64_t>& ids, kv::StepKind kind) {
  return run_step(model, cache, {{cache.create(), static_cast<int64_t>(ids.size()), true, 0}}, ids, kind, {});
}

// The calibration that the reference made, by our own calibrator on the same windows.
ops::TensorBundle calibration(const kv::KvFormat& format, const nlohmann::json& windows) {
  const kv::KvModel& model = session().model->info().kv;
  const auto calibrator = format.make_calibrator(model);
  const auto ids = windows.at("ids").get<std::vector<int64_t>>();
  const auto window_len = windows.at("window_len").get<size_t>();
  const auto cache = session().formats->get("fp32").make_cache(kv::parse_kv_spec("fp32"), model, {});
  ObservingCache observing(*cache, [&](int layer, const kv::AttendInput& in) { calibrator->observe(layer, in); });
  for (size_t begin = 0; begin + window_len <= ids.size(); begin += window_len)
    run(*session().model, observing,
        {ids.begin() + static_cast<int64_t>(begin), ids.begin() + static_cast<int64_t>(begin + window_len)},
        kv::StepKind::kGenerate);
  return calibrator->finish();
}

class GoldenHouse : public ::testing::TestWithParam<Case> {};

TEST_P(GoldenHouse, MeanNllOfTheFirstWindowIsThatOfTheReference) {
  const nlohmann::json reference = golden();
  const kv::KvSpec spec = kv::parse_kv_spec(GetParam().spec);
  const kv::KvFormat& format = session().formats->get(spec);
  ops::TensorBundle setup;
  if (format.calibration_use(spec) == kv::CalibrationUse::kRequired)
    setup = calibration(format, reference.at("calibration"));
  const auto model = session().model->with_kv_format(format, spec, setup);
  const auto window = reference.at("window").get<std::vector<int64_t>>();
  const auto cache = format.make_cache(spec, model->info().kv, setup);
  const at::Tensor hidden = run(*model, *cache, window, kv::StepKind::kQuantizeAll);
  const std::vector<int64_t> targets(window.begin() + 1, window.end());
  RunningMean nll;
  for (const TokenScore& score :
       score_targets(*model, hidden.narrow(0, 0, static_cast<int64_t>(targets.size())), targets))
    nll.add(-score.log_prob);
  // Codes near a tie fall either way in fp32, and feedback and eight layers carry it on: two roundings as good as each other differ by some
  // 0.002 in this mean. Without feedback nothing is carried on within a key. Leaving out feedback costs 0.03, the first tokens 0.01.
  const double tolerance = GetParam().spec == std::string_view("rotunda2:sinks=0,feedback=none") ? 0.001 : 0.006;
  EXPECT_NEAR(nll.mean(), reference.at("variants").at(GetParam().variant).at("mean_nll").get<double>(), tolerance);
}

INSTANTIATE_TEST_SUITE_P(Variants, GoldenHouse,
                         ::testing::Values(Case{"rotunda2", "rotunda2:sinks=0"}, Case{"rotunda2-sinks20", "rotunda2"},
                                           Case{"rotunda2-feedback-none", "rotunda2:sinks=0,feedback=none"},
                                           Case{"rotunda2-plain", "rotunda2:sinks=0,feedback=none,balance=none"},
                                           Case{"rotunda2-recent0", "rotunda2:sinks=0,recent=0"},
                                           Case{"rotunda2-first0", "rotunda2:sinks=0,first=0"},
                                           Case{"rotunda2-least-squares", "rotunda2:sinks=0,scale=least_squares"},
                                           Case{"rotunda2-values4", "rotunda2:sinks=0,values=4"},
                                           Case{"rotunda3-recent0", "rotunda3:sinks=0,recent=0"},
                                           Case{"rotunda4-recent0", "rotunda4:sinks=0,recent=0"},
                                           Case{"rotunda2-calibrated",
                                                "rotunda2:sinks=0,shift=mean,balance=calibrated,feedback=calibrated"}));

}  // namespace
}  // namespace rotunda::engine
