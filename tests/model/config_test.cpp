// What config.json may hold and what the message is where it may not.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "model/model_registry.h"
#include "model_test_util.h"

namespace rotunda::model {
namespace {

using namespace rotunda::test;
using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

json llama_config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 256},
          {"intermediate_size", 512},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"vocab_size", 1000},
          {"max_position_embeddings", 2048}};
}

json config_of(const std::string& architecture) {
  json config = llama_config();
  config["architectures"] = {architecture};
  return config;
}

CausalLmInfo read(const json& config, const std::optional<json>& generation = {}) {
  std::optional<ConfigFile> generation_file;
  if (generation) generation_file = ConfigFile::parse(generation->dump(), "m/generation_config.json");
  const ModelFolder folder{"m", ConfigFile::parse(config.dump(), "m/config.json"), generation_file};
  return model_registry().get(folder.config).read_info(folder, {});
}

TEST(ConfigTest, ReadsAPlainLlama) {
  const CausalLmInfo info = read(llama_config());
  EXPECT_EQ(info.architecture, "LlamaForCausalLM");
  EXPECT_EQ(info.kv.n_layers, 3);
  EXPECT_EQ(info.kv.head_dim, 64);
  EXPECT_EQ(info.kv.n_kv_heads, 2);
  EXPECT_EQ(info.kv.softmax_scale, 0.125);
  EXPECT_EQ(info.kv.sliding_window, 0);
  EXPECT_FALSE(info.kv.key_norm);
  EXPECT_FALSE(info.tied_embeddings);
  EXPECT_EQ(info.kv.rope.spec().theta, 10000.0);
  // embedding and head, then norms, q and o, k and v, MLP per layer, then the last norm
  EXPECT_EQ(info.n_parameters, 2 * 1000 * 256 + 3 * (2 * 256 + 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256) + 256);
  EXPECT_THAT(info.bos_token_ids, ElementsAre(1));  // the Hugging Face defaults of this family
  EXPECT_THAT(info.eos_token_ids, ElementsAre(2));
}

TEST(ConfigTest, TakesTokenIdsFromBothFiles) {
  json config = llama_config();
  config["bos_token_id"] = nullptr;
  config["eos_token_id"] = {7, 8};
  EXPECT_THAT(read(config).bos_token_ids, ElementsAre());
  EXPECT_THAT(read(config, json{{"eos_token_id", 8}}).eos_token_ids, ElementsAre(7, 8));
  EXPECT_THAT(read(config, json{{"eos_token_id", {9, 7}}}).eos_token_ids, ElementsAre(7, 8, 9));
  EXPECT_THAT(user_error_of([&] {
                read(config, json{{"eos_token_id", "x"}});
              }),
              HasSubstr("m/generation_config.json: eos_token_id is \"x\""));
}

TEST(ConfigTest, FollowsTheDefaultsOfEachFamily) {
  json mistral = config_of("MistralForCausalLM");
  EXPECT_EQ(read(mistral).kv.sliding_window, 4096);
  mistral["sliding_window"] = nullptr;
  EXPECT_EQ(read(mistral).kv.sliding_window, 0);
  mistral["sliding_window"] = 17;
  EXPECT_EQ(read(mistral).kv.sliding_window, 17);
  mistral["num_attention_heads"] = 16;
  mistral.erase("num_key_value_heads");
  EXPECT_EQ(read(mistral).kv.n_kv_heads, 8);
  mistral["num_key_value_heads"] = nullptr;
  EXPECT_EQ(read(mistral).kv.n_kv_heads, 16);

  EXPECT_TRUE(read(config_of("Qwen3ForCausalLM")).kv.key_norm);
  EXPECT_EQ(read(config_of("Qwen3ForCausalLM")).kv.head_dim, 128);
  EXPECT_THAT(read(config_of("Qwen2ForCausalLM")).eos_token_ids, ElementsAre());
  EXPECT_GT(read(config_of("Qwen2ForCausalLM")).n_parameters, read(llama_config()).n_parameters);  // its biases

  json llama = llama_config();
  llama.erase("num_key_value_heads");
  EXPECT_EQ(read(llama).kv.n_kv_heads, 4);
  llama["head_dim"] = 80;
  EXPECT_EQ(read(llama).kv.head_dim, 80);
}

TEST(ConfigTest, QwenWindowsCoverAllLayersOrNone) {
  json config = config_of("Qwen2ForCausalLM");
  config["sliding_window"] = 100;
  config["max_window_layers"] = 1;
  EXPECT_EQ(read(config).kv.sliding_window, 0) << "use_sliding_window is off";
  config["use_sliding_window"] = true;
  EXPECT_THAT(user_error_of([&] { read(config); }),
              HasSubstr("m/config.json: max_window_layers gives 2 of 3 layers a sliding window"));
  config["max_window_layers"] = 0;
  EXPECT_EQ(read(config).kv.sliding_window, 100);
  config["max_window_layers"] = 3;
  EXPECT_EQ(read(config).kv.sliding_window, 0);
  config["layer_types"] = {"sliding_attention", "sliding_attention", "sliding_attention"};
  EXPECT_EQ(read(config).kv.sliding_window, 100);
  config["layer_types"] = {"sliding_attention", "full_attention", "sliding_attention"};
  EXPECT_THAT(user_error_of([&] { read(config); }), HasSubstr("layer_types gives 2 of 3"));
  config["layer_types"] = {"sliding_attention"};
  EXPECT_THAT(user_error_of([&] { read(config); }), HasSubstr("layer_types has 1 entries, expected 3"));
}

