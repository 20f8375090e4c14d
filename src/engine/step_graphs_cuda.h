#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/control.h"
#include "engine/sampling.h"
#include "kv/kv_cache.h"
#include "model/causal_lm.h"

namespace rotunda::engine {

/// Decode steps on a GPU whole: model, logits and sampling. From the second step of a batch size on they are recorded as a CUDA graph and
/// replayed, one launch instead of some hundreds, for as long as the cache allows (KvCache::graph_epoch). The host waits once a step, for
/// the ids.
class StepGraphs {
 public:
  /// All are kept by reference.
  StepGraphs(const model::CausalLm& model, kv::KvCache& cache, const SamplingOptions& sampling);
  ~StepGraphs();

  /// One step of one token for each chunk; an exception on the way leaves the cache as it was.
  /// @param tokens  [chunks.size()] checked ids
  /// @param draws   [chunks.size()] Sampler::draw() of each sequence; empty where sampling is greedy
  /// @return the next token of each   @throws Interrupted where `stop` was set; what cache, model and checked_ids() throw
  std::vector<int64_t> run(const std::vector<kv::SeqChunk>& chunks, const std::vector<int64_t>& tokens, const std::vector<double>& draws,
                           StopFlag stop);

  /// Steps that were replayed.
  int64_t n_replayed() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rotunda::engine
