#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "engine/gsm8k.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  ItemArguments items;
  engine::Gsm8kOptions options;
};

}  // namespace

void add_eval_gsm8k(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("gsm8k", "GSM8K: 8-shot chain of thought, greedy");
  const auto arguments = std::make_shared<Arguments>();
  arguments->items.add_to(*command, "", "JSONL: {question, answer}");
  command->add_option("--max-new-tokens", arguments->options.max_new_tokens, "Tokens of a reply at most")->capture_default_str();
  command->add_option("--batch-size", arguments->options.batch_size, "Questions decoded together")->capture_default_str();
  command->footer("Example:\n  rotunda eval gsm8k models/tiny-gqa --data gsm8k_test.jsonl --kv bf16,rotunda2 --limit 50");
  command->callback([arguments, command, &run] {
    run = [=] { return run_accuracy(arguments->items, *command, arguments->options, engine::evaluate_gsm8k); };
  });
}

}  // namespace rotunda::cli
