#include "engine/tune.h"

#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/interrupt.h"
#include "app/cli/output.h"
#include "app/cli/report.h"
#include "app/cli/table.h"
#include "base/check.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  ModelArguments model;
  std::string text;
  std::vector<std::string> formats = {"rotunda2,rotunda3,rotunda4"};
  std::string calibration;
  std::string out;
  engine::TuneOptions options;
};

void print_layers(const engine::TuneReport& report) {
  std::vector<std::string> headers = {"layer"};
  for (const engine::TuneCandidate& candidate : report.candidates)
    headers.push_back("KL, " + candidate.spec.to_string());
  headers.push_back("choice");
  Table table(headers);
  for (size_t layer = 0; layer < report.choice.size(); ++layer) {
    std::vector<std::string> row = {std::to_string(layer)};
    for (const engine::TuneCandidate& candidate : report.candidates) row.push_back(fixed(candidate.layer_kl[layer], 5));
    row.push_back(report.candidates[report.choice[layer]].spec.to_string());
    table.add_row(row);
  }
  print(table);
}

void print_check(const engine::TuneReport& report) {
  Table table({"kv", "bits/element", "ppl", "change", "mean KL", "top-1 same"});
  const auto add = [&](const std::string& name, const engine::PerplexityResult& result) {
    table.add_row({name, fixed(result.bits_per_element, 3), fixed(result.ppl, 3), signed_percent(result.ppl_change),
                   fixed(result.mean_kl, 4), fixed(100.0 * result.top1_agreement, 2) + " %"});
  };
  add(report.check.reference.requested.to_string() + " (reference)", report.check.reference);
  for (size_t i = 0; i < report.check.results.size(); ++i)
    add(i == 0 ? "the choice" : report.check.results[i].requested.to_string(), report.check.results[i]);
  print(table);
}

Json tune_json(const engine::TuneReport& report) {
  Json json = {{"kv", report.spec.to_string()},
               {"kv_len", report.kv_len},
               {"planned_bits_per_element", report.bits_per_element},
               {"predicted_kl", report.predicted_kl},
               {"candidates", Json::array()},
               {"layers", Json::array()},
               {"reference", ppl_json(report.check.reference)},
               {"checked", Json::array()}};
  for (const engine::TuneCandidate& candidate : report.candidates) {
    json["candidates"].push_back({{"kv", candidate.spec.to_string()},
                                  {"planned_bits_per_element", candidate.bits_per_element},
                                  {"layer_kl", candidate.layer_kl}});
  }
  for (const size_t choice : report.choice) json["layers"].push_back(report.candidates[choice].spec.to_string());
  for (const engine::PerplexityResult& result : report.check.results) json["checked"].push_back(ppl_json(result));
  return json;
}

int run_tune(const Arguments& arguments, const CLI::App& command) {
  ProgressPrinter progress;
  if (!arguments.out.empty()) check_writable(arguments.out);
  engine::TuneOptions options = arguments.options;
  options.candidates = joined_specs(arguments.formats);
  options.calibration_file = optional_path(arguments.calibration);
  options.progress = progress.callback();
  options.stop = catch_interrupt();
  const std::string text = engine::read_text_file(arguments.text);
  const engine::Session session = arguments.model.load(options.candidates, progress);
  const engine::TuneReport report = engine::tune(session, text, options);
  progress.clear();

  print_layers(report);
  write_stdout("\n");
  print_check(report);
  write_stdout(concat(
      "\n", fixed(report.bits_per_element, 3), " bits per element at ", grouped(report.kv_len), " tokens (budget ",
      fixed(options.budget, 3), ")\nthe layers' KL add up to ", fixed(report.predicted_kl, 4),
      " on the windows measured; the second table is of other windows\n--kv \"", report.spec.to_string(), "\"\n"));
  write_report(arguments.out, run_json(command), Json::array({tune_json(report)}));
  return 0;
}

}  // namespace

void add_tune(CLI::App& parent, Run& run) {
  CLI::App* command =
      parent.add_subcommand("tune", "Find the format of each layer that loses least within a budget of bits");
  const auto arguments = std::make_shared<Arguments>();
  engine::TuneOptions& options = arguments->options;
  arguments->model.add_to(*command);
  command->add_option("--budget", options.budget, "Bits per element on average, all that is allocated counted")
      ->required();
  command->add_option("--text", arguments->text, "Text file, not the one to evaluate on")->required();
  command->add_option("--formats", arguments->formats, "Formats that a layer may have: SPEC[,SPEC...]")
      ->type_name("SPECS")
      ->allow_extra_args(false)
      ->capture_default_str();
  command->add_option("--kv-len", options.kv_len, "Cached tokens at which bits are counted; 0: the trained context")
      ->capture_default_str();
  command
      ->add_option("--windows", options.windows,
                   "Windows of the text to measure the layers on, and as many again to check the choice on")
      ->capture_default_str();
  command->add_option("--window-len", options.window_len,
                      "Tokens of a window, BOS included [4096, or the trained context where shorter]");
  command->add_option("--calibration", arguments->calibration, "Calibration file, as `rotunda calibrate` writes it");
  command->add_option("--out", arguments->out, "Write options, machine and results (JSON) to this file");
  command->footer(
      "Every layer is measured in every format with the others in 16 bits; the last line is the --kv to go on with.\n"
      "Example:\n  rotunda tune models/tiny-gqa --budget 3.4 --text calibration.txt --formats rotunda2,rotunda3 --out "
      "tuned.json");
  command->callback([arguments, command, &run] { run = [=] { return run_tune(*arguments, *command); }; });
}

}  // namespace rotunda::cli
