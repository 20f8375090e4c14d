#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "engine/answers.h"

namespace rotunda::cli {

void add_eval_answers(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("answers", "Teacher-forced exact match of known answers");
  const auto arguments = std::make_shared<ItemArguments>();
  arguments->add_to(*command, "quantize-all", "JSONL: {prompt, answer} and, for chains of thought, solution");
  command->footer("Example:\n  rotunda eval answers models/tiny-gqa --data retrieval.jsonl --kv bf16,rotunda2 --limit 100");
  command->callback([arguments, command, &run] {
    run = [=] { return run_accuracy(*arguments, *command, engine::AnswersOptions(), engine::evaluate_answers); };
  });
}

}  // namespace rotunda::cli
