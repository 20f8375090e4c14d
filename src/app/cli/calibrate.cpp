#include <cstdio>
#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/interrupt.h"
#include "app/cli/output.h"
#include "app/cli/table.h"
#include "engine/calibration.h"
#include "io/safetensors.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  ModelArguments model;
  std::string text;
  std::string out;
  engine::CalibrateOptions options;
};

int run_calibrate(const Arguments& arguments) {
  ProgressPrinter progress;
  check_writable(arguments.out);
  const std::string text = engine::read_text_file(arguments.text);
  std::vector<kv::KvSpec> specs;
  for (const std::string& name : arguments.options.formats) specs.push_back({.format = name, .options = {}, .parts = {}});
  engine::CalibrateOptions options = arguments.options;
  options.progress = progress.callback();
  options.stop = catch_interrupt();
  const engine::Session session = arguments.model.load(specs, progress);
  const ops::TensorBundle file = engine::calibrate(session, text, options);
  progress.clear();
  io::write_bundle(arguments.out, file);
  std::fprintf(stderr, "%s: calibration of %s on %s tokens\n", arguments.out.c_str(), file.meta("rotunda.formats").c_str(),
               grouped(file.meta_int("rotunda.tokens")).c_str());
  return 0;
}

}  // namespace

void add_calibrate(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("calibrate", "Learn from a text what the cache formats want to know of a model");
  const auto arguments = std::make_shared<Arguments>();
  arguments->model.add_to(*command);
  command->add_option("--text", arguments->text, "Text file, not the one to evaluate on")->required();
  command->add_option("--out", arguments->out, "Calibration file to write (safetensors)")->required();
  command->add_option("--formats", arguments->options.formats, "Formats, comma-separated [all that calibrate]")->delimiter(',')
      ->allow_extra_args(false);
  command->add_option("--max-tokens", arguments->options.max_tokens, "Tokens of the text at most")->capture_default_str();
  command->add_option("--window-len", arguments->options.window_len, "Tokens of a window, BOS included; 0: 2048, or the trained context where shorter")
      ->capture_default_str();
  command->footer(
      "Example:\n  rotunda calibrate models/tiny-gqa --text calibration.txt --out tiny-gqa.calibration\n"
      "rotunda2, 3 and 4 do without a calibration and lose a little less with one. Caches that need one make it on a built-in text,\n"
      "once for a model, where no file is given.");
  command->callback([arguments, &run] { run = [=] { return run_calibrate(*arguments); }; });
}

}  // namespace rotunda::cli
