#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "engine/evaluation.h"

namespace rotunda::engine {

struct PerplexityOptions : EvalOptions {
  std::optional<int64_t> window_len;  ///< tokens of a window, BOS included; none: 4096, or the trained context where shorter
};

struct PerplexityResult : EvalResult {
  double ppl = 0.0;
  double ppl_stderr = 0.0;        ///< ppl times the standard error of the mean negative log-likelihood of a token
  double mean_kl = 0.0;           ///< mean over tokens of KL(reference || this), nats
  double top1_agreement = 0.0;    ///< share of tokens where both hold the same token likeliest
  double ppl_change = 0.0;        ///< ppl / reference ppl - 1
};

struct PerplexityReport {
  PerplexityResult reference;             ///< the 16-bit cache over the same windows
  std::vector<PerplexityResult> results;  ///< one per spec, in the order asked for
  int64_t window_len = 0;
  int64_t scored_tokens = 0;
  bool interrupted = false;  ///< stopped early; the results cover the windows done by then
};

/// Perplexity of the text, tokenized once without special tokens: non-overlapping windows of window_len - 1 tokens behind a
/// BOS, every one scored (a model without BOS: windows of window_len tokens, the first not scored). A rest shorter than a
/// window is left out, unless the text is shorter than one window.
/// @throws Error{kUser} for a text of fewer than 2 tokens, a window_len below 2, logits that are not finite.
PerplexityReport evaluate_perplexity(const Session& session, std::string_view text, const PerplexityOptions& options);
/// The same with caches bound already; `options.specs` and `options.calibration_file` are not looked at.
PerplexityReport evaluate_perplexity(const Session& session, const std::vector<KvBinding>& bindings, std::string_view text,
                                     const PerplexityOptions& options);

}  // namespace rotunda::engine
