// The engine on a GPU: the model against the CPU, recorded steps against steps launch by launch, sampling, errors.

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/batch_sampling.h"
#include "engine/generate.h"
#include "engine/session.h"
#include "engine/step.h"
#include "engine/step_graphs_cuda.h"
#include "kernels/skip_without_gpu.h"
#include "ops/device.h"

namespace rotunda::engine {
namespace {

const char* const kModel = ROTUNDA_SOURCE_DIR "/models/tiny-gqa";

class StepGraphsGpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ROTUNDA_SKIP_WITHOUT_GPU();
  }

  static Session session_on(const char* device, at::ScalarType dtype = at::kFloat) {
    SessionOptions options;
    options.model_dir = kModel;
    options.dtype = dtype;
    options.device = ops::parse_device(device);
    return load_session(options);
  }
  static KvBinding bind(const Session& session, const std::string& kv) {
    return bind_kv(session, kv::parse_kv_spec(kv), std::nullopt, {}, nullptr);
  }
  static std::vector<int64_t> prompt(size_t n, int64_t first = 5) {
    std::vector<int64_t> ids;
    for (size_t i = 0; i < n; ++i) ids.push_back((first + static_cast<int64_t>(i) * 37) % 8000);
    return ids;
  }
};

// fp32 on both: products summed in another order, 8 layers; attention on a GPU rounds queries and probabilities to two halves each.
TEST_F(StepGraphsGpuTest, LogitsEqualThoseOfTheCpu) {
  std::vector<at::Tensor> logits;
  for (const char* device : {"cpu", "cuda"}) {
    const Session session = session_on(device);
    const KvBinding binding = bind(session, "fp16");
    const auto cache = binding.make_cache();
    const kv::SeqId seq = cache->create();
    const at::Tensor hidden = run_prefill(*binding.model, *cache, seq, prompt(200), 128, nullptr);
    logits.push_back(binding.model->logits(hidden).to(at::kCPU).to(at::kDouble));
    const std::vector<int64_t> next = {17};
    const at::Tensor decoded =
        run_step(*binding.model, *cache, {{.seq = seq, .n_tokens = 1}}, next, kv::StepKind::kGenerate, nullptr);
    logits.push_back(binding.model->logits(decoded).to(at::kCPU).to(at::kDouble));
  }
  for (size_t i = 0; i < 2; ++i) {
    const at::Tensor error = logits[i + 2] - logits[i];
    EXPECT_LT(error.norm().item<double>() / logits[i].norm().item<double>(), 2e-3) << (i == 0 ? "prefill" : "decode");
  }
}

// Sequences leave the batch; sizes come back; pages fill up on the way.
TEST_F(StepGraphsGpuTest, RecordedStepsEqualStepsLaunchByLaunch) {
  const Session session = session_on("cuda", at::kBFloat16);
  for (const char* kv : {"bf16", "rotunda2"}) {
    SCOPED_TRACE(kv);
    const KvBinding binding = bind(session, kv);
    const auto recorded = binding.make_cache();
    const auto eager = binding.make_cache();
    StepGraphs graphs(*binding.model, *recorded, {});
    std::vector<std::pair<kv::SeqId, kv::SeqId>> seqs;
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < 3; ++i) {
      seqs.emplace_back(recorded->create(), eager->create());
      const std::vector<int64_t> ids = prompt(static_cast<size_t>(20 + 50 * i), i);
      run_prefill(*binding.model, *recorded, seqs.back().first, ids, 64, nullptr);
      run_prefill(*binding.model, *eager, seqs.back().second, ids, 64, nullptr);
      tokens.push_back(100 + i);
    }
    for (int step = 0; step < 150; ++step) {
      const size_t n = step < 60 || step >= 120 ? 3 : 2;
      std::vector<kv::SeqChunk> chunks, eager_chunks;
      for (size_t i = 0; i < n; ++i) {
        chunks.push_back({.seq = seqs[i].first, .n_tokens = 1});
        eager_chunks.push_back({.seq = seqs[i].second, .n_tokens = 1});
      }
      const std::vector<int64_t> in(tokens.begin(), tokens.begin() + static_cast<int64_t>(n));
      const std::vector<int64_t> ids = graphs.run(chunks, in, {}, nullptr);
      const at::Tensor hidden = run_step(*binding.model, *eager, eager_chunks, in, kv::StepKind::kGenerate, nullptr);
      ASSERT_EQ(ids, checked_ids(sample_rows(binding.model->logits(hidden), {}, {}))) << "step " << step;
      std::copy(ids.begin(), ids.end(), tokens.begin());
    }
    EXPECT_NE(recorded->graph_epoch(), 0u);
    EXPECT_GT(graphs.n_replayed(), 100);
  }
}

