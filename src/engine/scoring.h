#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "model/causal_lm.h"

namespace rotunda::engine {

/// Mean and standard error of numbers seen one by one (Welford's method, fp64).
class RunningMean {
 public:
  void add(double value);
  int64_t n() const { return n_; }
  double mean() const { return mean_; }
  /// Of the mean: sample deviation / sqrt(n); 0 for fewer than two numbers.
  double standard_error() const;

 private:
  int64_t n_ = 0;
  double mean_ = 0.0;
  double m2_ = 0.0;
};

/// Rows of hidden states whose logits are made at once: at most 256 (on a GPU 1024), fewer for a large vocabulary. The logits of a
/// whole window never exist.
int64_t logit_block_rows(int64_t vocab_size, at::Device device = at::kCPU);

/// Log-probabilities of rows [begin, begin + n) of hidden.
/// @param hidden [N, hidden_size]   @return [n, vocab_size] fp32
at::Tensor block_log_probs(const model::CausalLm& model, const at::Tensor& hidden, int64_t begin, int64_t n);

/// Ids as a tensor [n] int64 on a device.
at::Tensor target_tensor(std::span<const int64_t> targets, at::Device device);
/// @param log_probs [n, vocab_size]   @param targets [n] int64 beside them   @return [n] fp64, each row's at its target
at::Tensor target_log_probs(const at::Tensor& log_probs, const at::Tensor& targets);

struct TokenScore {
  double log_prob = 0.0;  ///< of the target, natural logarithm
  bool is_top = false;    ///< the target is the likeliest token (the lowest id of equals)
};

/// Scores targets[i] by row i of hidden.   @param hidden [N, hidden_size], N = targets.size()
/// @throws Error{kUser} where a score is NaN.
std::vector<TokenScore> score_targets(const model::CausalLm& model, const at::Tensor& hidden, std::span<const int64_t> targets);

}  // namespace rotunda::engine
