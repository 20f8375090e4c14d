#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>
#include <vector>

#include "engine/perplexity.h"

namespace rotunda::engine {

struct TuneOptions {
  double budget = 0.0;  ///< bits per element on average, everything allocated for a sequence of kv_len tokens counted
  std::vector<kv::KvSpec> candidates;  ///< that a layer may have; at least two, no mixes
  int64_t kv_len = 0;                  ///< 0: the trained context
  int64_t windows = 2;                 ///< to measure the layers on, and as many behind them to check the result on
  std::optional<int64_t> window_len;   ///< as PerplexityOptions
  std::optional<std::filesystem::path> calibration_file;
  Progress progress;
  StopFlag stop = nullptr;
};

/// One format that a layer may have.
struct TuneCandidate {
  kv::KvSpec spec;
  double bits_per_element = 0.0;  ///< at kv_len
  std::vector<double> layer_kl;   ///< [n_layers] mean KL with the layer in this format and all others in 16 bits
};

struct TuneReport {
  std::vector<TuneCandidate> candidates;
  std::vector<size_t> choice;     ///< [n_layers] index of the candidate
  kv::KvSpec spec;                ///< the mix, or the one format that all layers got
  double bits_per_element = 0.0;  ///< of it at kv_len
  double predicted_kl = 0.0;      ///< sum of the layers' KL
  int64_t kv_len = 0;
  PerplexityReport check;  ///< the mix, then every candidate in all layers, on windows that the choice has not seen
};

/// Gives each layer one of the candidates so that the sum of the layers' KL to the 16-bit cache is least within the budget (exactly:
/// all sums of bytes that can come about are followed), then measures the result beside the candidates alone. Losses of layers add up well
/// when measured one by one with the others in 16 bits (docs/benchmarks.md); one by one in 16 bits with the others packed they do not.
/// @throws Error{kUser} for a budget that no choice keeps, a text of fewer than 2 * windows windows, and as evaluate_perplexity; Interrupted.
TuneReport tune(const Session& session, std::string_view text, const TuneOptions& options);

/// The choice of least total cost whose bytes are at most `budget_bytes`; of equals the one of fewest bytes.
/// @param bytes [n_layers][n_candidates]   @param cost the same   @return [n_layers]; empty where even the smallest choice is too large
std::vector<size_t> choose_within(const std::vector<std::vector<int64_t>>& bytes,
                                  const std::vector<std::vector<double>>& cost, int64_t budget_bytes);

/// A spec with candidates[choice[l]] in layer l, the commonest as the format of the rest.
kv::KvSpec spec_of_layers(const std::vector<kv::KvSpec>& candidates, const std::vector<size_t>& choice);

}  // namespace rotunda::engine
