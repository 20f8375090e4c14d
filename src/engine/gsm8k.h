#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "engine/evaluation.h"

namespace rotunda::engine {

struct Gsm8kOptions : EvalOptions {
  std::filesystem::path data;  ///< JSONL: {"question", "answer"}, the answer's number behind "####"
  int64_t max_new_tokens = 256;
  int64_t batch_size = 8;      ///< questions decoded together
  Gsm8kOptions() { protocol = Protocol::kDeploy; }
};

/// GSM8K (arXiv:2110.14168) with the 8 worked examples of chain-of-thought prompting (arXiv:2201.11903, appendix), greedy.
/// The examples run once and are shared by all questions through forks. A question is right where the number behind the
/// last "answer is" of the reply, or else its last number, equals the reference. `protocol` is deploy whatever it says.
/// @throws Error{kUser} naming file, line and key for a line of another form.
AccuracyReport evaluate_gsm8k(const Session& session, const Gsm8kOptions& options);

/// The number that a reply gives, thousands separators and units taken off, "18.0" as "18"; none where there is no number.
std::optional<std::string> extract_answer(const std::string& reply);

/// The worked examples, "Q: ...\nA: ... The answer is N.\n\n" each.
const std::string& gsm8k_examples();

}  // namespace rotunda::engine