TEST(ConfigTest, ReadsRopeSettingsInEveryForm) {
  json config = llama_config();
  config["rope_theta"] = 5000;
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 3}};
  EXPECT_EQ(read(config).kv.rope.spec().type, ops::RopeType::kLinear);
  EXPECT_EQ(read(config).kv.rope.spec().factor, 3.0);
  EXPECT_EQ(read(config).kv.rope.spec().theta, 5000.0);

  config["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  const ops::RopeSpec yarn = read(config).kv.rope.spec();
  EXPECT_EQ(yarn.original_max_position_embeddings, 2048);
  EXPECT_DOUBLE_EQ(yarn.attention_factor, 0.1 * std::log(4.0) + 1.0);
  EXPECT_EQ(yarn.beta_fast, 32.0);
  EXPECT_TRUE(yarn.truncate);

  config["rope_scaling"] = nullptr;
  EXPECT_EQ(read(config).kv.rope.spec().type, ops::RopeType::kDefault);

  config.erase("rope_theta");
  config["rope_parameters"] = {{"rope_theta", 700.0}};
  EXPECT_EQ(read(config).kv.rope.spec().type, ops::RopeType::kDefault);
  EXPECT_EQ(read(config).kv.rope.spec().theta, 700.0);
  config["rope_parameters"] = {{"rope_theta", 700.0}, {"rope_type", "dynamic"}, {"factor", 2.0}};
  EXPECT_TRUE(read(config).kv.rope.depends_on_length());
}

struct BadConfig {
  const char* patch;     // put over llama_config()
  const char* expected;  // part of the message
};

class BadConfigTest : public testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, IsRefusedByFileKeyGotAndExpected) {
  json config = llama_config();
  const json patch = json::parse(GetParam().patch);
  for (const auto& [key, value] : patch.items()) config[key] = value;
  const std::string message = user_error_of([&] { read(config); });
  EXPECT_THAT(message, testing::StartsWith("m/config.json: "));
  EXPECT_THAT(message, HasSubstr(GetParam().expected));
}

