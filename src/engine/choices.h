#pragma once

#include <filesystem>
#include <string>

#include "engine/evaluation.h"

namespace rotunda::engine {

struct ChoicesOptions : EvalOptions {
  std::filesystem::path data;  ///< JSONL in one of the forms below
  ChoicesOptions() { protocol = Protocol::kDeploy; }
};

/// Log-likelihood of the choices of a question. The form of a line is told by its keys:
///   {"query", "choices", "gold"}                  every choice after the query: "\nAnswer:" joins them where the last
///                                                 paragraph of the query begins with "Question:", a space elsewhere
///   {"context_options", "continuation", "gold"}   the continuation after every context (partial evaluation)
///   {"context", "continuation"}                   right where the continuation is what greedy decoding gives
/// `accuracy` takes the largest sum of log-probabilities, `accuracy_norm` the largest per byte of the choice. `deploy` runs
/// what the choices share once, in chunks, and forks the cache for each; `quantize-all` runs every choice whole.
/// @throws Error{kUser} naming file, line and key for any other form, a `gold` that is no choice, an empty choice.
AccuracyReport evaluate_choices(const Session& session, const ChoicesOptions& options);

}  // namespace rotunda::engine
