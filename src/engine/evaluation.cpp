#include "engine/evaluation.h"

#include <chrono>

#include "base/check.h"
#include "engine/scoring.h"
#include "engine/step.h"

namespace rotunda::engine {

Protocol parse_protocol(const std::string& text) {
  if (text == "quantize-all") return Protocol::kQuantizeAll;
  ROTUNDA_CHECK(text == "deploy", "--protocol: got '", text, "', expected quantize-all or deploy");
  return Protocol::kDeploy;
}

const char* to_string(Protocol protocol) { return protocol == Protocol::kQuantizeAll ? "quantize-all" : "deploy"; }

std::vector<KvBinding> bind_all(const Session& session, const EvalOptions& options) {
  ROTUNDA_CHECK(!options.specs.empty(), "--kv: no cache named");
  ROTUNDA_CHECK(options.limit >= 0, "limit: got ", options.limit, ", expected 0 (all) or more");
  ROTUNDA_CHECK(options.prefill_chunk > 0, "--prefill-chunk: got ", options.prefill_chunk, ", expected 1 or more");
  std::vector<KvBinding> bindings;
  for (const kv::KvSpec& spec : options.specs) {
    bindings.push_back(bind_kv(session, spec, options.calibration_file, options.progress, options.stop));
  }
  return bindings;
}

AccuracyReport run_items(const std::vector<KvBinding>& bindings, const EvalOptions& options, const std::string& stage,
                         int64_t n_items,
                         const std::function<ItemOutcome(const KvBinding&, kv::KvCache&, int64_t item)>& run_item) {
  struct Gathered {
    RunningMean correct;
    RunningMean correct_norm;
    std::vector<bool> by_item;
    UsageTally usage;
    int64_t tokens = 0;
    double seconds = 0.0;
  };
  std::vector<Gathered> gathered(bindings.size());
  std::vector<std::unique_ptr<kv::KvCache>> caches;
  for (const KvBinding& binding : bindings) caches.push_back(binding.make_cache());

  AccuracyReport report;
  int64_t items_done = 0;
  try {
    for (; items_done < n_items; ++items_done) {
      std::vector<Gathered> next = gathered;
      for (size_t b = 0; b < bindings.size(); ++b) {
        if (stop_requested(options.stop)) throw Interrupted();
        const auto start = std::chrono::steady_clock::now();
        const ItemOutcome outcome = run_item(bindings[b], *caches[b], items_done);
        next[b].seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        next[b].tokens += outcome.tokens;
        next[b].usage.add(outcome.usage);
        next[b].correct.add(outcome.correct ? 1.0 : 0.0);
        next[b].by_item.push_back(outcome.correct);
        if (outcome.correct_norm) next[b].correct_norm.add(*outcome.correct_norm ? 1.0 : 0.0);
      }
      gathered = std::move(next);
      if (options.progress) options.progress(stage, items_done + 1, n_items);
    }
  } catch (const Interrupted&) {
    if (items_done == 0) throw;
    report.interrupted = true;
  }

  for (size_t b = 0; b < bindings.size(); ++b) {
    AccuracyResult result;
    result.requested = bindings[b].requested;
    result.used = bindings[b].used;
    result.items = items_done;
    result.tokens = gathered[b].tokens;
    result.bits_per_element = gathered[b].usage.bits_per_element();
    result.cache_bytes = gathered[b].usage.cache_bytes();
    result.tok_s = gathered[b].seconds > 0.0 ? static_cast<double>(result.tokens) / gathered[b].seconds : 0.0;
    result.accuracy = gathered[b].correct.mean();
    result.accuracy_stderr = gathered[b].correct.standard_error();
    result.correct = gathered[b].by_item;
    if (gathered[b].correct_norm.n() > 0) {
      result.accuracy_norm = gathered[b].correct_norm.mean();
      result.accuracy_norm_stderr = gathered[b].correct_norm.standard_error();
    }
    report.results.push_back(result);
  }
  return report;
}

}  // namespace rotunda::engine
