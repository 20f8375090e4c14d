// Logits of every family against Hugging Face transformers (tests/golden/make_model_golden.py).

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "io/checkpoint_index.h"
#include "model_test_util.h"

namespace rotunda::model {
namespace {

using namespace rotunda::test;

constexpr double kMaxRelativeError = 1e-4;

struct Case {
  explicit Case(const std::string& name, at::ScalarType dtype = at::kFloat)
      : lm(load_causal_lm((golden_dir() / "models" / name).string(), {.dtype = dtype, .progress = {}})) {
    const ops::TensorBundle golden = io::read_bundle(golden_dir() / "models" / name / "golden.safetensors");
    tokens = golden.get("tokens", at::kLong, {-1});
    logits = golden.get("logits", at::kFloat, {tokens.size(0), lm->info().vocab_size});
  }
  std::shared_ptr<const CausalLm> lm;
  at::Tensor tokens;
  at::Tensor logits;
};

class GoldenTest : public testing::TestWithParam<std::string> {};

TEST_P(GoldenTest, WholeSequenceAtOnce) {
  const Case c(GetParam());
  ReferenceCache cache(c.lm->info().kv);
  EXPECT_LT(relative_error(run_step(*c.lm, cache, cache.create(), c.tokens), c.logits), kMaxRelativeError);
}

TEST_P(GoldenTest, TokenByToken) {
  const Case c(GetParam());
  ReferenceCache cache(c.lm->info().kv);
  const kv::SeqId seq = cache.create();
  std::vector<at::Tensor> rows;
  // The golden is one pass, whose `dynamic` frequencies are those of the whole length.
  for (int64_t t = 0; t < c.tokens.size(0); ++t)
    rows.push_back(run_step(*c.lm, cache, seq, c.tokens.narrow(0, t, 1), c.tokens.size(0)));
  EXPECT_LT(relative_error(at::cat(rows), c.logits), kMaxRelativeError);
}

TEST_P(GoldenTest, RaggedBatch) {
  const Case c(GetParam());
  ReferenceCache cache(c.lm->info().kv);
  const int64_t total = c.tokens.size(0);
  const std::vector<kv::SeqId> seqs = {cache.create(), cache.create(), cache.create()};
  const std::vector<std::vector<int64_t>> steps = {
      {13, 1, 0}, {1, 0, 40}, {0, 39, 0}, {26, 0, 0}};  // tokens of each sequence
  std::vector<std::vector<at::Tensor>> rows(seqs.size());
  for (const std::vector<int64_t>& step : steps) {
    std::vector<kv::SeqChunk> chunks;
    std::vector<at::Tensor> tokens;
    for (size_t s = 0; s < seqs.size(); ++s) {
      if (step[s] == 0) continue;
      chunks.push_back({.seq = seqs[s], .n_tokens = step[s], .is_prompt = true, .rope_len = total});
      tokens.push_back(c.tokens.narrow(0, cache.kv_len(seqs[s]), step[s]));
    }
    cache.begin_step(chunks);
    const at::Tensor logits = c.lm->logits(c.lm->forward(at::cat(tokens), cache));
    cache.end_step();
    int64_t begin = 0;
    for (size_t s = 0; s < seqs.size(); ++s) {
      rows[s].push_back(logits.narrow(0, begin, step[s]));
      begin += step[s];
    }
  }
  for (const std::vector<at::Tensor>& sequence_rows : rows)
    EXPECT_LT(relative_error(at::cat(sequence_rows), c.logits), kMaxRelativeError);
}

// In bf16 each of some ten roundings on the way to a logit is off by up to 2^-9; these models have at most two layers.
TEST_P(GoldenTest, Bfloat16StaysClose) {
  const Case c(GetParam(), at::kBFloat16);
  ReferenceCache cache(c.lm->info().kv);
  const at::Tensor logits = run_step(*c.lm, cache, cache.create(), c.tokens);
  EXPECT_EQ(logits.scalar_type(), at::kFloat);
  EXPECT_LT(relative_error(logits, c.logits), 0.04);
}

TEST_P(GoldenTest, InfoAgreesWithTheCheckpoint) {
  const Case c(GetParam());
  const std::string dir = (golden_dir() / "models" / GetParam()).string();
  const CausalLmInfo info = read_causal_lm_info(dir, {.dtype = at::kBFloat16, .progress = {}});
  EXPECT_EQ(info.kv.dtype, at::kBFloat16);
  EXPECT_EQ(c.lm->info().kv.dtype, at::kFloat);
  EXPECT_EQ(info.architecture, c.lm->info().architecture);
  const io::CheckpointIndex index = io::CheckpointIndex::open(dir);
  int64_t n_parameters = 0;
  for (const std::string& name : index.names()) {
    int64_t numel = 1;
    for (const int64_t size : index.entry(name).shape) numel *= size;
    n_parameters += numel;
  }
  EXPECT_EQ(info.n_parameters, n_parameters);
  EXPECT_EQ(c.lm->weights_hash(), index.content_hash());
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenTest, testing::ValuesIn(golden_cases()),
                         [](const auto& info) { return info.param; });

TEST(GoldenCasesTest, AreAllThere) {
  std::set<std::string> architectures;
  std::set<int> head_dims;
  std::set<ops::RopeType> rope_types;
  for (const std::string& name : golden_cases()) {
    const CausalLmInfo info = read_causal_lm_info((golden_dir() / "models" / name).string());
    architectures.insert(info.architecture);
    head_dims.insert(info.kv.head_dim);
    rope_types.insert(info.kv.rope.spec().type);
  }
  EXPECT_EQ(architectures.size(), 4u);
  EXPECT_EQ(rope_types.size(), 5u);
  EXPECT_THAT(head_dims, testing::IsSupersetOf({64, 80, 96, 112, 128, 256}));
}

TEST(ShippedModelTest, LogitsEqualTransformers) {
  const std::shared_ptr<const CausalLm> lm = load_causal_lm(shipped_model_dir().string(), {});
  const ops::TensorBundle golden = io::read_bundle(golden_dir() / "tiny_gqa_logits.safetensors");
  ReferenceCache cache(lm->info().kv);
  const at::Tensor logits = run_step(*lm, cache, cache.create(), golden.get("tokens", at::kLong, {200}));
  EXPECT_LT(relative_error(logits.index_select(0, golden.get("rows", at::kLong, {5})),
                           golden.get("logits", at::kFloat, {5, 8192})),
            kMaxRelativeError);
  const at::Tensor best = logits.gather(1, golden.get("top_ids", at::kInt, {200, 8}).to(at::kLong));
  EXPECT_LT(relative_error(best, golden.get("top_values", at::kFloat, {200, 8})), kMaxRelativeError);
  EXPECT_LT((at::logsumexp(logits, 1) - golden.get("logsumexp", at::kFloat, {200})).abs().max().item<double>(), 1e-3);
}

class ShippedModelGreedyTest : public testing::TestWithParam<std::pair<const char*, at::ScalarType>> {};

TEST_P(ShippedModelGreedyTest, ContinuesAsTransformers) {
  const nlohmann::json golden = nlohmann::json::parse(std::ifstream(golden_dir() / "tiny_gqa_greedy.json"));
  const auto& [name, rounding] = GetParam();
  const std::vector<int64_t> expected = golden["continuations"][name]["ids"];
  const std::shared_ptr<const CausalLm> lm = load_causal_lm(shipped_model_dir().string(), {});
  ReferenceCache cache(lm->info().kv, at::kFloat, rounding);
  const kv::SeqId seq = cache.create();
  at::Tensor tokens = at::tensor(golden["prompt"].get<std::vector<int64_t>>());
  std::vector<int64_t> got;
  while (got.size() < expected.size()) {
    cache.begin_step({{.seq = seq, .n_tokens = tokens.size(0)}});
    const at::Tensor hidden = lm->forward(tokens, cache);
    cache.end_step();
    got.push_back(lm->logits(hidden.slice(0, -1)).argmax().item<int64_t>());
    tokens = at::tensor(std::vector<int64_t>{got.back()});
  }
  EXPECT_EQ(got, expected);
}

INSTANTIATE_TEST_SUITE_P(CacheDtypes, ShippedModelGreedyTest,
                         testing::Values(std::pair("float32", at::kDouble), std::pair("bfloat16", at::kBFloat16),
                                         std::pair("float16", at::kHalf)),
                         [](const auto& info) { return info.param.first; });

}  // namespace
}  // namespace rotunda::model
