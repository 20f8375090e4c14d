#include "engine/self_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "engine/toy.h"
#include "io/safetensors.h"

namespace rotunda::engine {
namespace {

using testing::AllOf;
using testing::HasSubstr;

const std::filesystem::path kModel = std::filesystem::path(ROTUNDA_SOURCE_DIR) / "models/tiny-gqa";

Session load(const std::filesystem::path& dir) {
  SessionOptions options;
  options.model_dir = dir;
  options.threads = 1;
  return load_session(options);
}

// The demonstration model as a Qwen2 model with 60 added to the key biases of the four slowest RoPE pairs of every head, as
// tools/reparametrize.py makes it: what ruins caches that know nothing of biases.
void write_key_bias_model(const std::filesystem::path& dir) {
  std::filesystem::copy(kModel, dir, std::filesystem::copy_options::recursive);
  nlohmann::json config = nlohmann::json::parse(read_text_file(kModel / "config.json"));
  config["architectures"] = {"Qwen2ForCausalLM"};
  config["model_type"] = "qwen2";
  config.erase("attention_bias");
  toy::write_file(dir / "config.json", config.dump());
  const int64_t head_dim = config.at("head_dim"), slowest = 4;
  ops::TensorBundle weights = io::read_bundle(kModel / "model.safetensors");
  for (int layer = 0; layer < config.at("num_hidden_layers"); ++layer) {
    for (const char* projection : {"q_proj", "k_proj", "v_proj"}) {
      const std::string name = "model.layers." + std::to_string(layer) + ".self_attn." + projection;
      const at::Tensor weight = weights.tensors.at(name + ".weight");
      at::Tensor bias = at::zeros({weight.size(0) / head_dim, head_dim}, weight.options());
      if (std::string(projection) == "k_proj") {
        bias.narrow(1, head_dim / 2 - slowest, slowest).fill_(60.0);
        bias.narrow(1, head_dim - slowest, slowest).fill_(60.0);
      }
      weights.tensors[name + ".bias"] = bias.flatten();
    }
  }
  io::write_bundle(dir / "model.safetensors", weights);
}

SelfCheck check(const Session& session, const std::string& spec) {
  return *self_check(session, toy::bind(session, spec), SelfCheckMode::kOn, {}, nullptr);
}

TEST(SelfCheckTest, LargeKeyBiasesAreWarnedOfWhereTheyHurtAndOnlyThere) {
  const toy::TemporaryFolder folder;
  write_key_bias_model(folder / "model");
  const Session session = load(folder / "model");
  const SelfCheck good = check(session, "rotunda2");
  EXPECT_TRUE(good.quality.good()) << good.quality.mean_kl << " " << good.quality.top1_agreement;
  EXPECT_EQ(good.warning(), "");
  EXPECT_FALSE(good.better.has_value());
  EXPECT_EQ(good.tokens, 383);

  const SelfCheck bad = check(session, "rotunda2:shift=none,balance=none");
  EXPECT_GT(bad.quality.mean_kl, 1.0);
  EXPECT_LT(bad.quality.top1_agreement, 0.5);
  ASSERT_TRUE(bad.better.has_value());
  EXPECT_EQ(bad.better->requested.to_string(), "rotunda2");
  EXPECT_EQ(bad.better->mean_kl, good.quality.mean_kl) << "the advice was tried";
  EXPECT_THAT(bad.warning(),
              AllOf(HasSubstr("--kv rotunda2:balance=none,shift=none does badly on this model"),
                    HasSubstr("of 383 tokens"), HasSubstr("--kv rotunda2 was tried as well and is good")));
  EXPECT_EQ(bad.warning().find('\n'), std::string::npos);
}

TEST(SelfCheckTest, AutoChecksWhatHasFewerThanFourBitsSomewhere) {
  const Session session = toy::make_session();
  const auto checked = [&](const std::string& spec, SelfCheckMode mode) {
    return self_check(session, toy::bind(session, spec), mode, {}, nullptr).has_value();
  };
  for (const char* spec : {"rotunda2", "rotunda3:values=4", "rotate3:reorder=none", "layers 0=rotunda2;bf16"}) {
    EXPECT_TRUE(checked(spec, SelfCheckMode::kAuto)) << spec;
    EXPECT_FALSE(checked(spec, SelfCheckMode::kOff)) << spec;
  }
  for (const char* spec : {"bf16", "rotunda4", "rotate4:reorder=none", "layers 0=rotunda4;fp16"}) {
    EXPECT_FALSE(checked(spec, SelfCheckMode::kAuto)) << spec;
    EXPECT_TRUE(checked(spec, SelfCheckMode::kOn)) << spec;
  }
}

TEST(SelfCheckTest, WhereNothingPackedIsGoodTheAdviceIsTheCacheItself) {
  // Random weights with sharp logits: no packed cache keeps the likeliest token.
  const SelfCheck bad = check(toy::make_session(), "rotunda2");
  ASSERT_FALSE(bad.quality.good());
  EXPECT_FALSE(bad.better.has_value());
  EXPECT_THAT(bad.warning(),
              HasSubstr("no packed format that was tried is good either; --kv bf16 is the 16-bit cache itself"));
}

TEST(SelfCheckTest, ModesAndStops) {
  EXPECT_EQ(parse_self_check("on"), SelfCheckMode::kOn);
  EXPECT_EQ(parse_self_check("off"), SelfCheckMode::kOff);
  EXPECT_EQ(parse_self_check("auto"), SelfCheckMode::kAuto);
  EXPECT_THAT(toy::error_of([] { parse_self_check("yes"); }),
              HasSubstr("--self-check: got 'yes', expected on, off or auto"));
  const Session session = toy::make_session();
  std::atomic<bool> stop{true};
  EXPECT_THROW(self_check(session, toy::bind(session, "rotunda2"), SelfCheckMode::kOn, {}, &stop), Interrupted);
}

}  // namespace
}  // namespace rotunda::engine
