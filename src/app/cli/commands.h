#pragma once

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <functional>

namespace rotunda::cli {

/// What the command line asked for, once it is parsed; returns the exit code. Throws what the engine throws.
using Run = std::function<int()>;

/// Exit codes of the program (0: done).
inline constexpr int kExitWorld = 1;         ///< input/output, memory, device
inline constexpr int kExitUser = 2;          ///< a flag, a file's content
inline constexpr int kExitBug = 3;           ///< ours
inline constexpr int kExitInterrupted = 130; ///< Ctrl-C

/// Each adds one subcommand to `parent` and, where it is chosen, puts its work into `run`.
void add_generate(CLI::App& parent, Run& run);
void add_eval_ppl(CLI::App& parent, Run& run);
void add_eval_answers(CLI::App& parent, Run& run);
void add_eval_choices(CLI::App& parent, Run& run);
void add_eval_gsm8k(CLI::App& parent, Run& run);
void add_compare(CLI::App& parent, Run& run);
void add_calibrate(CLI::App& parent, Run& run);
void add_tune(CLI::App& parent, Run& run);
void add_info(CLI::App& parent, Run& run);
void add_formats(CLI::App& parent, Run& run);

}  // namespace rotunda::cli
