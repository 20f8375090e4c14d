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

at::Tensor target_log_probs(const at::Tensor& log_probs, std::span<const int64_t> targets) {
  const int64_t vocab_size = log_probs.size(1);
  const at::Tensor ids = at::empty({static_cast<int64_t>(targets.size()), 1}, at::kLong);
  for (size_t i = 0; i < targets.size(); ++i) {
    ROTUNDA_CHECK(targets[i] >= 0 && targets[i] < vocab_size, "scoring: token ", targets[i], ", the vocabulary has ", vocab_size);
    ids.mutable_data_ptr<int64_t>()[i] = targets[i];
  }
  return log_probs.gather(1, ids.to(log_probs.device())).squeeze(1).cpu();
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
    const at::Tensor own = target_log_probs(log_probs, targets.subspan(static_cast<size_t>(begin), static_cast<size_t>(n)));
    const at::Tensor tops = log_probs.argmax(-1).cpu();
    for (int64_t i = 0; i < n; ++i) {
      const float log_prob = own.const_data_ptr<float>()[i];
      ROTUNDA_CHECK(!std::isnan(log_prob), "scoring: the model's logits are not finite (row ", begin + i, ")");
      scores.push_back({.log_prob = log_prob, .is_top = tops.const_data_ptr<int64_t>()[i] == targets[static_cast<size_t>(begin + i)]});
    }
  }
  return scores;
}

}  // namespace rotunda::engine
