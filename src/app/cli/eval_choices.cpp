#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/interrupt.h"
#include "engine/choices.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  EvalArguments eval;
  std::string data;
  int64_t limit = 0;
};

int run_eval_choices(const Arguments& arguments, const CLI::App& command) {
  ProgressPrinter progress;
  engine::ChoicesOptions options;
  arguments.eval.fill(options, progress, catch_interrupt());
  options.data = arguments.data;
  options.limit = arguments.limit;
  const engine::Session session = arguments.eval.model.load(options.specs, progress);
  const engine::AccuracyReport report = engine::evaluate_choices(session, options);
  progress.clear();
  return report_accuracy(report, command, arguments.eval.json);
}

}  // namespace

void add_eval_choices(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("choices", "Log-likelihood of multiple choices");
  const auto arguments = std::make_shared<Arguments>();
  arguments->eval.add_to(*command, "deploy");
  command->add_option("--data", arguments->data, "JSONL: {query, choices, gold}, {context_options, continuation, gold} or {context, continuation}")->required();
  command->add_option("--limit", arguments->limit, "Lines at most; 0: all")->capture_default_str();
  command->footer("Example:\n  rotunda eval choices models/tiny-gqa --data piqa.jsonl --kv bf16,rotate2 --limit 200");
  command->callback([arguments, command, &run] { run = [=] { return run_eval_choices(*arguments, *command); }; });
}

}  // namespace rotunda::cli
