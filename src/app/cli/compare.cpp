#include "engine/compare.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/compare_report.h"
#include "app/cli/interrupt.h"
#include "app/cli/output.h"
#include "app/cli/report_page.h"
#include "base/check.h"
#include "engine/jsonl.h"

namespace rotunda::cli {

namespace {

namespace fs = std::filesystem;

constexpr int kMaxDepth = 64;  // of a report's JSON

struct Arguments {
  EvalArguments eval;
  std::string text;
  std::vector<std::string> data;
  std::string prompts;
  std::string out;
  bool force = false;
  std::string from;
  engine::CompareOptions options;
};

// Asks before the work whether the report can be written. @throws Error naming the folder
void check_out_folder(const fs::path& out, bool force) {
  std::error_code ignored;
  if (!fs::exists(out, ignored)) return check_writable(out);
  ROTUNDA_CHECK_WORLD(fs::is_directory(out, ignored), out.string(), ": is a file, expected a folder to write");
  ROTUNDA_CHECK_WORLD(::access(out.c_str(), W_OK | X_OK) == 0, out.string(),
                      ": cannot be written: ", std::strerror(errno));
  ROTUNDA_CHECK(force || fs::is_empty(out, ignored), out.string(),
                ": is not empty; --force writes the report beside what is there");
}

// "report/" is the folder report.
fs::path out_folder(const Arguments& arguments) {
  const fs::path out = arguments.out;
  return out.has_filename() ? out : out.parent_path();
}

// Prints the table and writes report.json, report.csv and report.html.
void write_out(const Json& report, const fs::path& out) {
  // What is not UTF-8 becomes so here, once: page and CSV are made of what the JSON file says.
  const std::string text = report.dump(-1, ' ', false, Json::error_handler_t::replace);
  const Json clean = Json::parse(text);
  std::error_code error;
  fs::create_directory(out, error);
  ROTUNDA_CHECK_WORLD(!error, out.string(), ": cannot be made: ", error.message());
  write_file_atomically(out / "report.json", text + "\n");
  write_file_atomically(out / "report.csv", compare_csv(clean));
  write_file_atomically(out / "report.html", report_page(clean));
  print(compare_table(clean));
}

int render_again(const Arguments& arguments) {
  check_out_folder(out_folder(arguments), arguments.force);
  const std::string text = engine::read_text_file(arguments.from);
  // Writing goes down the levels by calls.
  const auto shallow = [&](int depth, Json::parse_event_t, Json&) {
    ROTUNDA_CHECK(depth < kMaxDepth, arguments.from, ": is nested more than ", kMaxDepth, " deep");
    return true;
  };
  const Json report = Json::parse(text, shallow, /*allow_exceptions=*/false);
  ROTUNDA_CHECK(!report.is_discarded(), arguments.from, ": is not JSON");
  check_compare_json(report, arguments.from);
  write_out(report, out_folder(arguments));
  return 0;
}

int run_compare(const Arguments& arguments, const CLI::App& command) {
  if (!arguments.from.empty()) {
    ROTUNDA_CHECK(arguments.eval.model.model_dir.empty() && arguments.text.empty() && arguments.data.empty(),
                  "--from: draws a report that is there, got MODEL, --text or --data too");
    return render_again(arguments);
  }
  ROTUNDA_CHECK(!arguments.eval.model.model_dir.empty() && !arguments.text.empty(),
                "compare: expected MODEL and --text FILE, or --from report.json");
  ProgressPrinter progress;
  engine::CompareOptions options = arguments.options;
  arguments.eval.fill(options, progress, catch_interrupt());
  check_out_folder(out_folder(arguments), arguments.force);
  const std::string text = engine::read_text_file(arguments.text);
  for (const std::string& path : arguments.data) {
    engine::read_jsonl(path,
                       options.limit);  // a missing file, a line that is no JSON: known before the weights are read
    options.data.emplace_back(path);
  }
  if (arguments.prompts == "none") {
    options.prompts.emplace();
  } else if (!arguments.prompts.empty()) {
    options.prompts = read_prompts(arguments.prompts);
  }
  const engine::Session session = arguments.eval.model.load(options.specs, progress);
  const engine::CompareReport report = engine::compare(session, text, options);
  progress.clear();
  write_out(compare_json(report, options, session, run_json(command)), out_folder(arguments));
  return 0;
}

}  // namespace

void add_compare(CLI::App& parent, Run& run) {
  CLI::App* command =
      parent.add_subcommand("compare", "Measure several caches in one run and write a report: page, JSON and CSV");
  const auto arguments = std::make_shared<Arguments>();
  engine::CompareOptions& options = arguments->options;
  arguments->eval.add_to(*command, "quantize-all");
  command->get_option("MODEL")->required(false);
  command->remove_option(command->get_option("--json"));
  command->add_option("--text", arguments->text, "Text file for perplexity, layers, speed and prompts");
  command
      ->add_option("--data", arguments->data,
                   "JSONL of known answers, as `eval answers` takes it; may be given several times")
      ->allow_extra_args(false);
  command->add_option("--out", arguments->out, "Folder for report.html, report.json and report.csv")->required();
  command->add_flag("--force", arguments->force, "Write to a folder that is not empty");
  command->add_option("--from", arguments->from,
                      "Draw the page and the CSV again from this report.json; no model is run");
  command->add_option("--windows", options.windows, "Windows of the text at most; 0: all")->capture_default_str();
  command->add_option("--window-len", options.window_len,
                      "Tokens of a window, BOS included [4096, or the trained context where shorter]");
  command->add_option("--limit", options.limit, "Lines of each data file at most; 0: all")->capture_default_str();
  command->add_option("--prompts", arguments->prompts,
                      "File of prompts to continue, one per line or JSONL {\"prompt\": ...}; none: no texts [three "
                      "pieces of the text]");
  command->add_option("--max-new-tokens", options.max_new_tokens, "Tokens to generate at most, each prompt")
      ->capture_default_str();
  command->add_option("--decode-len", options.decode_len, "Tokens in the cache while decoding is timed; 0: not timed")
      ->capture_default_str();
  command->add_option("--probe-len", options.probe_len, "Tokens of the text for layers, keys and attention")
      ->capture_default_str();
  command->add_option("--key-layer", options.key_layer, "Layer whose keys are shown [the one in the middle]");
  command->add_option("--key-head", options.key_head, "Key/value head whose keys are shown")->capture_default_str();
  command->footer(
      "The 16-bit cache is measured too, whether named or not. An interrupted run writes nothing.\n"
      "Examples:\n"
      "  rotunda compare models/tiny-gqa --kv bf16,rotunda3,rotunda2,rotate2 --text wiki.test.raw --data "
      "retrieval.jsonl --out report\n"
      "  rotunda compare --from report/report.json --out again");
  command->callback([arguments, command, &run] { run = [=] { return run_compare(*arguments, *command); }; });
}

}  // namespace rotunda::cli
