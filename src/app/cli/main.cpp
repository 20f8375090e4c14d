// The program `rotunda`: reads the command line, calls the engine, prints.

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "app/cli/commands.h"
#include "app/cli/version.h"
#include "base/error.h"
#include "engine/control.h"
#include "ops/device.h"

namespace {

using namespace rotunda::cli;

// One line whatever the message held.
int fail(int code, std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::replace(message.begin(), message.end(), '\r', ' ');
  message.erase(message.find_last_not_of(' ') + 1);
  std::fprintf(stderr, "rotunda: %s\n", message.c_str());
  return code;
}

int exit_code(rotunda::Fault fault) {
  switch (fault) {
    case rotunda::Fault::kUser: return kExitUser;
    case rotunda::Fault::kWorld: return kExitWorld;
    case rotunda::Fault::kBug: return kExitBug;
  }
  return kExitBug;
}

void set_up_log() {
  auto logger = std::make_shared<spdlog::logger>("rotunda", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern("rotunda: %l: %v");
  spdlog::set_default_logger(std::move(logger));
}

int run_program(int argc, char** argv) {
  CLI::App app("Runs Hugging Face language models with a key-value cache of 2, 3, 4 or 16 bits.", "rotunda");
  app.set_version_flag("--version", std::string("rotunda ") + kVersion);
  app.require_subcommand(1);
  app.footer("`rotunda COMMAND --help` tells a command's options.\nExit codes: 0 done, 1 the world's fault (files, memory), 2 the caller's, 3 a bug, 130 interrupted.");
  Run run;
  add_generate(app, run);
  CLI::App* eval = app.add_subcommand("eval", "Measure what a cache costs: ppl, answers, choices, gsm8k");
  eval->require_subcommand(1);
  add_eval_ppl(*eval, run);
  add_eval_answers(*eval, run);
  add_eval_choices(*eval, run);
  add_eval_gsm8k(*eval, run);
  add_compare(app, run);
  add_calibrate(app, run);
  add_tune(app, run);
  add_info(app, run);
  add_formats(app, run);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    // CLI11 looks for a missing command before it looks at words that it does not know.
    const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
    const bool no_command = dynamic_cast<const CLI::RequiredError*>(&error) != nullptr && !unknown.empty();
    return fail(kExitUser, (no_command ? "unknown argument '" + unknown.front() + "'" : std::string(error.what())) + " (see --help)");
  }
  // Not InferenceMode: caches write tensors from threads of the pool, which it does not reach.
  const c10::NoGradGuard no_autograd;
  return run();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    set_up_log();
    return run_program(argc, argv);
  } catch (const rotunda::Error& error) {
    return fail(exit_code(error.fault()), error.what());
  } catch (const rotunda::engine::Interrupted&) {
    return fail(kExitInterrupted, "interrupted");
  } catch (const c10::Error& error) {
    const rotunda::Error translated = rotunda::ops::as_error(error);
    return fail(exit_code(translated.fault()), translated.what());
  } catch (const std::bad_alloc&) {
    return fail(kExitWorld, "out of memory");
  } catch (const std::exception& error) {
    return fail(kExitBug, std::string("bug: ") + error.what());
  }
}
