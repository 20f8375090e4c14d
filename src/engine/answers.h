#pragma once

#include <filesystem>

#include "engine/evaluation.h"

namespace rotunda::engine {

struct AnswersOptions : EvalOptions {
  std::filesystem::path data;  ///< JSONL: {"prompt", "answer"} and, for chains of thought, "solution"
};

/// Teacher-forced exact match: the prompt (behind a BOS) is followed by the right answer, and an item is right where every
/// token of the answer is the likeliest one given all before it. The answer is " " + answer, or where there is a solution
/// " " + solution + " The answer is " + answer + ".". `deploy` runs the prompt in chunks and the answer token by token.
/// @throws Error{kUser} naming file, line and key for a line of another form.
AccuracyReport evaluate_answers(const Session& session, const AnswersOptions& options);

}  // namespace rotunda::engine
