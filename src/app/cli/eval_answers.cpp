#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/interrupt.h"
#include "engine/answers.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  EvalArguments eval;
  std::string data;
  int64_t limit = 0;
};

int run_eval_answers(const Arguments& arguments, const CLI::App& command) {
  ProgressPrinter progress;
  engine::AnswersOptions options;
  arguments.eval.fill(options, progress, catch_interrupt());
  options.data = arguments.data;
  options.limit = arguments.limit;
  const engine::Session session = arguments.eval.model.load(options.specs, progress);
  const engine::AccuracyReport report = engine::evaluate_answers(session, options);
  progress.clear();
  return report_accuracy(report, command, arguments.eval.json);
}

}  // namespace

void add_eval_answers(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("answers", "Teacher-forced exact match of known answers");
  const auto arguments = std::make_shared<Arguments>();
  arguments->eval.add_to(*command, "quantize-all");
  command->add_option("--data", arguments->data, "JSONL: {prompt, answer} and, for chains of thought, solution")->required();
  command->add_option("--limit", arguments->limit, "Lines at most; 0: all")->capture_default_str();
  command->footer("Example:\n  rotunda eval answers models/tiny-gqa --data retrieval.jsonl --kv bf16,rotate2 --limit 100");
  command->callback([arguments, command, &run] { run = [=] { return run_eval_answers(*arguments, *command); }; });
}

}  // namespace rotunda::cli
