#include "engine/sampling.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/batch_sampling.h"

namespace rotunda::engine {
namespace {

std::vector<int64_t> draw(const SamplingOptions& options, uint64_t stream, const std::vector<float>& logits, int n) {
  Sampler sampler(options, stream);
  std::vector<int64_t> ids;
  for (int i = 0; i < n; ++i) ids.push_back(sampler.sample(logits));
  return ids;
}

TEST(Sampling, GreedyTakesTheLargestAndTheLowestIdOfEquals) {
  EXPECT_EQ(Sampler({}, 0).sample(std::vector<float>{0.f, 3.f, 3.f, -1.f}), 1);
  EXPECT_EQ(Sampler({}, 0).sample(std::vector<float>{-5.f}), 0);
  EXPECT_EQ(Sampler({}, 0).sample(std::vector<float>{-INFINITY, -7.f}), 1);
}

TEST(Sampling, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits = {1.0f, 0.0f, 2.0f, -1.0f};
  constexpr int kDraws = 40000;
  std::vector<int> counts(logits.size(), 0);
  for (const int64_t id : draw({.temperature = 0.7, .seed = 3}, 0, logits, kDraws)) ++counts[static_cast<size_t>(id)];
  double total = 0.0;
  for (const float logit : logits) total += std::exp(logit / 0.7);
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p = std::exp(logits[i] / 0.7) / total;
    EXPECT_NEAR(counts[i], kDraws * p, 5.0 * std::sqrt(kDraws * p * (1.0 - p))) << "token " << i;  // five sigma
  }
}

TEST(Sampling, TopKAndTopPCutTheTail) {
  const std::vector<float> logits = {1.0f, 4.0f, 3.0f, 2.0f};
  EXPECT_THAT(draw({.temperature = 5.0, .top_k = 2}, 0, logits, 200), testing::Each(testing::AnyOf(1, 2)));
  EXPECT_THAT(draw({.temperature = 5.0, .top_k = 1}, 0, logits, 50), testing::Each(1));
  EXPECT_THAT(draw({.temperature = 1.0, .top_p = 1e-9}, 0, logits, 50), testing::Each(1));
  // Probabilities .64 .24 .09 .03: 0.8 needs the first two.
  const auto ids = draw({.temperature = 1.0, .top_p = 0.8}, 0, logits, 500);
  EXPECT_THAT(ids, testing::Each(testing::AnyOf(1, 2)));
  EXPECT_THAT(ids, testing::Contains(2));
  EXPECT_THAT(draw({.temperature = 1.0, .top_k = 100}, 0, logits, 2000), testing::Contains(0));
}

TEST(Sampling, IsReproducibleAndStreamsDiffer) {
  const std::vector<float> logits(64, 0.5f);
  const SamplingOptions options{.temperature = 1.0, .seed = 42};
  EXPECT_EQ(draw(options, 0, logits, 50), draw(options, 0, logits, 50));
  EXPECT_NE(draw(options, 0, logits, 50), draw(options, 1, logits, 50));
  EXPECT_NE(draw(options, 0, logits, 50), draw({.temperature = 1.0, .seed = 43}, 0, logits, 50));
}

TEST(Sampling, RefusesOddOptionsAndLogits) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(Sampler({.temperature = -1.0}, 0), Error);
  EXPECT_THROW(Sampler({.temperature = NAN}, 0), Error);
  EXPECT_THROW(Sampler({.top_k = -1}, 0), Error);
  EXPECT_THROW(Sampler({.top_p = 0.0}, 0), Error);
  EXPECT_THROW(Sampler({.top_p = 1.5}, 0), Error);
  EXPECT_THROW(Sampler({}, 0).sample(std::vector<float>{0.f, kNan}), Error);
  EXPECT_THROW(Sampler({}, 0).sample(std::vector<float>{kNan, 0.f}), Error);
  EXPECT_THROW(Sampler({}, 0).sample(std::vector<float>{-INFINITY, -INFINITY}), Error);
}

// Both ways of sampling draw the same tokens, ties among them.
TEST(BatchSampling, DrawsWhatTheSamplerDraws) {
  constexpr int64_t kRows = 5;
  constexpr int64_t kVocab = 300;
  at::manual_seed(7);
  const std::vector<SamplingOptions> cases = {{},
                                              {.temperature = 0.8, .seed = 1},
                                              {.temperature = 3.0, .top_k = 7, .seed = 2},
                                              {.temperature = 1.0, .top_k = 1, .seed = 3},
                                              {.temperature = 1.0, .top_k = 1000, .seed = 4},
                                              {.temperature = 1.5, .top_p = 0.7, .seed = 5},
                                              {.temperature = 1.5, .top_p = 1e-9, .seed = 6},
                                              {.temperature = 2.0, .top_k = 40, .top_p = 0.9, .seed = 7}};
  for (const SamplingOptions& options : cases) {
    SCOPED_TRACE(testing::Message() << options.temperature << " " << options.top_k << " " << options.top_p);
    std::vector<Sampler> one_by_one, for_draws;
    for (uint64_t row = 0; row < kRows; ++row) {
      one_by_one.emplace_back(options, row);
      for_draws.emplace_back(options, row);
    }
    for (int step = 0; step < 50; ++step) {
      // Steps of 1/4: many equals.
      const at::Tensor logits = at::randn({kRows, kVocab}).mul(8).round().div(4);
      std::vector<double> draws;
      if (options.temperature > 0.0)
        for (Sampler& sampler : for_draws) draws.push_back(sampler.draw());
      const std::vector<int64_t> ids = checked_ids(sample_rows(logits, options, at::tensor(draws, at::kDouble)));
      for (int64_t row = 0; row < kRows; ++row) {
        const float* data = logits.const_data_ptr<float>() + row * kVocab;
        EXPECT_EQ(ids[static_cast<size_t>(row)], one_by_one[static_cast<size_t>(row)].sample({data, kVocab})) << step << " " << row;
      }
    }
  }
}

TEST(BatchSampling, TellsOfLogitsAtFault) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const auto message_of = [](const std::vector<float>& row, const SamplingOptions& options) -> std::string {
    try {
      checked_ids(sample_rows(at::stack({at::tensor({0.f, 1.f, 2.f}), at::tensor(row)}), options, at::tensor({0.5, 0.5}, at::kDouble)));
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  for (const SamplingOptions& options : {SamplingOptions{}, SamplingOptions{.temperature = 1.0, .top_p = 0.5}}) {
    EXPECT_EQ(message_of({0.f, kNan, kNan}, options), "sampling: the logit of token 1 is NaN, expected a number");
    EXPECT_EQ(message_of({kNan, INFINITY, 0.f}, options), "sampling: the logit of token 0 is NaN, expected a number");
    EXPECT_EQ(message_of({-INFINITY, -INFINITY, -INFINITY}, options), "sampling: no logit is finite");
    EXPECT_EQ(message_of({0.f, INFINITY, 0.f}, options), "sampling: no logit is finite");
    EXPECT_EQ(message_of({-INFINITY, -3.f, -INFINITY}, options), "");
  }
}

}  // namespace
}  // namespace rotunda::engine
