#include "app/cli/report.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <ctime>
#include <fstream>

#include "app/cli/output.h"
#include "app/cli/version.h"

namespace rotunda::cli {

namespace {

std::string cpu_model() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

std::string utc_date() {
  const std::time_t now = std::time(nullptr);
  std::tm parts = {};
  gmtime_r(&now, &parts);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text.data();
}

// A number where the whole text is one, else the text.
Json value_json(const std::string& text) {
  int64_t whole = 0;
  const char* end = text.data() + text.size();
  if (const auto read = std::from_chars(text.data(), end, whole); read.ec == std::errc() && read.ptr == end) return whole;
  double real = 0.0;
  if (const auto read = std::from_chars(text.data(), end, real); read.ec == std::errc() && read.ptr == end) return real;
  return text;
}

Json option_json(const CLI::Option& option) {
  const bool is_flag = option.get_expected_max() == 0;
  if (is_flag) return option.count() > 0;
  const bool is_list = option.get_expected_max() > 1;
  if (is_list) return Json(option.results());
  const std::string text = option.count() > 0 ? option.results().back() : option.get_default_str();
  // Prompts and paths stay text even where they look like numbers; an empty option was not given.
  if (text.empty()) return nullptr;
  return option.get_type_name() == "TEXT" ? Json(text) : value_json(text);
}

}  // namespace

Json run_json(const CLI::App& command) {
  Json run;
  run["command"] = (command.get_parent() != nullptr && !command.get_parent()->get_name().empty() &&
                    command.get_parent()->get_parent() != nullptr)
                       ? command.get_parent()->get_name() + " " + command.get_name()
                       : command.get_name();
  for (const CLI::Option* option : command.get_options()) {
    std::string name = option->get_single_name();
    if (name == "help") continue;
    for (char& c : name) {
      if (c == '-') c = '_';
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    }
    run[name] = option_json(*option);
  }
  run["version"] = kVersion;
  run["date"] = utc_date();
  run["machine"] = {{"cpu", cpu_model()},
                    {"threads", at::get_num_threads()},
                    {"memory_bytes", static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE)}};
  return run;
}

Json eval_json(const engine::EvalResult& result) {
  return {{"kv_requested", result.requested.to_string()},
          {"kv_used", result.used.to_string()},
          {"items", result.items},
          {"bits_per_element", result.bits_per_element},
          {"cache_bytes", result.cache_bytes},
          {"tok_s", result.tok_s}};
}

Json ppl_json(const engine::PerplexityResult& result) {
  Json json = eval_json(result);
  json["ppl"] = result.ppl;
  json["ppl_stderr"] = result.ppl_stderr;
  json["ppl_change"] = result.ppl_change;
  json["mean_kl"] = result.mean_kl;
  json["top1_agreement"] = result.top1_agreement;
  return json;
}

Json accuracy_json(const engine::AccuracyResult& result) {
  Json json = eval_json(result);
  json["accuracy"] = result.accuracy;
  json["accuracy_stderr"] = result.accuracy_stderr;
  if (result.accuracy_norm) {
    json["accuracy_norm"] = *result.accuracy_norm;
    json["accuracy_norm_stderr"] = result.accuracy_norm_stderr;
  }
  return json;
}

void write_report(const std::string& path, const Json& run, const Json& results) {
  if (path.empty()) return;
  const Json report = {{"run", run}, {"results", results}};
  // Text cut inside a character must not make the file unreadable.
  write_file_atomically(path, report.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace rotunda::cli
