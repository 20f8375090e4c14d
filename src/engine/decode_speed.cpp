#include "engine/decode_speed.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "base/check.h"
#include "engine/step.h"
#ifdef ROTUNDA_CUDA
#include "engine/step_graphs_cuda.h"
#endif

namespace rotunda::engine {

double decode_tok_s(const KvBinding& binding, std::span<const int64_t> prompt, std::span<const int64_t> next,
                    int64_t prefill_chunk, StopFlag stop) {
  ROTUNDA_ASSERT(!next.empty());
  const auto cache = binding.make_cache();
  const kv::SeqId seq = cache->create();
  run_prefill(*binding.model, *cache, seq, prompt, prefill_chunk, stop);
  const kv::SeqChunk chunk{.seq = seq, .n_tokens = 1, .is_prompt = false, .rope_len = 0};
#ifdef ROTUNDA_CUDA
  std::unique_ptr<StepGraphs> graphs;
  if (binding.model->info().kv.device.is_cuda()) graphs = std::make_unique<StepGraphs>(*binding.model, *cache, SamplingOptions{});
#endif
  // As generation runs it.
  const auto step = [&](size_t i) {
#ifdef ROTUNDA_CUDA
    if (graphs) {
      graphs->run({chunk}, {next[i]}, {}, stop);
      return;
    }
#endif
    binding.model->logits(run_step(*binding.model, *cache, {chunk}, next.subspan(i, 1), kv::StepKind::kGenerate, stop));
  };
  std::vector<double> seconds;
  for (size_t i = 0; i < next.size(); ++i) {
    const auto start = std::chrono::steady_clock::now();
    step(i);
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  const auto median = seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), median, seconds.end());
  return 1.0 / *median;
}

}  // namespace rotunda::engine
