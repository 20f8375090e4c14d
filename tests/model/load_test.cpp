// Reading weights: what a checkpoint may look like, and what a format fuses into it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <thread>

#include "kv/kv_format.h"
#include "model/decoder/decoder_lm.h"
#include "model/nn/linear.h"
#include "model/nn/rms_norm.h"
#include "model_test_util.h"

namespace rotunda::model {
namespace {

using namespace rotunda::test;
using testing::HasSubstr;

const char* const kCase = "llama_mha64";  // bf16, 2 layers, hidden 32, 2 heads

/// A copy of a tiny checkpoint that a test may damage.
class LoadTest : public testing::Test {
 protected:
  LoadTest() : bundle_(io::read_bundle(golden_dir() / "models" / kCase / "model.safetensors")) {
    std::filesystem::copy_file(golden_dir() / "models" / kCase / "config.json", folder_.path() / "config.json");
  }
  std::string save_and_get_error() {
    save();
    const std::string message = user_error_of([&] { load(); });
    EXPECT_THAT(message, HasSubstr(folder_.path().string()));
    return message;
  }
  void save() { io::write_bundle(folder_.path() / "model.safetensors", bundle_); }
  std::shared_ptr<const CausalLm> load(at::ScalarType dtype = at::kFloat) {
    return load_causal_lm(folder_.path().string(), {.dtype = dtype, .progress = {}});
  }
  at::Tensor logits(const CausalLm& lm) {
    ReferenceCache cache(lm.info().kv);
    return run_step(lm, cache, cache.create(), at::arange(20));
  }

  TemporaryFolder folder_;
  ops::TensorBundle bundle_;
};

TEST_F(LoadTest, NamesATensorOfAnotherShape) {
  const std::string name = "model.layers.1.self_attn.k_proj.weight";
  bundle_.tensors[name] = bundle_.tensors[name].narrow(0, 0, 64).contiguous();
  EXPECT_THAT(save_and_get_error(), HasSubstr("tensor " + name + " has shape [64, 32], expected [128, 32]"));
}

TEST_F(LoadTest, NamesAMissingTensor) {
  bundle_.tensors.erase("model.layers.0.mlp.up_proj.weight");
  EXPECT_THAT(save_and_get_error(), HasSubstr("model.layers.0.mlp.up_proj.weight"));
}

TEST_F(LoadTest, NamesATensorThatIsNoFloat) {
  bundle_.tensors["model.norm.weight"] = at::ones({32}, at::TensorOptions().dtype(at::kInt));
  EXPECT_THAT(save_and_get_error(), HasSubstr("tensor model.norm.weight is Int"));
}

TEST_F(LoadTest, NamesATensorThatIsNotFinite) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                           -std::numeric_limits<double>::infinity()}) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kFloat}) {
      const ops::TensorBundle whole = bundle_;
      at::Tensor damaged = bundle_.tensors["model.layers.1.mlp.down_proj.weight"].to(dtype, false, /*copy=*/true);
      damaged[31][95] = bad;  // the last one
      bundle_.tensors["model.layers.1.mlp.down_proj.weight"] = damaged;
      EXPECT_THAT(save_and_get_error(), HasSubstr("tensor model.layers.1.mlp.down_proj.weight holds NaN or Inf"));
      bundle_ = whole;
    }
  }
}

TEST_F(LoadTest, TakesTheLargestFiniteWeights) {
  at::Tensor edge = bundle_.tensors["model.norm.weight"].to(at::kHalf, false, /*copy=*/true);
  edge[0] = 65504.0;
  edge[1] = 6e-8;  // subnormal
  bundle_.tensors["model.norm.weight"] = edge;
  save();
  EXPECT_TRUE(at::isfinite(logits(*load())).all().item<bool>());
}

