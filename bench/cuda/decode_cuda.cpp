// Whole decode steps, or with --prefill whole prompts, on a GPU: a model of a known shape with random weights, over a cache filled with
// random keys and values. Every cache format at every batch size, and, with --largest, at the largest batch that fits the memory and at the one that all formats hold. Steps
// are timed as a user has them, by the clock of the host, from the tokens in to the next tokens out. Prints a table; --json FILE writes
// everything.
//
//   decode_cuda [--shape llama3-8b] [--dtype bf16] [--kv bf16,rotunda2] [--context 4096] [--batch 1,8] [--largest] [--steps 64]
//               [--prefill] [--chunk 4096] [--memory 0.9] [--json FILE]

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/check.h"
#include "engine/kv_binding.h"
#include "engine/step.h"
#include "engine/step_graphs_cuda.h"
#include "kv/kv_registry.h"
#include "model/decoder/decoder_lm.h"
#include "ops/device.h"

namespace rotunda::bench {
namespace {

using Json = nlohmann::json;

model::DecoderConfig shape_of(const std::string& name) {
  model::DecoderConfig config;
  config.architecture = "LlamaForCausalLM";
  config.head_dim = 128;
  config.rms_norm_eps = 1e-5;
  config.max_position_embeddings = 131072;
  if (name == "llama3-8b") {
    config.vocab_size = 128256;
    config.hidden_size = 4096;
    config.intermediate_size = 14336;
    config.n_layers = 32;
    config.n_heads = 32;
    config.n_kv_heads = 8;
    config.rope.theta = 500000.0;
  } else {
    ROTUNDA_CHECK(name == "llama2-13b", "--shape: got '", name, "', expected llama3-8b or llama2-13b");
    config.vocab_size = 32000;
    config.hidden_size = 5120;
    config.intermediate_size = 13824;
    config.n_layers = 40;
    config.n_heads = 40;
    config.n_kv_heads = 40;
  }
  config.rope.head_dim = config.head_dim;
  return config;
}

struct Options {
  std::string shape = "llama3-8b";
  std::string dtype = "bf16";
  std::string kv = "bf16,rotunda2";
  std::vector<int64_t> batches = {1};
  int64_t context = 4096;
  int64_t steps = 64;
  int64_t chunk = 4096;
  bool largest = false;
  bool prefill = false;
  double memory = 0.9;
  std::string json;
};

constexpr int64_t kActivationBytes = int64_t{2} << 30;  // kept free beside weights and cache for what a step needs

// One layer's random keys, values and queries.
kv::AttendInput random_input(const kv::KvModel& model, int64_t n_tokens) {
  const at::TensorOptions options = at::TensorOptions().dtype(model.dtype).device(model.device);
  kv::AttendInput in;
  in.q = at::randn({n_tokens, model.n_heads, model.head_dim}, options);
  in.k = at::randn({n_tokens, model.n_kv_heads, model.head_dim}, options);
  in.v = at::randn({n_tokens, model.n_kv_heads, model.head_dim}, options);
  in.hidden = at::randn({n_tokens, model.hidden_size}, options);
  return in;
}

// What engine::bind_kv does, with random keys to calibrate on where the format cannot do without.
engine::KvBinding bind_model(const std::shared_ptr<const model::CausalLm>& model, const kv::KvSpec& spec) {
  const kv::KvModel& kv_model = model->info().kv;
  engine::KvBinding binding;
  binding.requested = spec;
  binding.format = &kv::kv_registry().get(spec);
  binding.used = binding.format->with_defaults(spec);
  binding.format->validate(binding.used);
  const auto reason = binding.format->unsupported_reason(binding.used, kv_model);
  ROTUNDA_CHECK(!reason, "--kv ", spec.to_string(), ": ", reason.value_or(""));
  if (binding.format->calibration_use(binding.used) == kv::CalibrationUse::kRequired) {
    const auto calibrator = binding.format->make_calibrator(kv_model);
    for (int layer = 0; layer < kv_model.n_layers; ++layer) calibrator->observe(layer, random_input(kv_model, 512));
    binding.calibration = calibrator->finish();
    binding.setup = *binding.calibration;
  }
  binding.used = binding.format->resolved(binding.used, kv_model, binding.calibration ? &*binding.calibration : nullptr);
  binding.model = model->with_kv_format(*binding.format, binding.used, binding.setup);
  return binding;
}

struct Row {
  std::string kv;
  int64_t batch = 0;
  double step_ms = 0.0, low_ms = 0.0, high_ms = 0.0;  // median; a tenth of the steps lies below and above
  double fill_s = 0.0;
  int64_t replayed = 0;
  int64_t cache_bytes = 0;
  int64_t peak_bytes = 0;  // of all tensors, weights too
  double tok_s() const { return 1e3 * static_cast<double>(batch) / step_ms; }
};

// Chunks of random keys and values through the cache alone, as long as the context.
void fill(kv::KvCache& cache, kv::SeqId seq, const Options& options) {
  for (int64_t begin = 0; begin < options.context; begin += options.chunk) {
    const int64_t n = std::min(options.chunk, options.context - begin);
    cache.begin_step({{.seq = seq, .n_tokens = n, .is_prompt = true, .rope_len = options.context}});
    try {
      for (int layer = 0; layer < cache.model().n_layers; ++layer) cache.attend(layer, random_input(cache.model(), n));
      cache.end_step();
    } catch (...) {
      cache.abort_step();
      throw;
    }
  }
}

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

Row measure(const engine::KvBinding& binding, int64_t batch, const Options& options) {
  const kv::KvModel& kv_model = binding.model->info().kv;
  c10::cuda::CUDACachingAllocator::emptyCache();
  c10::cuda::CUDACachingAllocator::resetPeakStats(kv_model.device.index());
  Row row;
  row.kv = binding.requested.to_string();
  row.batch = batch;
  const auto cache = binding.make_cache();
  std::vector<kv::SeqChunk> chunks;
  const auto start = Clock::now();
  for (int64_t i = 0; i < batch; ++i) {
    chunks.push_back({.seq = cache->create(), .n_tokens = 1, .is_prompt = false, .rope_len = 0});
    fill(*cache, chunks.back().seq, options);
  }
  ops::synchronize(kv_model.device);
  row.fill_s = seconds_since(start);

  engine::StepGraphs graphs(*binding.model, *cache, {});
  std::vector<int64_t> tokens(static_cast<size_t>(batch), 1);
  constexpr int kWarmUp = 4;  // eager, recording, and two replays
  for (int i = 0; i < kWarmUp; ++i) tokens = graphs.run(chunks, tokens, {}, nullptr);
  std::vector<double> ms;
  for (int64_t i = 0; i < options.steps; ++i) {
    const auto step_start = Clock::now();
    tokens = graphs.run(chunks, tokens, {}, nullptr);
    ms.push_back(1e3 * seconds_since(step_start));
  }
  std::sort(ms.begin(), ms.end());
  row.step_ms = ms[ms.size() / 2];
  row.low_ms = ms[ms.size() / 10];
  row.high_ms = ms[ms.size() - 1 - ms.size() / 10];
  row.replayed = graphs.n_replayed();
  row.cache_bytes = cache->usage().cache_bytes();
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(kv_model.device.index());
  row.peak_bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  return row;
}

// A prompt as long as the context, through model and cache, of one sequence after the other: the first one warms up.
Row measure_prefill(const engine::KvBinding& binding, const Options& options) {
  const kv::KvModel& kv_model = binding.model->info().kv;
  Row row;
  row.kv = binding.requested.to_string();
  row.batch = 1;
  const auto cache = binding.make_cache();
  const std::vector<int64_t> tokens(static_cast<size_t>(options.context), 1);
  std::vector<double> ms;
  constexpr int kRuns = 6;
  for (int run = 0; run < kRuns; ++run) {
    const engine::SequenceGuard seq(*cache, cache->create());
    ops::synchronize(kv_model.device);
    const auto start = Clock::now();
    const at::Tensor hidden = engine::run_prefill(*binding.model, *cache, seq.id(), tokens, options.chunk, nullptr);
    binding.model->logits(hidden.narrow(0, hidden.size(0) - 1, 1));
    ops::synchronize(kv_model.device);
    if (run > 0) ms.push_back(1e3 * seconds_since(start));
    row.cache_bytes = cache->usage().cache_bytes();
  }
  std::sort(ms.begin(), ms.end());
  row.step_ms = ms[ms.size() / 2];
  row.low_ms = ms.front();
  row.high_ms = ms.back();
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(kv_model.device.index());
  row.peak_bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  return row;
}

// The batch that planned bytes let fit, at most.
int64_t planned_batch(const engine::KvBinding& binding, const Options& options) {
  const kv::KvModel& kv_model = binding.model->info().kv;
  const int64_t of_one = binding.format->planned_bytes(binding.used, kv_model, options.context + options.steps + 8);
  const int64_t available = ops::available_memory_bytes(kv_model.device, kv_model.device_budget_bytes) - kActivationBytes;
  return std::max<int64_t>(0, available / of_one);
}

void print(const Row& row, const Row* first) {
  const std::string speed = first == nullptr ? "" : std::to_string(first->step_ms / row.step_ms).substr(0, 5) + "x";
  std::printf("%-28s %6lld %9.3f %9.3f %9.3f %11.1f %8s %10.3f %10.3f %8.1f %9lld\n", row.kv.c_str(),
              static_cast<long long>(row.batch), row.step_ms, row.low_ms, row.high_ms, row.tok_s(), speed.c_str(),
              1e-9 * static_cast<double>(row.cache_bytes), 1e-9 * static_cast<double>(row.peak_bytes), row.fill_s,
              static_cast<long long>(row.replayed));
  std::fflush(stdout);
}

Json json_of(const Row& row) {
  return {{"kv", row.kv},           {"batch", row.batch},           {"step_ms", row.step_ms},       {"low_ms", row.low_ms},
          {"high_ms", row.high_ms}, {"tok_s", row.tok_s()},         {"cache_bytes", row.cache_bytes}, {"peak_bytes", row.peak_bytes},
          {"fill_s", row.fill_s},   {"replayed_steps", row.replayed}};
}

int run(int argc, char** argv) {
  CLI::App app("Whole decode steps of a model with random weights on a GPU.", "decode_cuda");
  Options options;
  app.add_option("--shape", options.shape, "llama3-8b or llama2-13b")->capture_default_str();
  app.add_option("--dtype", options.dtype, "bf16 or fp16")->capture_default_str();
  app.add_option("--kv", options.kv, "Cache formats: SPEC[,SPEC...]; the first is what the others are compared with")
      ->capture_default_str();
  app.add_option("--batch", options.batches, "Batch sizes, comma-separated")->delimiter(',')->capture_default_str();
  app.add_option("--context", options.context, "Cached tokens of each sequence before the first step")->capture_default_str();
  app.add_option("--steps", options.steps, "Steps timed")->capture_default_str();
  app.add_option("--chunk", options.chunk, "Tokens of a chunk when the cache is filled")->capture_default_str();
  app.add_flag("--largest", options.largest, "Also the largest batch of each format, and the first format's largest for all");
  app.add_flag("--prefill", options.prefill, "Prompts of --context tokens, --chunk at a time, instead of decode steps");
  app.add_option("--memory", options.memory, "Share of the GPU's memory that weights and cache may take")
      ->capture_default_str();
  app.add_option("--json", options.json, "Write everything to this file");
  CLI11_PARSE(app, argc, argv);
  const c10::NoGradGuard no_grad;
  ROTUNDA_CHECK(options.dtype == "bf16" || options.dtype == "fp16", "--dtype: got '", options.dtype, "', expected bf16 or fp16");
  ROTUNDA_CHECK(options.context > 0 && options.steps > 0 && options.chunk > 0, "--context, --steps and --chunk: expected 1 or more");

  model::CausalLmOptions load;
  load.device = ops::parse_device("cuda");
  ops::require_device(load.device);
  load.dtype = options.dtype == "bf16" ? at::kBFloat16 : at::kHalf;
  load.device_budget_bytes = static_cast<int64_t>(options.memory * static_cast<double>(ops::total_memory_bytes(load.device)));
  const model::DecoderConfig config = shape_of(options.shape);
  const model::CausalLmInfo info = model::decoder_info(config, {}, load);
  std::printf("%s: %s with random %s weights (%.3f GB), context %lld\n", ops::device_name(load.device).c_str(), options.shape.c_str(),
              options.dtype.c_str(), 1e-9 * static_cast<double>(info.weights_bytes()), static_cast<long long>(options.context));
  std::printf("%-28s %6s %9s %9s %9s %11s %8s %10s %10s %8s %9s\n", "kv", "batch", "step ms", "10 %", "90 %", "tokens/s", "speed",
              "cache GB", "peak GB", "fill s", "replayed");

  Json results = Json::array();
  std::map<int64_t, Row> first_at;  // the first format's rows by batch
  int64_t first_largest = 0;
  const std::vector<kv::KvSpec> specs = kv::parse_kv_specs(options.kv);
  for (size_t s = 0; s < specs.size(); ++s) {
    // Made anew for each format, the same each time: what a format has fused then stands for the originals, not beside them.
    at::manual_seed(1);
    const engine::KvBinding binding = bind_model(model::make_random_decoder_lm(config, load), specs[s]);
    if (options.prefill) {
      const Row row = measure_prefill(binding, options);
      print(row, s == 0 ? nullptr : &first_at.at(1));
      results.push_back(json_of(row));
      if (s == 0) first_at.emplace(1, row);
      continue;
    }
    std::set<int64_t> batches(options.batches.begin(), options.batches.end());
    const int64_t most = planned_batch(binding, options);
    if (options.largest) {
      if (s == 0) first_largest = most;
      batches.insert(std::max<int64_t>(1, std::min(first_largest, most)));
      batches.insert(std::max<int64_t>(1, most));
    }
    for (const int64_t batch : batches) {
      try {
        const Row row = measure(binding, batch, options);
        const auto first = first_at.find(batch);
        print(row, first == first_at.end() ? nullptr : &first->second);
        results.push_back(json_of(row));
        if (s == 0) first_at.emplace(batch, row);
      } catch (const c10::Error& error) {  // no room for this batch; others may fit
        std::printf("%-28s %6lld %s\n", specs[s].to_string().c_str(), static_cast<long long>(batch), ops::as_error(error).what());
      } catch (const Error& error) {
        if (error.fault() != Fault::kWorld) throw;
        std::printf("%-28s %6lld %s\n", specs[s].to_string().c_str(), static_cast<long long>(batch), error.what());
      }
    }
  }
  if (!options.json.empty()) {
    const Json run = {{"device", ops::device_name(load.device)},
                      {"shape", options.shape},
                      {"dtype", options.dtype},
                      {"context", options.context},
                      {"steps", options.steps},
                      {"memory", options.memory},
                      {"budget_bytes", load.device_budget_bytes},
                      {"weights_bytes", info.weights_bytes()}};
    std::ofstream(options.json) << Json{{"run", run}, {"results", results}}.dump(2) << "\n";
  }
  return 0;
}

}  // namespace
}  // namespace rotunda::bench

int main(int argc, char** argv) {
  try {
    return rotunda::bench::run(argc, argv);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "decode_cuda: %s\n", rotunda::ops::as_error(error).what());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decode_cuda: %s\n", error.what());
    return 1;
  }
}
