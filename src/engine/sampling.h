#pragma once

#include <cstdint>
#include <random>
#include <span>

namespace rotunda::engine {

struct SamplingOptions {
  double temperature = 0.0;  ///< 0: greedy, the rest is then ignored
  int64_t top_k = 0;         ///< keep the k most likely tokens; 0: all
  double top_p = 1.0;        ///< of these keep the most likely until their probability reaches top_p
  uint64_t seed = 0;
};

/// Throws Error{kUser} naming the flag, got and expected.
void check_sampling(const SamplingOptions& options);

/// Draws tokens for one sequence. The stream of random numbers is std::mt19937_64 seeded from (seed, stream) alone, one
/// number a token, so a sequence's tokens do not depend on what else is in the batch. Same seed, same logits: same tokens,
/// on every machine.
class Sampler {
 public:
  /// @param stream  the sequence's number in its batch
  Sampler(const SamplingOptions& options, uint64_t stream);
  /// @param logits [vocab_size] fp32. Greedy takes the lowest id of equals. Filters in the order temperature, top-k, top-p.
  /// @throws Error{kUser} where a logit is NaN or none is finite.
  int64_t sample(std::span<const float> logits);
  /// The next random number, in [0, 1): for those who do sample()'s work elsewhere. sample() takes one where it is not greedy.
  double draw();

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

}  // namespace rotunda::engine
