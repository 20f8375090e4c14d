#include "engine/scoring.h"

#include <gtest/gtest.h>

#include <cmath>

#include "engine/toy.h"

namespace rotunda::engine {
namespace {

TEST(RunningMean, EqualsTheDirectFormulas) {
  RunningMean mean;
  EXPECT_EQ(mean.standard_error(), 0.0);
  mean.add(1e9 + 1);
  EXPECT_EQ(mean.standard_error(), 0.0);
  mean.add(1e9 + 2);
  mean.add(1e9 + 6);
  EXPECT_DOUBLE_EQ(mean.mean(), 1e9 + 3);
  EXPECT_NEAR(mean.standard_error(), std::sqrt(14.0 / 2.0 / 3.0), 1e-9);
}

TEST(Scoring, EqualsALogSoftmaxInDoublesAcrossBlocks) {
  const toy::ToyLm model;
  const int64_t rows = logit_block_rows(model.info().vocab_size) * 2 + 3;
  const at::Tensor hidden = at::randn({rows, 64});
  std::vector<int64_t> targets;
  for (int64_t i = 0; i < rows; ++i) targets.push_back(i * 7 % 258);
  const at::Tensor logits = model.logits(hidden).to(at::kDouble);
  targets[5] = logits[5].argmax().item<int64_t>();
  const auto scores = score_targets(model, hidden, targets);
  ASSERT_EQ(static_cast<int64_t>(scores.size()), rows);
  for (int64_t i = 0; i < rows; ++i) {
    const double expected = (logits[i][targets[i]] - logits[i].logsumexp(0)).item<double>();
    EXPECT_NEAR(scores[i].log_prob, expected, 1e-5) << i;
    EXPECT_EQ(scores[i].is_top, logits[i].argmax().item<int64_t>() == targets[i]) << i;
  }
  EXPECT_TRUE(scores[5].is_top);
}

TEST(Scoring, RefusesTargetsOutsideTheVocabularyAndNanLogits) {
  const toy::ToyLm model;
  EXPECT_THROW(score_targets(model, at::zeros({1, 64}), std::vector<int64_t>{258}), Error);
  EXPECT_THROW(score_targets(model, at::full({1, 64}, NAN), std::vector<int64_t>{3}), Error);
}

TEST(Scoring, BlocksStaySmallForLargeVocabularies) {
  EXPECT_EQ(logit_block_rows(258), 256);
  EXPECT_EQ(logit_block_rows(128256), 32);
  EXPECT_EQ(logit_block_rows(10'000'000), 16);
}

}  // namespace
}  // namespace rotunda::engine
