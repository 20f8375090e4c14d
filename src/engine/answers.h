#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "engine/evaluation.h"

namespace rotunda::engine {

struct AnswersOptions : EvalOptions {
  std::filesystem::path data;  ///< JSONL: {"prompt", "answer"} and, for chains of thought, "solution"
};

/// A prompt with its right answer, tokenized.
struct AnswerItem {
  std::vector<int64_t> ids;  ///< BOS, prompt, answer
  size_t prompt_len = 0;     ///< tokens of the prompt, BOS included
  /// Where the prompt holds the answer, as a share of its bytes (0: at the start): its last place as a word of its own. None where it
  /// does not, and where there is a solution to work out.
  std::optional<double> answer_depth;
};

/// Reads the items of one file. The answer is " " + answer, or where there is a solution " " + solution + " The answer is " + answer;
/// prompt and answer are tokenized together.
/// @param limit  at most so many; 0: all
/// @throws Error{kUser} naming file, line and key for a line of another form.
std::vector<AnswerItem> read_answers(const Session& session, const std::filesystem::path& data, int64_t limit);

/// Teacher-forced exact match: the prompt (behind a BOS) is followed by the right answer, and an item is right where every
/// token of the answer is the likeliest one given all before it. `deploy` runs the prompt in chunks and the answer token by token.
/// @throws what read_answers throws.
AccuracyReport evaluate_answers(const Session& session, const AnswersOptions& options);
/// The same with caches bound and items read already; `options.specs`, `calibration_file` and `limit` are not looked at.
AccuracyReport evaluate_answers(const std::vector<KvBinding>& bindings, const std::vector<AnswerItem>& items,
                                const EvalOptions& options);

}  // namespace rotunda::engine
