#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/output.h"
#include "app/cli/report.h"
#include "app/cli/table.h"
#include "base/check.h"
#include "engine/kv_binding.h"
#include "ops/device.h"

namespace rotunda::cli {

namespace {

// A cache longer than this is not a matter of memory any more.
constexpr int64_t kLongestContext = int64_t{1} << 31;

struct Arguments {
  ModelArguments model;
  int64_t kv_len = 0;
  std::string json;
};

std::string describe(const model::CausalLmInfo& info, const std::string& dtype, int64_t weights_bytes) {
  const kv::KvModel& kv = info.kv;
  return concat("architecture     ", info.architecture, "\n",
                "parameters       ", grouped(info.n_parameters), " (", human_bytes(weights_bytes), " in ", dtype, ")\n",
                "layers           ", kv.n_layers, ", hidden ", kv.hidden_size, ", ffn ", info.intermediate_size, "\n",
                "attention        ", kv.n_heads, " heads, ", kv.n_kv_heads, " key/value heads of ", kv.head_dim,
                kv.sliding_window > 0 ? concat(", sliding window ", kv.sliding_window) : "", "\n",
                "vocabulary       ", grouped(info.vocab_size), info.tied_embeddings ? " (embeddings tied)" : "", "\n",
                "trained context  ", grouped(info.max_position_embeddings), " tokens\n");
}

int run_info(const Arguments& arguments, const CLI::App& command) {
  ROTUNDA_CHECK(arguments.kv_len >= 0 && arguments.kv_len <= kLongestContext, "--kv-len: got ", arguments.kv_len,
                ", expected 1 to ", kLongestContext);
  if (!arguments.json.empty()) check_writable(arguments.json);
  const model::CausalLmOptions placement = arguments.model.placement();
  const model::CausalLmInfo info = model::read_causal_lm_info(arguments.model.model_dir, placement);
  const int64_t weights_bytes = info.weights_bytes();
  const int64_t available = ops::available_memory_bytes(placement.device, placement.device_budget_bytes);
  const int64_t kv_len = arguments.kv_len > 0 ? arguments.kv_len : info.max_position_embeddings;
  write_stdout(describe(info, arguments.model.dtype, weights_bytes) +
               concat("device           ", ops::device_name(placement.device), "\nmemory           ", human_bytes(available), " available, ", human_bytes(std::max<int64_t>(0, available - weights_bytes)),
                      " after the weights\n\n"));

  Table table({"cache", "bytes/token", "bits/element", concat("at ", grouped(kv_len), " tokens"), "longest context that fits"});
  Json results = Json::array();
  const double elements = 2.0 * info.kv.kv_channels() * info.kv.n_layers;
  for (const auto& format : kv::kv_registry().all()) {
    const kv::KvSpec spec = format->with_defaults({.format = format->name(), .options = {}, .parts = {}});
    if (const auto reason = format->unsupported_reason(spec, info.kv)) {
      table.add_row({format->name(), "-", "-", "-", *reason});
      results.push_back({{"kv_used", spec.to_string()}, {"unsupported", *reason}});
      continue;
    }
    const int64_t bytes = format->planned_bytes(spec, info.kv, kv_len);
    const double bytes_per_token = static_cast<double>(bytes) / static_cast<double>(kv_len);
    const int64_t longest = engine::longest_kv_len(*format, spec, info.kv, available - weights_bytes, kLongestContext);
    table.add_row({format->name(), fixed(bytes_per_token, 1), fixed(8.0 * bytes_per_token / elements, 3), human_bytes(bytes),
                   grouped(longest)});
    results.push_back({{"kv_used", spec.to_string()},
                       {"kv_len", kv_len},
                       {"bytes_per_token", bytes_per_token},
                       {"bits_per_element", 8.0 * bytes_per_token / elements},
                       {"cache_bytes", bytes},
                       {"longest_context", longest}});
  }
  print(table);
  Json run = run_json(command);
  run["architecture"] = info.architecture;
  run["n_parameters"] = info.n_parameters;
  run["max_position_embeddings"] = info.max_position_embeddings;
  run["available_memory_bytes"] = available;
  write_report(arguments.json, run, results);
  return 0;
}

}  // namespace

void add_info(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("info", "A model's shape, and what each cache format takes for it");
  const auto arguments = std::make_shared<Arguments>();
  arguments->model.add_to(*command);
  command->add_option("--kv-len", arguments->kv_len, "Cached tokens to reckon with; 0: the trained context")->capture_default_str();
  command->add_option("--json", arguments->json, "Write the same to this file");
  command->footer("Reads config.json alone.\nExample:\n  rotunda info models/tiny-gqa --kv-len 32768");
  command->callback([arguments, command, &run] { run = [=] { return run_info(*arguments, *command); }; });
}

}  // namespace rotunda::cli
