#pragma once

#include <CLI/App.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/evaluation.h"
#include "engine/perplexity.h"

namespace rotunda::cli {

using Json = nlohmann::ordered_json;

/// `run` of a result file: the command, every option as it stands (defaults too), version, date, machine.
Json run_json(const CLI::App& command);

/// The keys that every evaluation's result has.
Json eval_json(const engine::EvalResult& result);
Json ppl_json(const engine::PerplexityResult& result);
Json accuracy_json(const engine::AccuracyResult& result);

/// Writes {"run", "results"} where a path is given. @throws Error{kWorld}
void write_report(const std::string& path, const Json& run, const Json& results);

}  // namespace rotunda::cli
