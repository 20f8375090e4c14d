#include "engine/tune.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "engine/calibration.h"
#include "engine/toy.h"

namespace rotunda::engine {
namespace {

using testing::HasSubstr;

TEST(TuneTest, TheChoiceIsTheBestThereIs) {
  std::mt19937 generator(5);
  const auto below = [&](int n) { return static_cast<int>(generator() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 200; ++round) {
    const size_t n_layers = static_cast<size_t>(1 + below(5)), n_candidates = static_cast<size_t>(2 + below(3));
    std::vector<std::vector<int64_t>> bytes(n_layers);
    std::vector<std::vector<double>> cost(n_layers);
    for (size_t layer = 0; layer < n_layers; ++layer) {
      for (size_t c = 0; c < n_candidates; ++c) {
        bytes[layer].push_back(1 + below(9));
        cost[layer].push_back(below(100));
      }
    }
    const int64_t budget = below(40);
    // Every choice there is, counted through.
    double best = -1.0;
    int64_t n_choices = 1;
    for (size_t layer = 0; layer < n_layers; ++layer) n_choices *= static_cast<int64_t>(n_candidates);
    for (int64_t number = 0; number < n_choices; ++number) {
      int64_t rest = number, sum = 0;
      double total = 0.0;
      for (size_t layer = 0; layer < n_layers; ++layer) {
        const size_t c = static_cast<size_t>(rest % static_cast<int64_t>(n_candidates));
        rest /= static_cast<int64_t>(n_candidates);
        sum += bytes[layer][c];
        total += cost[layer][c];
      }
      if (sum <= budget && (best < 0.0 || total < best)) best = total;
    }
    const std::vector<size_t> choice = choose_within(bytes, cost, budget);
    ASSERT_EQ(choice.empty(), best < 0.0);
    if (choice.empty()) continue;
    ASSERT_EQ(choice.size(), n_layers);
    int64_t sum = 0;
    double total = 0.0;
    for (size_t layer = 0; layer < n_layers; ++layer) {
      sum += bytes[layer][choice[layer]];
      total += cost[layer][choice[layer]];
    }
    EXPECT_LE(sum, budget);
    EXPECT_EQ(total, best) << "round " << round;
  }
}

TEST(TuneTest, TheSpecHasTheCommonestFormatForTheRest) {
  const std::vector<kv::KvSpec> candidates = kv::parse_kv_specs("rotunda2,rotunda3:values=2,bf16");
  EXPECT_EQ(spec_of_layers(candidates, {1, 0, 0, 1, 2, 0}).to_string(),
            "layers 0,3=rotunda3:values=2;layers 4=bf16;rotunda2");
  EXPECT_EQ(spec_of_layers(candidates, {1, 1, 1}).to_string(), "rotunda3:values=2");
}

TEST(TuneTest, TheBudgetIsKeptAndSpentWhereItHelpsMost) {
  const Session session = toy::make_session(true, 1, 512);
  const std::string text(builtin_calibration_text().substr(0, 3000));
  TuneOptions options;
  options.candidates = kv::parse_kv_specs("rotunda2:recent=0,sinks=0,first=0,rotunda4:recent=0,sinks=0,first=0");
  options.windows = 1;
  const auto bits = [&](double budget) {
    options.budget = budget;
    return tune(session, text, options);
  };
  const TuneReport report = bits(3.3);  // 2.25 and 4.25 bits, so one of the two layers gets four
  EXPECT_EQ(report.kv_len, 512);
  ASSERT_EQ(report.choice.size(), 2u);
  const std::vector<double>&coarse = report.candidates[0].layer_kl, &fine = report.candidates[1].layer_kl;
  for (size_t layer = 0; layer < 2; ++layer) EXPECT_LT(fine[layer], coarse[layer]) << layer;
  const size_t gains_most = coarse[0] - fine[0] > coarse[1] - fine[1] ? 0 : 1;
  EXPECT_EQ(report.choice[gains_most], 1u);
  EXPECT_EQ(report.choice[1 - gains_most], 0u);
  EXPECT_EQ(report.spec, spec_of_layers(options.candidates, report.choice));
  EXPECT_NEAR(report.predicted_kl, fine[gains_most] + coarse[1 - gains_most], 1e-12);
  // The plan at 512 tokens is what the windows of 512 tokens took.
  ASSERT_EQ(report.check.results.size(), 3u);
  EXPECT_NEAR(report.check.results[0].bits_per_element, report.bits_per_element, 1e-9);
  EXPECT_LE(report.bits_per_element, 3.3);
  EXPECT_LT(report.check.results[0].mean_kl, report.check.results[1].mean_kl);
  EXPECT_GT(report.check.results[0].mean_kl, report.check.results[2].mean_kl);

  EXPECT_EQ(bits(16.0).spec, options.candidates[1]);
  EXPECT_EQ(bits(report.candidates[0].bits_per_element).spec, options.candidates[0]);
  EXPECT_THAT(toy::error_of([&] { bits(2.0); }), HasSubstr("--budget: got 2 bits, the smallest format, rotunda2:"));
}

TEST(TuneTest, RefusesWhatCannotBeTuned) {
  const Session session = toy::make_session(true, 1, 512);
  const auto error_of = [&](const std::function<void(TuneOptions&)>& change, size_t text_bytes = 3000) {
    TuneOptions options;
    options.budget = 8.0;
    options.candidates = kv::parse_kv_specs("rotunda2,rotunda3");
    options.windows = 1;
    change(options);
    return toy::error_of([&] { tune(session, builtin_calibration_text().substr(0, text_bytes), options); });
  };
  EXPECT_THAT(error_of([](auto& o) { o.candidates.pop_back(); }), HasSubstr("--formats: got 1, expected two or more"));
  EXPECT_THAT(error_of([](auto& o) { o.candidates[0] = kv::parse_kv_spec("layers 0=bf16;rotunda2"); }),
              HasSubstr("--formats: got the mix"));
  EXPECT_THAT(error_of([](auto& o) { o.windows = 0; }), HasSubstr("--windows: got 0"));
  EXPECT_THAT(error_of([](auto& o) { o.kv_len = -1; }), HasSubstr("--kv-len: got -1"));
  EXPECT_THAT(error_of([](auto& o) { o.budget = std::numeric_limits<double>::quiet_NaN(); }),
              HasSubstr("--budget: got nan"));
  EXPECT_THAT(error_of([](auto&) {}, 600), HasSubstr("the text has 1 windows of 512 tokens, expected 2"));
  std::atomic<bool> stop{true};
  TuneOptions options;
  options.budget = 8.0;
  options.candidates = kv::parse_kv_specs("rotunda2,rotunda3");
  options.stop = &stop;
  EXPECT_THROW(tune(session, builtin_calibration_text().substr(0, 3000), options), Interrupted);
}

}  // namespace
}  // namespace rotunda::engine
