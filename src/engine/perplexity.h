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

/// A text in windows: non-overlapping, of window_len - 1 tokens behind a BOS, or of window_len where the model has none.
struct TextWindows {
  std::vector<int64_t> tokens;
  std::optional<int64_t> bos;
  int64_t window_len = 0;  ///< BOS included
  int64_t n_windows = 0;   ///< a rest shorter than a window is left out, unless the text is shorter than one window

  std::vector<int64_t> window(int64_t index) const;
};

/// @throws Error{kUser} for a text of fewer than 2 tokens, a window_len below 2.
TextWindows cut_text(const Session& session, std::string_view text, std::optional<int64_t> window_len);

/// Perplexity over the windows from `first_window` on, options.limit of them at most. `options.specs` and its calibration are those that
/// `bindings` were made of (bind_all). @throws Error{kUser} for logits that are not finite.
PerplexityReport evaluate_perplexity(const Session& session, const TextWindows& text, const std::vector<KvBinding>& bindings,
                                     const EvalOptions& options, int64_t first_window = 0);

/// Perplexity of the text, tokenized once without special tokens: non-overlapping windows of window_len - 1 tokens behind a
/// BOS, every one scored (a model without BOS: windows of window_len tokens, the first not scored). A rest shorter than a
/// window is left out, unless the text is shorter than one window.
/// @throws Error{kUser} for a text of fewer than 2 tokens, a window_len below 2, logits that are not finite.
PerplexityReport evaluate_perplexity(const Session& session, std::string_view text, const PerplexityOptions& options);

}  // namespace rotunda::engine
