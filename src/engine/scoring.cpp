#include "engine/scoring.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace rotunda::engine {

namespace {

constexpr int64_t kMaxRows = 256;
constexpr int64_t kMaxRowsOnGpu = 1024;
constexpr int64_t kMinRows = 16;
constexpr int64_t kBlockElements = int64_t{1} << 22;       // 16 MiB of fp32 per temporary
constexpr int64_t kBlockElementsOnGpu = int64_t{1} << 26;  // 256 MiB: fewer, longer kernels, and fewer waits for them

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

int64_t logit_block_rows(int64_t vocab_size, at::Device device) {
  const int64_t elements = device.is_cuda() ? kBlockElementsOnGpu : kBlockElements;
  return std::clamp(elements / std::max<int64_t>(vocab_size, 1), kMinRows, device.is_cuda() ? kMaxRowsOnGpu : kMaxRows);
}

at::Tensor target_tensor(std::span<const int64_t> targets, at::Device device) {
  const at::Tensor ids = at::empty({static_cast<int64_t>(targets.size())}, at::kLong);
  std::copy(targets.begin(), targets.end(), ids.mutable_data_ptr<int64_t>());
  return ids.to(device);
}

at::Tensor target_log_probs(const at::Tensor& log_probs, const at::Tensor& targets) {
  return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).to(at::kDouble);
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
  const int64_t block_rows = logit_block_rows(vocab_size, hidden.device());
  for (int64_t begin = 0; begin < n_rows; begin += block_rows) {
    const int64_t n = std::min(block_rows, n_rows - begin);
    const auto block_targets = targets.subspan(static_cast<size_t>(begin), static_cast<size_t>(n));
    for (const int64_t target : block_targets)
      ROTUNDA_CHECK(target >= 0 && target < vocab_size, "scoring: token ", target, ", the vocabulary has ", vocab_size);
    const at::Tensor log_probs = block_log_probs(model, hidden, begin, n);
    const at::Tensor wanted = target_tensor(block_targets, log_probs.device());
    // Read back together: on a GPU every reading waits.
    const at::Tensor read = at::stack({target_log_probs(log_probs, wanted), log_probs.argmax(-1).eq(wanted).to(at::kDouble)}).to(at::kCPU);
    const double* of_target = read.const_data_ptr<double>();
    for (int64_t i = 0; i < n; ++i) {
      ROTUNDA_CHECK(!std::isnan(of_target[i]), "scoring: the model's logits are not finite (row ", begin + i, ")");
      scores.push_back({.log_prob = of_target[i], .is_top = of_target[n + i] != 0.0});
    }
  }
  return scores;
}

}  // namespace rotunda::engine