INSTANTIATE_TEST_SUITE_P(
    Values, BadConfigTest,
    testing::Values(
        BadConfig{R"({"architectures": ["GPT2LMHeadModel"]})",
                  "architectures is \"GPT2LMHeadModel\", expected one of LlamaForCausalLM, MistralForCausalLM, "
                  "Qwen2ForCausalLM, Qwen3ForCausalLM"},
        BadConfig{R"({"architectures": []})", "architectures has 0 entries, expected one"},
        BadConfig{R"({"architectures": "LlamaForCausalLM"})",
                  "architectures is \"LlamaForCausalLM\", expected a list of texts"},
        BadConfig{R"({"architectures": null})", "architectures is missing"},
        BadConfig{R"({"hidden_size": null})", "hidden_size is missing, expected a whole number from 1 to"},
        BadConfig{R"({"hidden_size": "256"})", "hidden_size is \"256\", expected a whole number"},
        BadConfig{R"({"hidden_size": 256.5})", "hidden_size is 256.5, expected a whole number"},
        BadConfig{R"({"hidden_size": 0})", "hidden_size is 0"},
        BadConfig{R"({"hidden_size": -256})", "hidden_size is -256"},
        BadConfig{R"({"hidden_size": 18446744073709551615})", "hidden_size is 18446744073709551615"},
        BadConfig{R"({"hidden_size": 1e300})", "hidden_size is 1e+300"},
        BadConfig{R"({"hidden_size": true})", "hidden_size is true"},
        BadConfig{R"({"hidden_size": [256]})", "hidden_size is [256]"},
        BadConfig{R"({"hidden_size": 255})", "num_attention_heads is 4, expected a divisor of hidden_size, 255"},
        BadConfig{R"({"vocab_size": 2147483648})",
                  "vocab_size is 2147483648, expected a whole number from 1 to 16777216"},
        BadConfig{R"({"num_hidden_layers": 1000000})", "num_hidden_layers is 1000000"},
        BadConfig{R"({"intermediate_size": 0})", "intermediate_size is 0"},
        BadConfig{R"({"num_key_value_heads": 3})",
                  "num_key_value_heads is 3, expected a divisor of num_attention_heads, 4"},
        BadConfig{R"({"num_key_value_heads": 8})", "num_key_value_heads is 8, expected a divisor"},
        BadConfig{R"({"head_dim": 63})", "head_dim is 63, expected an even number"},
        BadConfig{R"({"head_dim": 0})", "head_dim is 0"},
        BadConfig{R"({"max_position_embeddings": 0})", "max_position_embeddings is 0"},
        BadConfig{R"({"rms_norm_eps": 0})", "rms_norm_eps is 0, expected a number above 0"},
        BadConfig{R"({"rms_norm_eps": "small"})", "rms_norm_eps is \"small\", expected a number"},
        BadConfig{R"({"hidden_act": "gelu"})", "hidden_act is \"gelu\", expected \"silu\""},
        BadConfig{R"({"attention_bias": "no"})", "attention_bias is \"no\", expected true or false"},
        BadConfig{R"({"mlp_bias": 1})", "mlp_bias is 1, expected true or false"},
        BadConfig{R"({"tie_word_embeddings": "yes"})", "tie_word_embeddings is \"yes\""},
        BadConfig{R"({"bos_token_id": 1000})", "bos_token_id is 1000, expected a token id from 0 to 999"},
        BadConfig{R"({"bos_token_id": [1, 2]})",
                  "bos_token_id (with generation_config.json) names 2 ids, expected at most one"},
        BadConfig{R"({"eos_token_id": [2, -1]})", "eos_token_id is [2,-1]"},
        BadConfig{R"({"quantization_config": {"bits": 4}})", "quantization_config is there"},
        BadConfig{R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor is 0.5, expected 1"},
        BadConfig{R"({"rope_theta": 0})", "rope_theta is 0"},
        BadConfig{R"({"rope_theta": 1.0})", "rope_theta is 1, expected a number above 1"},
        BadConfig{R"({"rope_scaling": "yarn"})", "rope_scaling is \"yarn\", expected an object"},
        BadConfig{R"({"rope_scaling": {}})", "rope_scaling.rope_type is missing"},
        BadConfig{R"({"rope_scaling": {"rope_type": "longrope"}})",
                  "rope_scaling.rope_type is \"longrope\", expected one of default, linear, dynamic, llama3, yarn"},
        BadConfig{R"({"rope_scaling": {"type": "su"}})", "rope_scaling.type is \"su\""},
        BadConfig{R"({"rope_scaling": {"type": "linear"}})", "rope_scaling.factor is missing"},
        BadConfig{R"({"rope_scaling": {"type": "linear", "factor": -2}})",
                  "rope_scaling.factor is -2, expected a number above 0"},
        BadConfig{R"({"rope_scaling": {"rope_type": "llama3", "factor": 8}})",
                  "rope_scaling.original_max_position_embeddings is missing"},
        BadConfig{
            R"({"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64, "low_freq_factor": 4, "high_freq_factor": 4}})",
            "rope_scaling.high_freq_factor is 4, expected more than low_freq_factor, 4"},
        BadConfig{R"({"rope_scaling": {"rope_type": "yarn", "factor": 8, "attention_factor": 0}})",
                  "rope_scaling.attention_factor is 0"},
        BadConfig{R"({"rope_scaling": {"rope_type": "yarn", "factor": 8, "beta_fast": 1, "beta_slow": 2}})",
                  "rope_scaling.beta_fast is 1"},
        BadConfig{R"({"rope_scaling": {"rope_type": "yarn", "factor": 8, "mscale": -90, "mscale_all_dim": 1}})",
                  "rope_scaling.mscale is -90"},
        BadConfig{R"({"rope_parameters": {"full_attention": {"rope_type": "default"}}})",
                  "rope_parameters.full_attention is an object"},
        BadConfig{R"({"rope_theta": 10000, "rope_parameters": {"rope_theta": 500}})",
                  "rope_parameters.rope_theta is 500, expected rope_theta, 10000"}));

TEST(ConfigFileTest, RefusesWhatIsNoModelFolder) {
  const TemporaryFolder folder;
  const std::string dir = folder.path().string();
  EXPECT_THAT(user_error_of([&] { read_causal_lm_info(dir + "/absent"); }), HasSubstr("absent: not a folder"));
  try {
    read_causal_lm_info(dir);
    ADD_FAILURE() << "a folder without config.json was accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("config.json"));
  }
  std::ofstream(folder.path() / "config.json") << "{\"hidden_size\": ";
  EXPECT_THAT(user_error_of([&] { read_causal_lm_info(dir); }), HasSubstr("config.json:1:"));
  std::ofstream(folder.path() / "config.json") << "[1, 2]";
  EXPECT_THAT(user_error_of([&] { read_causal_lm_info(dir); }),
              HasSubstr("config.json: holds [1,2], expected a JSON object"));
  EXPECT_THAT(user_error_of([&] { read_causal_lm_info(dir, {.dtype = at::kDouble, .progress = {}}); }), HasSubstr("dtype Double"));
}

TEST(ModelRegistryTest, RefusesAFamilyTwice) {
  ModelRegistry registry;
  registry.add({"X", nullptr, nullptr});
  EXPECT_THROW(registry.add({"X", nullptr, nullptr}), Error);
  EXPECT_EQ(model_registry().all().size(), 4u);
}

}  // namespace
}  // namespace rotunda::model