// Tables and masks grow on the way, so graphs are recorded anew, one after the other has gone.
TEST_F(StepGraphsGpuTest, RecordsAnewWhereTheCacheHasGrown) {
  const Session session = session_on("cuda", at::kBFloat16);
  for (const char* kv : {"bf16", "rotunda2", "rotunda2:recent=0,sink_select=running"}) {
    SCOPED_TRACE(kv);
    const KvBinding binding = bind(session, kv);
    const auto recorded = binding.make_cache();
    const auto eager = binding.make_cache();
    StepGraphs graphs(*binding.model, *recorded, {});
    const kv::SeqId a = recorded->create(), b = eager->create();
    run_prefill(*binding.model, *recorded, a, prompt(1000), 512, nullptr);
    run_prefill(*binding.model, *eager, b, prompt(1000), 512, nullptr);
    std::vector<int64_t> token = {100};
    for (int step = 0; step < 60; ++step) {
      const std::vector<int64_t> ids = graphs.run({{.seq = a, .n_tokens = 1}}, token, {}, nullptr);
      const at::Tensor hidden = run_step(*binding.model, *eager, {{.seq = b, .n_tokens = 1}}, token, kv::StepKind::kGenerate, nullptr);
      ASSERT_EQ(ids, checked_ids(sample_rows(binding.model->logits(hidden), {}, {}))) << "step " << step;
      token = ids;
    }
    EXPECT_GT(graphs.n_replayed(), 50);
  }
}

TEST_F(StepGraphsGpuTest, SamplesAsTheCpuDoes) {
  at::manual_seed(3);
  const at::Tensor logits = at::randn({4, 50000}).mul(8).round().div(4);
  const at::Tensor draws = at::rand({4}, at::kDouble);
  for (const SamplingOptions& options :
       {SamplingOptions{}, SamplingOptions{.temperature = 0.9}, SamplingOptions{.temperature = 1.2, .top_k = 50, .top_p = 0.9}}) {
    EXPECT_EQ(checked_ids(sample_rows(logits.to(at::kCUDA), options, draws.to(at::kCUDA))),
              checked_ids(sample_rows(logits, options, draws)));
  }
}

TEST_F(StepGraphsGpuTest, AnInterruptedStepLeavesTheCacheAsItWas) {
  const Session session = session_on("cuda", at::kBFloat16);
  const KvBinding binding = bind(session, "bf16");
  const auto cache = binding.make_cache();
  const kv::SeqId seq = cache->create();
  run_prefill(*binding.model, *cache, seq, prompt(30), 64, nullptr);
  StepGraphs graphs(*binding.model, *cache, {});
  const std::atomic<bool> stop = true;
  EXPECT_THROW(graphs.run({{.seq = seq, .n_tokens = 1}}, {7}, {}, &stop), Interrupted);
  EXPECT_EQ(cache->kv_len(seq), 30);
  EXPECT_EQ(graphs.run({{.seq = seq, .n_tokens = 1}}, {7}, {}, nullptr).size(), 1u);
  EXPECT_EQ(cache->kv_len(seq), 31);
}

TEST_F(StepGraphsGpuTest, ABudgetTooSmallForTheWeightsIsRefused) {
  SessionOptions options;
  options.model_dir = kModel;
  options.device = ops::parse_device("cuda");
  options.device_budget_bytes = 1 << 20;
  try {
    load_session(options);
    FAIL() << "loaded";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kWorld);
    EXPECT_THAT(error.what(), ::testing::HasSubstr("the weights need"));
  }
}

TEST_F(StepGraphsGpuTest, NamesAGpuThatIsNotThere) {
  try {
    ops::require_device(ops::parse_device("cuda:77"));
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kUser);
    EXPECT_THAT(error.what(), ::testing::HasSubstr("--device cuda:77: this machine has"));
  }
}

}  // namespace
}  // namespace rotunda::engine
