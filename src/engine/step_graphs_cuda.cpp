#include "engine/step_graphs_cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/GradMode.h>
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "base/check.h"
#include "engine/batch_sampling.h"
#include "engine/cache_decorator.h"

namespace rotunda::engine {

namespace {

// A graph holds its launches' memory; batches shrink one by one, and the sizes passed by do not come back.
constexpr size_t kMaxGraphs = 8;

// Nothing can be recorded on the default stream. Steps that are not recorded run here too: they warm up what recording needs. One stream
// a GPU for all, since cuBLAS keeps a workspace of some MiB for every stream that it has seen.
c10::cuda::CUDAStream step_stream(at::Device device) {
  static std::mutex mutex;
  static std::map<at::DeviceIndex, c10::cuda::CUDAStream> streams;
  const std::lock_guard lock(mutex);
  const auto found = streams.find(device.index());
  if (found != streams.end()) return found->second;
  return streams.emplace(device.index(), c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())).first->second;
}

// What steps of one batch size read and write: the addresses stay.
struct Buffers {
  Buffers(int64_t n, at::Device device)
      : host_tokens(at::empty({n}, at::TensorOptions().dtype(at::kLong).pinned_memory(true))),
        host_draws(at::empty({n}, at::TensorOptions().dtype(at::kDouble).pinned_memory(true))),
        host_ids(at::empty({n}, at::TensorOptions().dtype(at::kLong).pinned_memory(true))),
        tokens(at::empty({n}, at::TensorOptions().dtype(at::kLong).device(device))),
        draws(at::empty({n}, at::TensorOptions().dtype(at::kDouble).device(device))),
        ids(at::empty({n}, at::TensorOptions().dtype(at::kLong).device(device))) {}

  // Queues the copies of this step's inputs.
  void upload(const std::vector<int64_t>& new_tokens, const std::vector<double>& new_draws) {
    std::copy(new_tokens.begin(), new_tokens.end(), host_tokens.mutable_data_ptr<int64_t>());
    tokens.copy_(host_tokens, /*non_blocking=*/true);
    if (new_draws.empty()) return;
    std::copy(new_draws.begin(), new_draws.end(), host_draws.mutable_data_ptr<double>());
    draws.copy_(host_draws, /*non_blocking=*/true);
  }

  at::Tensor host_tokens, host_draws, host_ids;  // pinned
  at::Tensor tokens, draws, ids;
};

struct Recorded {
  Recorded(int64_t n, at::Device device) : buffers(n, device) {}
  Buffers buffers;
  uint64_t epoch = 0;       // of the cache when the graph was recorded; 0: not recorded yet
  uint64_t warm_epoch = 0;  // of the last step that ran launch by launch, to its end
  std::unique_ptr<at::cuda::CUDAGraph> graph;
  int64_t last_used = 0;
};

}  // namespace

struct StepGraphs::State {
  State(const model::CausalLm& of_model, kv::KvCache& of_cache, const SamplingOptions& options)
      : model(of_model),
        cache(of_cache),
        sampling(options),
        device(of_model.info().kv.device),
        stream(step_stream(device)) {}

  Recorded& of_size(size_t n) {
    const auto found = by_size.find(n);
    if (found != by_size.end()) return found->second;
    if (by_size.size() == kMaxGraphs) {
      by_size.erase(std::min_element(by_size.begin(), by_size.end(),
                                     [](const auto& a, const auto& b) { return a.second.last_used < b.second.last_used; }));
    }
    return by_size.try_emplace(n, static_cast<int64_t>(n), device).first->second;
  }

  // Everything of a step that runs on the GPU, out of and into the buffers.
  void launch(const Buffers& buffers, kv::KvCache& through) const {
    const at::Tensor hidden = model.forward(buffers.tokens, through);
    at::Tensor ids = buffers.ids;
    ids.copy_(sample_rows(model.logits(hidden), sampling, buffers.draws));
  }

  // Records the open step; what it would do is done by the replay.
  void record(Recorded& recorded, uint64_t epoch) const {
    recorded.epoch = 0;
    recorded.graph = std::make_unique<at::cuda::CUDAGraph>();
    stream.synchronize();
    // While it records, LibTorch's allocator gives nothing back that it keeps for reuse.
    c10::cuda::CUDACachingAllocator::emptyCache();
    // Of this thread alone: others may allocate meanwhile.
    // Each into a pool of its own: one that its last graph has left cannot be recorded into again.
    recorded.graph->capture_begin(at::cuda::graph_pool_handle(), cudaStreamCaptureModeThreadLocal);
    try {
      launch(recorded.buffers, cache);
    } catch (...) {
      // The stream must leave its recording whatever went wrong; the first error is the one to tell.
      try {
        recorded.graph->capture_end();
      } catch (const c10::Error&) {
      }
      recorded.graph.reset();
      throw;
    }
    recorded.graph->capture_end();
    recorded.epoch = epoch;
  }

  const model::CausalLm& model;
  kv::KvCache& cache;
  const SamplingOptions sampling;
  const at::Device device;
  const c10::cuda::CUDAStream stream;
  c10::cuda::CUDAEvent before;
  std::map<size_t, Recorded> by_size;
  int64_t n_steps = 0;
  int64_t n_replayed = 0;
};

StepGraphs::StepGraphs(const model::CausalLm& model, kv::KvCache& cache, const SamplingOptions& sampling)
    : state_(std::make_unique<State>(model, cache, sampling)) {}

StepGraphs::~StepGraphs() = default;

int64_t StepGraphs::n_replayed() const { return state_->n_replayed; }

std::vector<int64_t> StepGraphs::run(const std::vector<kv::SeqChunk>& chunks, const std::vector<int64_t>& tokens,
                                     const std::vector<double>& draws, StopFlag stop) {
  State& s = *state_;
  ROTUNDA_ASSERT(!chunks.empty() && tokens.size() == chunks.size() && (s.sampling.temperature == 0.0 || draws.size() == chunks.size()),
                 chunks.size(), " chunks, ", tokens.size(), " tokens, ", draws.size(), " draws");
  if (stop_requested(stop)) throw Interrupted();
  const c10::NoGradGuard no_grad;
  // What the caller has launched, a prompt's packing perhaps, comes first.
  s.before.record(c10::cuda::getCurrentCUDAStream(s.device.index()));
  s.before.block(s.stream);
  const c10::cuda::CUDAStreamGuard guard(s.stream);
  Recorded& recorded = s.of_size(chunks.size());
  recorded.last_used = ++s.n_steps;

  s.cache.begin_step(chunks, kv::StepKind::kGenerate);
  try {
    recorded.buffers.upload(tokens, draws);
    const uint64_t epoch = s.cache.graph_epoch();
    const bool warm = recorded.warm_epoch == epoch || recorded.epoch == epoch;
    if (warm && epoch != 0) {
      if (recorded.epoch != epoch) s.record(recorded, epoch);
      recorded.graph->replay();
      ++s.n_replayed;
    } else {
      StoppableCache stoppable(s.cache, stop);
      s.launch(recorded.buffers, stoppable);
      recorded.warm_epoch = epoch;
    }
    recorded.buffers.host_ids.copy_(recorded.buffers.ids, /*non_blocking=*/true);
    s.cache.end_step();
  } catch (...) {
    // What was launched still runs, and who goes on from here does so on another stream. An error of the GPU is in flight already.
    static_cast<void>(cudaStreamSynchronize(s.stream));
    s.cache.abort_step();
    throw;
  }
  s.stream.synchronize();
  return checked_ids(recorded.buffers.host_ids);
}

}  // namespace rotunda::engine
