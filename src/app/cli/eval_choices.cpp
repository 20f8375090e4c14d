#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "engine/choices.h"

namespace rotunda::cli {

void add_eval_choices(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("choices", "Log-likelihood of multiple choices");
  const auto arguments = std::make_shared<ItemArguments>();
  arguments->add_to(*command, "deploy", "JSONL: {query, choices, gold}, {context_options, continuation, gold} or {context, continuation}");
  command->footer("Example:\n  rotunda eval choices models/tiny-gqa --data piqa.jsonl --kv bf16,rotunda2 --limit 200");
  command->callback([arguments, command, &run] {
    run = [=] { return run_accuracy(*arguments, *command, engine::ChoicesOptions(), engine::evaluate_choices); };
  });
}

}  // namespace rotunda::cli
