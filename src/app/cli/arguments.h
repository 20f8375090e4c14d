#pragma once

#include <CLI/App.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/cli/interrupt.h"
#include "app/cli/progress.h"
#include "engine/evaluation.h"
#include "engine/session.h"
#include "model/causal_lm.h"

namespace rotunda::cli {

/// The options that every command with a model has.
struct ModelArguments {
  std::string model_dir;
  std::string dtype = "fp32";
  std::string device = "cpu";
  double memory = 0.9;
  CLI::Option* memory_option = nullptr;  ///< to know whether it was given
  int threads = 0;

  void add_to(CLI::App& command);
  /// What the options say of arithmetic and place, checked: the device is there.
  model::CausalLmOptions placement() const;
  /// Loads the model after checking `specs`. The progress bar is off the screen afterwards.
  engine::Session load(const std::vector<kv::KvSpec>& specs, ProgressPrinter& progress) const;
};

/// The options that every evaluation has.
struct EvalArguments {
  ModelArguments model;
  std::vector<std::string> kv = {"bf16"};
  std::string calibration;
  std::string protocol;
  int64_t prefill_chunk = 512;
  std::string json;

  /// `protocol` is the default, or empty where there is nothing to choose.
  void add_to(CLI::App& command, const std::string& protocol);
  /// Checked, and written into the evaluation's own options; reads nothing from disk.
  void fill(engine::EvalOptions& options, ProgressPrinter& progress, engine::StopFlag stop) const;
  std::vector<kv::KvSpec> specs() const;
};

/// The options that every evaluation over the lines of a file has.
struct ItemArguments {
  EvalArguments eval;
  std::string data;
  int64_t limit = 0;

  /// As EvalArguments::add_to; `data_help` says what a line holds.
  void add_to(CLI::App& command, const std::string& protocol, const std::string& data_help);
};

/// Prints the results of an accuracy evaluation and writes its JSON file. @return the exit code
int report_accuracy(const engine::AccuracyReport& report, const CLI::App& command, const std::string& json_path);

/// Runs one accuracy evaluation whole: fills `options`, loads the model, evaluates, reports. @return the exit code
/// @param evaluate for example engine::evaluate_answers
template <typename Options>
int run_accuracy(const ItemArguments& arguments, const CLI::App& command, Options options,
                 engine::AccuracyReport (*evaluate)(const engine::Session&, const Options&)) {
  ProgressPrinter progress;
  arguments.eval.fill(options, progress, catch_interrupt());
  options.data = arguments.data;
  options.limit = arguments.limit;
  const engine::Session session = arguments.eval.model.load(options.specs, progress);
  const engine::AccuracyReport report = evaluate(session, options);
  progress.clear();
  return report_accuracy(report, command, arguments.eval.json);
}

/// The prompts of a file: one per line, or JSONL {"prompt": ...}. @throws Error naming the file where it holds none
std::vector<std::string> read_prompts(const std::string& path);

/// The specs of an option that may be given several times, each time with a list.
std::vector<kv::KvSpec> joined_specs(const std::vector<std::string>& lists);

/// "" as nothing.
std::optional<std::filesystem::path> optional_path(const std::string& text);

}  // namespace rotunda::cli
