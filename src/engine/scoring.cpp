#include "engine/scoring.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace rotunda::engine {

namespace {

constexpr int64_t kMaxRows = 256;
constexpr int64_t kMinRows = 16;
constexpr int64_t kBlockElements = int64_t{1} << 22;  // 16 MiB of fp32 per temporary

}  // namespace

void RunningMean::add(double value) {
  ++n_;
  const double delta = value - mean_;
  mean_ += delta / static_cast<double>(n_);
  m2_ += delta * (value - mean_);
}

double RunningMean::standard_error() const {
  if (n_ < 2) return 0.0;
  return std::sqrt(m2_ / static_cast<double>(n_ - 1) / static_cast<double>(n_));
}

int64_t logit_block_rows(int64_t vocab_size) {
  return std::clamp(kBlockElements / std::max<int64_t>(vocab_size, 1), kMinRows, kMaxRows);
}

at::Tensor block_log_probs(const model::CausalLm& model, const at::Tensor& hidden, int64_t begin, int64_t n) {
  return at::log_softmax(model.logits(hidden.narrow(0, begin, n)), -1).contiguous();
}

std::vector<TokenScore> score_targets(const model::CausalLm& model, const at::Tensor& hidden, std::span<const int64_t> targets) {
  const int64_t n_rows = hidden.size(0);
  ROTUNDA_ASSERT(n_rows == static_cast<int64_t>(targets.size()));
  const int64_t vocab_size = model.info().vocab_size;
  std::vector<TokenScore> scores;
  scores.reserve(targets.size());
  for (int64_t begin = 0; begin < n_rows; begin += logit_block_rows(vocab_size)) {
    const int64_t n = std::min(logit_block_rows(vocab_size), n_rows - begin);
    const at::Tensor log_probs = block_log_probs(model, hidden, begin, n);
    for (int64_t i = 0; i < n; ++i) {
      const float* row = log_probs.const_data_ptr<float>() + i * vocab_size;
      const int64_t target = targets[static_cast<size_t>(begin + i)];
      ROTUNDA_CHECK(target >= 0 && target < vocab_size, "scoring: token ", target, ", the vocabulary has ", vocab_size);
      ROTUNDA_CHECK(!std::isnan(row[target]), "scoring: the model's logits are not finite (row ", begin + i, ")");
      scores.push_back({.log_prob = row[target], .is_top = std::max_element(row, row + vocab_size) - row == target});
    }
  }
  return scores;
}

}  // namespace rotunda::engine
