#include "engine/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/check.h"

namespace rotunda::engine {

namespace {

// SplitMix64's finalizer: neighbouring streams get seeds far apart.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

int64_t argmax(std::span<const float> logits) {
  int64_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    ROTUNDA_CHECK(!std::isnan(logits[i]), "sampling: the logit of token ", i, " is NaN, expected a number");
    if (logits[i] > logits[static_cast<size_t>(best)]) best = static_cast<int64_t>(i);
  }
  return best;
}

}  // namespace

void check_sampling(const SamplingOptions& options) {
  ROTUNDA_CHECK(options.temperature >= 0.0 && std::isfinite(options.temperature), "--temperature: got ", options.temperature,
                ", expected 0 (greedy) or more");
  ROTUNDA_CHECK(options.top_k >= 0, "--top-k: got ", options.top_k, ", expected 0 (all) or more");
  ROTUNDA_CHECK(options.top_p > 0.0 && options.top_p <= 1.0, "--top-p: got ", options.top_p, ", expected above 0, up to 1");
}

Sampler::Sampler(const SamplingOptions& options, uint64_t stream)
    : options_(options), random_(mix(mix(options.seed) + stream)) {
  check_sampling(options);
}

int64_t Sampler::sample(std::span<const float> logits) {
  const int64_t best = argmax(logits);
  const float max = logits[static_cast<size_t>(best)];
  ROTUNDA_CHECK(std::isfinite(max), "sampling: no logit is finite");
  if (options_.temperature == 0.0) return best;

  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto likelier = [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (options_.top_k > 0 && options_.top_k < static_cast<int64_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + options_.top_k, order.end(), likelier);
    order.resize(static_cast<size_t>(options_.top_k));
  }
  std::sort(order.begin(), order.end(), likelier);

  std::vector<double> weights(order.size());
  double total = 0.0;
  for (size_t i = 0; i < order.size(); ++i) {
    weights[i] = std::exp((static_cast<double>(logits[order[i]]) - max) / options_.temperature);
    total += weights[i];
  }
  size_t kept = weights.size();
  if (options_.top_p < 1.0) {
    double sum = 0.0;
    for (kept = 0; kept < weights.size() && sum < options_.top_p * total; ++kept) sum += weights[kept];
    total = sum;
  }
  double left = draw() * total;
  for (size_t i = 0; i < kept; ++i) {
    if (left < weights[i]) return order[i];
    left -= weights[i];
  }
  return order[kept - 1];
}

// 53 bits make a number in [0, 1) that is the same on every platform, unlike the standard distributions.
double Sampler::draw() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

}  // namespace rotunda::engine
