#include <limits>
#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/interrupt.h"
#include "app/cli/report.h"
#include "app/cli/table.h"
#include "engine/perplexity.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  EvalArguments eval;
  std::string text;
  std::optional<int64_t> window_len;
  int64_t windows = 0;
};

std::vector<std::string> table_row(const std::string& name, const engine::PerplexityResult& result) {
  return {name,
          fixed(result.ppl, 3),
          fixed(result.ppl_stderr, 3),
          signed_percent(result.ppl_change),
          fixed(result.mean_kl, 4),
          fixed(100.0 * result.top1_agreement, 2) + " %",
          fixed(result.bits_per_element, 3),
          human_bytes(result.cache_bytes),
          fixed(result.tok_s, 1)};
}

int run_eval_ppl(const Arguments& arguments, const CLI::App& command) {
  ProgressPrinter progress;
  engine::PerplexityOptions options;
  arguments.eval.fill(options, progress, catch_interrupt());
  options.window_len = arguments.window_len;
  options.limit = arguments.windows;
  const std::string text = engine::read_text_file(arguments.text);
  const engine::Session session = arguments.eval.model.load(options.specs, progress);
  const engine::PerplexityReport report = engine::evaluate_perplexity(session, text, options);
  progress.clear();

  Table table({"kv", "ppl", "±", "change", "mean KL", "top-1 same", "bits/element", "cache", "tokens/s"});
  Json results = Json::array();
  const auto is_reference = [&](const engine::PerplexityResult& result) { return result.used == report.reference.used; };
  if (std::none_of(report.results.begin(), report.results.end(), is_reference)) {
    table.add_row(table_row(report.reference.requested.to_string() + " (reference)", report.reference));
  }
  for (const engine::PerplexityResult& result : report.results) {
    table.add_row(table_row(result.requested.to_string(), result));
    results.push_back(ppl_json(result));
    results.back()["finished"] = report.interrupted ? "interrupted" : "complete";
  }
  print(table);
  Json run = run_json(command);
  run["window_len"] = report.window_len;
  run["windows"] = report.reference.items;
  run["scored_tokens"] = report.scored_tokens;
  run["reference"] = ppl_json(report.reference);
  write_report(arguments.eval.json, run, results);
  return report.interrupted ? kExitInterrupted : 0;
}

}  // namespace

void add_eval_ppl(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("ppl", "Perplexity of a text, and how far each cache is from the 16-bit one");
  const auto arguments = std::make_shared<Arguments>();
  arguments->eval.add_to(*command, "quantize-all");
  command->add_option("--text", arguments->text, "Text file")->required();
  command->add_option("--window-len", arguments->window_len,
                      "Tokens of a window, BOS included [4096, or the trained context where shorter]");
  command->add_option("--windows", arguments->windows, "Windows at most; 0: the whole text")->capture_default_str();
  command->footer(
      "Example:\n  rotunda eval ppl models/tiny-gqa --text wiki.test.raw --kv bf16,rotunda2,rotunda3,rotate2 --windows 24 --json ppl.json");
  command->callback([arguments, command, &run] { run = [=] { return run_eval_ppl(*arguments, *command); }; });
}

}  // namespace rotunda::cli
