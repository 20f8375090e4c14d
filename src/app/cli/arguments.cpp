#include "app/cli/arguments.h"

#include "app/cli/commands.h"
#include "app/cli/output.h"
#include "app/cli/report.h"
#include "app/cli/table.h"
#include "base/check.h"
#include "engine/jsonl.h"
#include "ops/device.h"

namespace rotunda::cli {

void ModelArguments::add_to(CLI::App& command) {
  command.add_option("MODEL", model_dir, "Hugging Face model folder")->required();
  command.add_option("--device", device, "Where to compute: cpu, cuda (the first GPU) or cuda:N")->capture_default_str();
  command.add_option("--dtype", dtype, "Arithmetic and weights: fp32, bf16 or fp16; on a GPU 16 bits are several times faster")
      ->capture_default_str();
  memory_option = command.add_option("--memory", memory, "Share of a GPU's memory that weights and cache may take")->capture_default_str();
  command.add_option("--threads", threads, "Threads to compute with; 0: one per core")->capture_default_str();
}

model::CausalLmOptions ModelArguments::placement() const {
  model::CausalLmOptions options;
  if (dtype == "bf16") {
    options.dtype = at::kBFloat16;
  } else if (dtype == "fp16") {
    options.dtype = at::kHalf;
  } else {
    ROTUNDA_CHECK(dtype == "fp32", "--dtype: got '", dtype, "', expected fp32, bf16 or fp16");
  }
  options.device = ops::parse_device(device);
  ROTUNDA_CHECK(memory > 0.0 && memory <= 1.0, "--memory: got ", memory, ", expected above 0, up to 1");
  ROTUNDA_CHECK(options.device.is_cuda() || memory_option->empty(), "--memory: is for a GPU, --device is ", device);
  ops::require_device(options.device);
  if (options.device.is_cuda())
    options.device_budget_bytes = static_cast<int64_t>(memory * static_cast<double>(ops::total_memory_bytes(options.device)));
  return options;
}

engine::Session ModelArguments::load(const std::vector<kv::KvSpec>& specs, ProgressPrinter& progress) const {
  engine::SessionOptions options;
  const model::CausalLmOptions placement = this->placement();
  options.model_dir = model_dir;
  options.dtype = placement.dtype;
  options.device = placement.device;
  options.device_budget_bytes = placement.device_budget_bytes;
  options.threads = threads;
  options.specs = specs;
  options.progress = progress.callback();
  engine::Session session = engine::load_session(options);
  progress.clear();
  return session;
}

void EvalArguments::add_to(CLI::App& command, const std::string& default_protocol) {
  protocol = default_protocol;
  model.add_to(command);
  command.add_option("--kv", kv, "Caches to compare: SPEC[,SPEC...], a SPEC as for `rotunda generate`")
      ->type_name("SPECS")
      ->allow_extra_args(false)
      ->capture_default_str();
  command.add_option("--calibration", calibration, "Calibration file, as `rotunda calibrate` writes it");
  if (!protocol.empty()) {
    command
        .add_option("--protocol", protocol,
                    "quantize-all: every token sees the stored form of all keys and values, its own too; deploy: as "
                    "generation runs")
        ->capture_default_str();
  }
  command.add_option("--prefill-chunk", prefill_chunk, "Most tokens of a prompt in one step (deploy)")->capture_default_str();
  command.add_option("--json", json, "Write options, machine and results to this file");
}

void ItemArguments::add_to(CLI::App& command, const std::string& protocol, const std::string& data_help) {
  eval.add_to(command, protocol);
  command.add_option("--data", data, data_help)->required();
  command.add_option("--limit", limit, "Lines at most; 0: all")->capture_default_str();
}

std::vector<kv::KvSpec> EvalArguments::specs() const { return joined_specs(kv); }

void EvalArguments::fill(engine::EvalOptions& options, ProgressPrinter& progress, engine::StopFlag stop) const {
  options.specs = specs();
  if (!protocol.empty()) options.protocol = engine::parse_protocol(protocol);
  options.calibration_file = optional_path(calibration);
  options.prefill_chunk = prefill_chunk;
  options.progress = progress.callback();
  options.stop = stop;
  if (!json.empty()) check_writable(json);
}

int report_accuracy(const engine::AccuracyReport& report, const CLI::App& command, const std::string& json_path) {
  const bool with_norm = !report.results.empty() && report.results[0].accuracy_norm.has_value();
  std::vector<std::string> headers = {"kv", "accuracy", "±"};
  if (with_norm) headers.insert(headers.end(), {"accuracy/byte", "±"});
  headers.insert(headers.end(), {"items", "bits/element", "largest cache", "tokens/s"});
  Table table(headers);
  Json results = Json::array();
  for (const engine::AccuracyResult& result : report.results) {
    std::vector<std::string> row = {result.requested.to_string(), fixed(result.accuracy, 4), fixed(result.accuracy_stderr, 4)};
    if (with_norm) {
      row.push_back(fixed(result.accuracy_norm.value_or(0.0), 4));
      row.push_back(fixed(result.accuracy_norm_stderr, 4));
    }
    row.insert(row.end(), {std::to_string(result.items), fixed(result.bits_per_element, 2), human_bytes(result.cache_bytes),
                           fixed(result.tok_s, 1)});
    table.add_row(row);
    results.push_back(accuracy_json(result));
    results.back()["finished"] = report.interrupted ? "interrupted" : "complete";
  }
  print(table);
  write_report(json_path, run_json(command), results);
  return report.interrupted ? kExitInterrupted : 0;
}

std::vector<std::string> read_prompts(const std::string& path) {
  const std::string text = engine::read_text_file(path);
  std::vector<std::string> prompts;
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first != std::string::npos && text[first] == '{') {
    for (const engine::JsonlLine& line : engine::read_jsonl(path, 0)) prompts.push_back(line.text("prompt"));
    return prompts;
  }
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    if (line.ends_with('\r')) line.pop_back();
    if (!line.empty()) prompts.push_back(line);
    begin = end + 1;
  }
  ROTUNDA_CHECK(!prompts.empty(), path, ": holds no prompt, expected one per line");
  return prompts;
}

std::vector<kv::KvSpec> joined_specs(const std::vector<std::string>& lists) {
  std::string text;
  for (const std::string& list : lists) text += (text.empty() ? "" : ",") + list;
  return kv::parse_kv_specs(text);
}

std::optional<std::filesystem::path> optional_path(const std::string& text) {
  if (text.empty()) return std::nullopt;
  return std::filesystem::path(text);
}

}  // namespace rotunda::cli
