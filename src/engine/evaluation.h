#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/control.h"
#include "engine/kv_binding.h"

namespace rotunda::engine {

/// How keys and values are seen while a text is scored.
enum class Protocol {
  kQuantizeAll,  ///< every token attends to the stored form of everything, its own key and value too, but for what the spec keeps
  kDeploy,       ///< as generation runs: prompts in chunks, answers token by token
};
/// "quantize-all" or "deploy". @throws Error{kUser} listing both.
Protocol parse_protocol(const std::string& text);
const char* to_string(Protocol protocol);

/// What every evaluation takes.
struct EvalOptions {
  std::vector<kv::KvSpec> specs;  ///< caches to compare, at least one
  Protocol protocol = Protocol::kQuantizeAll;
  std::optional<std::filesystem::path> calibration_file;
  int64_t limit = 0;            ///< items (or windows) at most; 0: all
  int64_t prefill_chunk = 512;  ///< deploy: tokens of a prompt in one step
  Progress progress;
  StopFlag stop = nullptr;
};

/// What every evaluation says of one spec.
struct EvalResult {
  kv::KvSpec requested;
  kv::KvSpec used;
  int64_t items = 0;             ///< scored: windows, answers, questions
  int64_t tokens = 0;            ///< run through the model
  double bits_per_element = 0.0; ///< over the caches of all items as they were at their end
  int64_t cache_bytes = 0;       ///< of the largest
  double tok_s = 0.0;
};

/// Accuracy over items that are right or wrong.
struct AccuracyResult : EvalResult {
  double accuracy = 0.0;
  double accuracy_stderr = 0.0;
  std::optional<double> accuracy_norm;  ///< choices: by log-likelihood per byte of the choice
  double accuracy_norm_stderr = 0.0;
  std::vector<bool> correct;            ///< by item
};

struct AccuracyReport {
  std::vector<AccuracyResult> results;  ///< one per spec, in the order asked for
  bool interrupted = false;             ///< stopped early; the results cover the items done by then
};

/// What one cache made of one item.
struct ItemOutcome {
  bool correct = false;
  std::optional<bool> correct_norm;
  int64_t tokens = 0;   ///< run through the model
  kv::KvUsage usage;    ///< of the item's sequences at their end
};

/// Runs items one after the other, each through every spec's cache. `run_item` leaves the cache without sequences of its own.
/// An item counts for all specs or for none.
/// @throws Interrupted where a stop came before the first item was done, and what `run_item` throws.
AccuracyReport run_items(const std::vector<KvBinding>& bindings, const EvalOptions& options, const std::string& stage,
                         int64_t n_items,
                         const std::function<ItemOutcome(const KvBinding&, kv::KvCache&, int64_t item)>& run_item);

/// Binds every spec. Models share what their formats do not fuse.
std::vector<KvBinding> bind_all(const Session& session, const EvalOptions& options);

}  // namespace rotunda::engine
