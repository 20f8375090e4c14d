#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/interrupt.h"
#include "engine/gsm8k.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  EvalArguments eval;
  std::string data;
  int64_t limit = 0;
  int64_t max_new_tokens = 256;
  int64_t batch_size = 8;
};

int run_eval_gsm8k(const Arguments& arguments, const CLI::App& command) {
  ProgressPrinter progress;
  engine::Gsm8kOptions options;
  arguments.eval.fill(options, progress, catch_interrupt());
  options.data = arguments.data;
  options.limit = arguments.limit;
  options.max_new_tokens = arguments.max_new_tokens;
  options.batch_size = arguments.batch_size;
  const engine::Session session = arguments.eval.model.load(options.specs, progress);
  const engine::AccuracyReport report = engine::evaluate_gsm8k(session, options);
  progress.clear();
  return report_accuracy(report, command, arguments.eval.json);
}

}  // namespace

void add_eval_gsm8k(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("gsm8k", "GSM8K: 8-shot chain of thought, greedy");
  const auto arguments = std::make_shared<Arguments>();
  arguments->eval.add_to(*command, "");
  command->add_option("--data", arguments->data, "JSONL: {question, answer}")->required();
  command->add_option("--limit", arguments->limit, "Lines at most; 0: all")->capture_default_str();
  command->add_option("--max-new-tokens", arguments->max_new_tokens, "Tokens of a reply at most")->capture_default_str();
  command->add_option("--batch-size", arguments->batch_size, "Questions decoded together")->capture_default_str();
  command->footer("Example:\n  rotunda eval gsm8k models/tiny-gqa --data gsm8k_test.jsonl --kv bf16,rotate2 --limit 50");
  command->callback([arguments, command, &run] { run = [=] { return run_eval_gsm8k(*arguments, *command); }; });
}

}  // namespace rotunda::cli