TEST_F(LoadTest, IgnoresTensorsThatHaveNoPlace) {
  save();
  const at::Tensor plain = logits(*load());
  bundle_.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = at::ones({32});
  bundle_.tensors["something.else"] = at::ones({3});
  save();
  EXPECT_TRUE(at::equal(logits(*load()), plain));
}

TEST_F(LoadTest, DtypeOfTheFileDoesNotMatter) {
  save();
  const at::Tensor plain = logits(*load());
  const at::Tensor plain_bf16 = logits(*load(at::kBFloat16));  // one GEMM for each projection, on the mapped bytes
  for (auto& [name, tensor] : bundle_.tensors) tensor = tensor.to(at::kFloat);
  save();
  EXPECT_LT(relative_error(logits(*load()), plain), 1e-5);  // stacked there, mapped here
  EXPECT_LT(relative_error(logits(*load(at::kBFloat16)), plain_bf16), 0.02);
}

TEST_F(LoadTest, DataAtAnOddByteIsReadToo) {
  save();
  const at::Tensor plain = logits(*load(at::kBFloat16));
  std::ifstream in(folder_.path() / "model.safetensors", std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  in.close();
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  bytes.insert(8 + header_bytes, 1, ' ');  // the format allows blanks behind the header
  ++header_bytes;
  std::memcpy(bytes.data(), &header_bytes, 8);
  std::ofstream(folder_.path() / "model.safetensors", std::ios::binary) << bytes;
  EXPECT_TRUE(at::equal(logits(*load(at::kBFloat16)), plain));
}

TEST_F(LoadTest, ReportsProgress) {
  save();
  std::vector<std::pair<int64_t, int64_t>> calls;
  const std::thread::id caller = std::this_thread::get_id();
  load_causal_lm(folder_.path().string(), {.dtype = at::kFloat, .progress = [&](int64_t done, int64_t total) {
                                             EXPECT_EQ(std::this_thread::get_id(), caller);
                                             calls.emplace_back(done, total);
                                           }});
  int64_t total_bytes = 0;
  for (const auto& [name, tensor] : bundle_.tensors) total_bytes += static_cast<int64_t>(tensor.nbytes());
  ASSERT_FALSE(calls.empty());
  EXPECT_EQ(calls.back(), std::pair(total_bytes, total_bytes));
  EXPECT_TRUE(std::is_sorted(calls.begin(), calls.end()));
}

TEST_F(LoadTest, RefusesTokensThatAreNoIds) {
  save();
  const std::shared_ptr<const CausalLm> lm = load();
  ReferenceCache cache(lm->info().kv);
  EXPECT_THAT(user_error_of([&] {
                lm->forward(at::tensor(std::vector<int64_t>{1, 128}), cache);
              }),
              HasSubstr("token 1 is 128, expected an id from 0 to 127"));
  EXPECT_THAT(user_error_of([&] { lm->forward(at::tensor(std::vector<int64_t>{-1}), cache); }),
              HasSubstr("token 0 is -1"));
  EXPECT_THAT(user_error_of([&] { lm->forward(at::empty({0}, at::kLong), cache); }), HasSubstr("expected [T] Long"));
  EXPECT_THAT(user_error_of([&] { lm->logits(at::zeros({1, 31})); }), HasSubstr("expected [N, 32]"));
}

/// Turns the values of every head by a random orthogonal matrix and the output projection back: the logits must not change.
class ValueRotatingFormat final : public kv::KvFormat {
 public:
  std::string name() const override { return "value_rotating"; }
  std::string summary() const override { return "for tests"; }
  std::vector<kv::KvOption> options() const override { return {}; }
  void validate(const kv::KvSpec& spec) const override {
    if (!spec.options.empty()) throw_user_error("value_rotating: no options");
  }
  std::optional<std::string> unsupported_reason(const kv::KvSpec& spec, const kv::KvModel&) const override {
    return spec.format == "unsupported" ? std::optional<std::string>("value_rotating: not this model") : std::nullopt;
  }
  bool fuses_projections() const override { return true; }
  void fuse(const kv::KvSpec& spec, const kv::KvModel& model, int, kv::ProjectionWeights& w, ops::TensorBundle&) const override {
    EXPECT_EQ(w.q_weight.scalar_type(), at::kFloat);
    if (spec.format == "nothing") return;
    const int64_t d = model.head_dim, group = model.n_heads / model.n_kv_heads;
    at::manual_seed(3);
    const at::Tensor r = std::get<0>(at::linalg_qr(at::randn({d, d})));
    for (int64_t h = 0; h < model.n_kv_heads; ++h) {
      w.v_weight.narrow(0, h * d, d).copy_(at::matmul(r, w.v_weight.narrow(0, h * d, d)));  // in place: a format may
      if (w.v_bias.defined()) w.v_bias.narrow(0, h * d, d).copy_(at::mv(r, w.v_bias.narrow(0, h * d, d)));
      for (int64_t q = h * group; q < (h + 1) * group; ++q)
        w.o_weight.narrow(1, q * d, d).copy_(at::matmul(w.o_weight.narrow(1, q * d, d), r.t()));
    }
  }
  int64_t planned_bytes(const kv::KvSpec&, const kv::KvModel&, int64_t) const override { return 0; }
  std::unique_ptr<kv::KvCache> make_cache(const kv::KvSpec&, const kv::KvModel& model,
                                          const ops::TensorBundle&) const override {
    return std::make_unique<ReferenceCache>(model);
  }
};

class FusedFormatTest : public testing::TestWithParam<std::string> {};

TEST_P(FusedFormatTest, RotatedValuesGiveTheSameLogits) {
  const std::shared_ptr<const CausalLm> lm = load_causal_lm((golden_dir() / "models" / GetParam()).string(), {});
  const ValueRotatingFormat format;
  ops::TensorBundle setup;
  const std::shared_ptr<const CausalLm> fused = lm->with_kv_format(format, {.format = "value_rotating", .options = {}, .parts = {}}, setup);
  const std::shared_ptr<const CausalLm> unchanged = lm->with_kv_format(format, {.format = "nothing", .options = {}, .parts = {}}, setup);

  const auto logits_and_values = [&](const CausalLm& model) {
    ReferenceCache cache(model.info().kv);
    const kv::SeqId seq = cache.create();
    const at::Tensor logits = run_step(model, cache, seq, at::arange(30));
    return std::pair(logits, cache.export_sequence(seq).tensors.at("v.0"));
  };
  const auto [logits, values] = logits_and_values(*lm);
  const auto [fused_logits, fused_values] = logits_and_values(*fused);
  EXPECT_LT(relative_error(fused_logits, logits), 2e-5);
  EXPECT_GT((fused_values - values).abs().max().item<double>(), 0.1) << "the values were not rotated";
  EXPECT_TRUE(at::equal(logits_and_values(*unchanged).first, logits));
  EXPECT_EQ(fused->weights_hash(), lm->weights_hash());
  EXPECT_TRUE(at::equal(logits_and_values(*lm).first, logits)) << "the model itself has changed";
}

INSTANTIATE_TEST_SUITE_P(Cases, FusedFormatTest, testing::ValuesIn(golden_cases()),
                         [](const auto& info) { return info.param; });

TEST(FusedFormatErrorsTest, PassOnTheReason) {
  const std::shared_ptr<const CausalLm> lm = load_causal_lm((golden_dir() / "models" / kCase).string(), {});
  const ValueRotatingFormat format;
  ops::TensorBundle setup;
  EXPECT_THAT(user_error_of([&] { lm->with_kv_format(format, {.format = "unsupported", .options = {}, .parts = {}}, setup); }),
              HasSubstr("value_rotating: not this model"));
  EXPECT_THAT(user_error_of([&] {
                lm->with_kv_format(format, {.format = "value_rotating", .options = {{"a", "b"}}, .parts = {}}, setup);
              }),
              HasSubstr("no options"));
}

TEST(WeightsHashTest, IsTheSameFromManyThreads) {
  const std::shared_ptr<const CausalLm> lm = load_causal_lm((golden_dir() / "models" / kCase).string(), {});
  std::vector<std::string> hashes(4);
  std::vector<std::thread> threads;
  for (std::string& hash : hashes) threads.emplace_back([&] { hash = lm->weights_hash(); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(hashes[0].size(), 64u);
  for (const std::string& hash : hashes) EXPECT_EQ(hash, hashes[0]);
}

TEST(RandomDecoderTest, RunsAndFuses) {
  DecoderConfig config;
  config.architecture = "LlamaForCausalLM";
  config.vocab_size = 50;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.n_layers = 2;
  config.n_heads = 4;
  config.n_kv_heads = 2;
  config.head_dim = 8;
  config.rms_norm_eps = 1e-5;
  config.rope.head_dim = 8;
  at::manual_seed(11);
  const auto lm = make_random_decoder_lm(config, {.progress = {}});
  EXPECT_EQ(lm->info().n_parameters, 2 * 50 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48));
  const auto logits_of = [](const CausalLm& model) {
    ReferenceCache cache(model.info().kv);
    return run_step(model, cache, cache.create(), at::arange(20));
  };
  const at::Tensor logits = logits_of(*lm);
  ASSERT_EQ(logits.sizes(), at::IntArrayRef({20, 50}));
  // A unit vector of hidden_size channels times weights of variance 1 / hidden_size: logits of size 1.
  EXPECT_NEAR(logits.square().mean().item<double>(), 1.0, 0.5);
  ops::TensorBundle setup;
  const auto fused = lm->with_kv_format(ValueRotatingFormat(), {.format = "value_rotating", .options = {}, .parts = {}}, setup);
  EXPECT_LT(relative_error(logits_of(*fused), logits), 2e-5);
}

TEST(LinearStackTest, StackedEqualsApart) {
  at::manual_seed(5);
  const std::vector<at::Tensor> weights = {at::randn({6, 8}), at::randn({4, 8}), at::randn({4, 8})};
  const std::vector<at::Tensor> biases = {at::randn({6}), at::randn({4}), at::randn({4})};
  const nn::LinearStack apart{weights, biases, {6, 4, 4}};
  const nn::LinearStack stacked{{at::cat(weights)}, {at::cat(biases)}, {6, 4, 4}};
  for (const int64_t n : {1, 2, 7}) {
    const at::Tensor x = at::randn({n, 8});
    const std::vector<at::Tensor> a = apart(x), b = stacked(x);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_LT(relative_error(b[i], a[i]), 1e-6);
      EXPECT_LT(relative_error(a[i], at::matmul(x, weights[i].t()) + biases[i]), 1e-6);
      EXPECT_TRUE(at::equal(stacked.weight(i), weights[i]));
      EXPECT_TRUE(at::equal(stacked.bias(i), biases[i]));
    }
  }
}

TEST(RmsNormTest, EqualsItsDefinitionInFp64) {
  at::manual_seed(6);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = (at::randn({5, 3, 64}) * 30).to(dtype).select(1, 1);  // strided
    const at::Tensor weight = at::randn({64}).to(dtype);
    const at::Tensor wide = x.to(at::kDouble);
    const at::Tensor want = wide * (wide.square().mean(-1, true) + 1e-5).rsqrt() * weight.to(at::kDouble);
    // bf16 rounds twice, each by up to 2^-9 of the value
    EXPECT_LT(relative_error(nn::rms_norm(x, weight, 1e-5), want), dtype == at::kFloat ? 1e-6 : 0x1p-8);
  }
  EXPECT_TRUE(at::equal(nn::rms_norm(at::zeros({1, 4}), at::ones({4}), 1e-5), at::zeros({1, 4})));
}

}  // namespace
}  // namespace rotunda::model
