#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/control.h"
#include "kv/kv_cache.h"
#include "model/causal_lm.h"

namespace rotunda::engine {

/// One step whole: opens it, runs the model, closes it; an exception on the way leaves the cache as it was.
/// @param tokens  those of all chunks, one chunk after the other; as many as the chunks say
/// @return [T, hidden_size]   @throws Interrupted where `stop` was set, and whatever model and cache throw
at::Tensor run_step(const model::CausalLm& model, kv::KvCache& cache, const std::vector<kv::SeqChunk>& chunks,
                    std::span<const int64_t> tokens, kv::StepKind kind, StopFlag stop);

/// Appends a prompt to one sequence, `chunk_len` tokens a step, as generation does.
/// @return [n, hidden_size] of all its tokens, n = tokens.size() > 0
at::Tensor run_prefill(const model::CausalLm& model, kv::KvCache& cache, kv::SeqId seq, std::span<const int64_t> tokens,
                       int64_t chunk_len, StopFlag stop);

/// Releases a sequence at the end of its scope. Neither copied nor moved.
class SequenceGuard {
 public:
  SequenceGuard(kv::KvCache& cache, kv::SeqId seq) : cache_(cache), seq_(seq) {}
  ~SequenceGuard() { cache_.release(seq_); }
  SequenceGuard(const SequenceGuard&) = delete;
  SequenceGuard& operator=(const SequenceGuard&) = delete;
  kv::SeqId id() const { return seq_; }

 private:
  kv::KvCache& cache_;
  kv::SeqId seq_;
};

/// The usage of a cache whose sequences share tokens through forks, with those counted once among the elements too.
kv::KvUsage usage_of_distinct(const kv::KvCache& cache, int64_t distinct_tokens);

/// Sums up what caches of many items took.
class UsageTally {
 public:
  void add(const kv::KvUsage& usage);
  /// Over all items: bits of all their bytes by all their elements; 0 where nothing was added.
  double bits_per_element() const;
  /// Of the largest item.
  int64_t cache_bytes() const { return max_bytes_; }

 private:
  double sum_bytes_ = 0.0;
  double sum_elements_ = 0.0;
  int64_t max_bytes_ = 0;
};

}  // namespace rotunda::engine
