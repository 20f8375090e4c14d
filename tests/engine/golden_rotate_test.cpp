#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/scoring.h"
#include "engine/step.h"
#include "engine/toy.h"
#include "kv/kv_registry.h"

namespace rotunda::engine {
namespace {

// tests/golden/rotate_reference.py: the method by fake quantization on transformers' weights, an independent program. It ran the first window
// of WikiText-2 test through the shipped model with every token seeing packed keys and values; so does this test, on the packed cache.
struct Case {
  const char* variant;
  const char* spec;
  // Codes near a tie fall either way in fp32, and eight layers carry it on: the allowed difference of the mean negative log-likelihood is a
  // tenth of what the variant loses against exact keys and values.
  double tolerance;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.spec; }

class GoldenRotate : public ::testing::TestWithParam<Case> {};

TEST_P(GoldenRotate, MeanNllOfTheFirstWindowIsThatOfTheReference) {
  const std::string root = ROTUNDA_SOURCE_DIR;
  const nlohmann::json golden = nlohmann::json::parse(std::ifstream(root + "/tests/golden/rotate_tiny_gqa.json"));
  SessionOptions load;
  load.model_dir = root + "/models/tiny-gqa";
  const Session session = load_session(load);
  const kv::KvSpec spec = kv::parse_kv_spec(GetParam().spec);
  const kv::KvFormat& format = kv::kv_registry().get(spec);
  // The reference's own order of channels: near-ties of its means could sort differently.
  ops::TensorBundle calibration;
  std::vector<at::Tensor> layers;
  for (const auto& layer : golden.at("perm").at("2")) layers.push_back(at::tensor(layer.get<std::vector<int64_t>>(), at::kLong).to(at::kInt));
  calibration.tensors["rotate.perm.layer"] = at::stack(layers);
  calibration.metadata["rotate.heads_per_group"] = "2";

  const auto window = golden.at("window").get<std::vector<int64_t>>();
  const auto model = session.model->with_kv_format(format, spec, calibration);
  const auto cache = format.make_cache(spec, model->info().kv, calibration);
  const kv::SeqId seq = cache->create();
  const at::Tensor hidden = run_step(*model, *cache, {{seq, static_cast<int64_t>(window.size()), true, 0}}, window, kv::StepKind::kQuantizeAll, {});
  const std::vector<int64_t> targets(window.begin() + 1, window.end());
  RunningMean nll;
  for (const TokenScore& score : score_targets(*model, hidden.narrow(0, 0, static_cast<int64_t>(targets.size())), targets)) nll.add(-score.log_prob);
  EXPECT_NEAR(nll.mean(), golden.at("variants").at(GetParam().variant).at("mean_nll").get<double>(), GetParam().tolerance);
}

INSTANTIATE_TEST_SUITE_P(Variants, GoldenRotate,
                         ::testing::Values(Case{"rotate2-recent0", "rotate2:recent=0", 0.05}, Case{"rotate2-recent64", "rotate2", 0.014},
                                           Case{"rotate2-minimum", "rotate2:recent=0,zero=minimum", 0.035},
                                           Case{"rotate2-group32-layer", "rotate2:recent=0,group=32", 0.034},
                                           Case{"rotate2-recent64-sinks0", "rotate2:sinks=0", 0.007},
                                           Case{"rotate3-recent0", "rotate3:recent=0", 0.009}, Case{"rotate4-recent0", "rotate4:recent=0", 0.003}));

}  // namespace
}  // namespace rotunda::engine
