#include "engine/step.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "base/check.h"
#include "engine/cache_decorator.h"

namespace rotunda::engine {

at::Tensor run_step(const model::CausalLm& model, kv::KvCache& cache, const std::vector<kv::SeqChunk>& chunks,
                    std::span<const int64_t> tokens, kv::StepKind kind, StopFlag stop) {
  int64_t n_tokens = 0;
  for (const kv::SeqChunk& chunk : chunks) n_tokens += chunk.n_tokens;
  ROTUNDA_ASSERT(n_tokens == static_cast<int64_t>(tokens.size()), "chunks hold ", n_tokens, " tokens, given ", tokens.size());
  if (stop_requested(stop)) throw Interrupted();

  at::Tensor ids = at::empty({n_tokens}, at::kLong);
  std::copy(tokens.begin(), tokens.end(), ids.mutable_data_ptr<int64_t>());
  cache.begin_step(chunks, kind);
  try {
    StoppableCache stoppable(cache, stop);
    at::Tensor hidden = model.forward(ids, stoppable);  // [T, hidden_size]
    cache.end_step();
    return hidden;
  } catch (...) {
    cache.abort_step();
    throw;
  }
}

at::Tensor run_prefill(const model::CausalLm& model, kv::KvCache& cache, kv::SeqId seq, std::span<const int64_t> tokens,
                       int64_t chunk_len, StopFlag stop) {
  ROTUNDA_ASSERT(!tokens.empty() && chunk_len > 0);
  const int64_t total_len = cache.kv_len(seq) + static_cast<int64_t>(tokens.size());
  std::vector<at::Tensor> parts;
  for (size_t begin = 0; begin < tokens.size();) {
    const size_t n = std::min(tokens.size() - begin, static_cast<size_t>(chunk_len));
    const kv::SeqChunk chunk{.seq = seq, .n_tokens = static_cast<int64_t>(n), .is_prompt = true, .rope_len = total_len};
    parts.push_back(run_step(model, cache, {chunk}, tokens.subspan(begin, n), kv::StepKind::kGenerate, stop));
    begin += n;
  }
  return parts.size() == 1 ? parts.front() : at::cat(parts);
}

kv::KvUsage usage_of_distinct(const kv::KvCache& cache, int64_t distinct_tokens) {
  kv::KvUsage usage = cache.usage();
  usage.elements = 2 * distinct_tokens * cache.model().kv_channels() * cache.model().n_layers;
  return usage;
}

void UsageTally::add(const kv::KvUsage& usage) {
  sum_bytes_ += static_cast<double>(usage.cache_bytes());
  sum_elements_ += static_cast<double>(usage.elements);
  max_bytes_ = std::max(max_bytes_, usage.cache_bytes());
}

double UsageTally::bits_per_element() const { return sum_elements_ == 0.0 ? 0.0 : 8.0 * sum_bytes_ / sum_elements_; }

}  // namespace rotunda::engine
