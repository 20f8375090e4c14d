#include "ops/rope.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"

namespace rotunda::ops {
namespace {

using nlohmann::json;

const json& golden_rows() {
  static const json rows = json::parse(std::ifstream(ROTUNDA_SOURCE_DIR "/tests/golden/rope.json"));
  return rows;
}

RopeSpec spec_of(const json& row) {
  RopeSpec spec;
  spec.head_dim = row["head_dim"];
  spec.theta = row["config"]["rope_theta"];
  spec.max_position_embeddings = row["max_position_embeddings"];
  spec.attention_factor = row["attention_factor"];
  const json& scaling = row["config"]["rope_scaling"];
  if (scaling.is_null()) return spec;
  const std::string type = scaling["rope_type"];
  spec.type = type == "linear"    ? RopeType::kLinear
              : type == "dynamic" ? RopeType::kDynamic
              : type == "llama3"  ? RopeType::kLlama3
                                  : RopeType::kYarn;
  spec.factor = scaling["factor"];
  spec.original_max_position_embeddings =
      scaling.value("original_max_position_embeddings", spec.max_position_embeddings);
  spec.low_freq_factor = scaling.value("low_freq_factor", 1.0);
  spec.high_freq_factor = scaling.value("high_freq_factor", 4.0);
  spec.beta_fast = scaling.value("beta_fast", 32.0);
  spec.beta_slow = scaling.value("beta_slow", 1.0);
  spec.truncate = scaling.value("truncate", true);
  return spec;
}

// transformers reckons with the same operations in fp32, so its frequencies are ours to the last bit or two: the vector
// units of two machines may round a power differently.
TEST(RopeTest, FrequenciesEqualTransformers) {
  ASSERT_EQ(golden_rows().size(), 48u);
  for (const json& row : golden_rows()) {
    const std::vector<double> got = Rope(spec_of(row)).inv_freq(row["seq_len"]);
    ASSERT_EQ(got.size(), row["inv_freq"].size());
    for (size_t i = 0; i < got.size(); ++i) {
      const double expected = row["inv_freq"][i];
      EXPECT_NEAR(got[i], expected, 2.0 * std::numeric_limits<float>::epsilon() * expected)
          << row["config"] << " dim " << i;
      EXPECT_EQ(got[i], static_cast<double>(static_cast<float>(got[i]))) << "frequencies are fp32 values";
    }
  }
}

TEST(RopeTest, CosinesAndSinesEqualTransformers) {
  int n_compared = 0;
  for (const json& row : golden_rows()) {
    if (row["cos"].is_null()) continue;
    const std::vector<int64_t> positions = row["positions"];
    const auto [cos, sin] = Rope(spec_of(row)).cos_sin(at::tensor(positions), row["seq_len"]);
    ASSERT_EQ(cos.sizes(), (std::vector<int64_t>{static_cast<int64_t>(positions.size()), 32}));
    for (size_t t = 0; t < positions.size(); ++t) {
      for (size_t i = 0; i < 32; ++i) {
        // transformers rounds the angle to fp32: half an ulp of up to 63 radians, and what two ulps of frequency make of it.
        const double bound = 1e-6 + 3.0 * std::numeric_limits<float>::epsilon() * static_cast<double>(positions[t]);
        const auto index = static_cast<int64_t>(t);
        EXPECT_NEAR(cos[index][static_cast<int64_t>(i)].item<float>(), row["cos"][t][i].get<double>(), bound)
            << row["config"];
        EXPECT_NEAR(sin[index][static_cast<int64_t>(i)].item<float>(), row["sin"][t][i].get<double>(), bound)
            << row["config"];
        ++n_compared;
      }
    }
  }
  EXPECT_GT(n_compared, 1000);
}

TEST(RopeTest, DynamicKeepsItsFrequenciesUpToTheTrainedLength) {
  const Rope rope(RopeSpec{.type = RopeType::kDynamic, .head_dim = 64, .factor = 2.0, .max_position_embeddings = 100});
  EXPECT_TRUE(rope.depends_on_length());
  EXPECT_EQ(rope.inv_freq(1), rope.inv_freq(100));
  EXPECT_NE(rope.inv_freq(100), rope.inv_freq(101));
  EXPECT_EQ(rope.inv_freq(100), Rope(RopeSpec{.head_dim = 64}).inv_freq(100));
}

TEST(RopeTest, AnglesOfFarPositionsAreExact) {
  const Rope rope(RopeSpec{.head_dim = 64});
  const int64_t position = 1'000'003;
  const auto [cos, sin] = rope.cos_sin(at::tensor(std::vector<int64_t>{position}), 0);
  const std::vector<double> inv_freq = rope.inv_freq(0);
  for (int64_t i = 0; i < 32; ++i) {
    const long double angle =
        static_cast<long double>(position) * static_cast<long double>(inv_freq[static_cast<size_t>(i)]);
    EXPECT_NEAR(cos[0][i].item<float>(), static_cast<double>(std::cos(angle)), 1e-7);
    EXPECT_NEAR(sin[0][i].item<float>(), static_cast<double>(std::sin(angle)), 1e-7);
  }
}

TEST(RopeTest, ApplyTurnsPairsAsComplexNumbers) {
  at::manual_seed(1);
  const Rope rope(RopeSpec{.type = RopeType::kYarn,
                           .head_dim = 8,
                           .factor = 4.0,
                           .original_max_position_embeddings = 16,
                           .attention_factor = 1.2});
  const at::Tensor wide = at::randn({5, 3, 2, 8});
  const at::Tensor x = wide.select(2, 1);  // strided rows, as a stacked projection gives them
  const std::vector<int64_t> positions = {0, 1, 7, 100, 31};
  const auto [cos, sin] = rope.cos_sin(at::tensor(positions), 0);
  const at::Tensor y = apply_rope(x, cos, sin);
  ASSERT_EQ(y.sizes(), x.sizes());
  for (int64_t t = 0; t < 5; ++t)
    for (int64_t h = 0; h < 3; ++h)
      for (int64_t i = 0; i < 4; ++i) {
        const std::complex<double> turned =
            std::complex<double>(x[t][h][i].item<float>(), x[t][h][i + 4].item<float>()) *
            std::polar(
                1.2, static_cast<double>(positions[static_cast<size_t>(t)]) * rope.inv_freq(0)[static_cast<size_t>(i)]);
        EXPECT_NEAR(y[t][h][i].item<float>(), turned.real(), 2e-6);
        EXPECT_NEAR(y[t][h][i + 4].item<float>(), turned.imag(), 2e-6);
      }
  EXPECT_EQ(apply_rope(x.to(at::kBFloat16), cos, sin).scalar_type(), at::kBFloat16);
  EXPECT_EQ(apply_rope(x.narrow(0, 0, 0), cos.narrow(0, 0, 0), sin.narrow(0, 0, 0)).size(0), 0);
}

TEST(RopeTest, RefusesBadSettings) {
  const auto message = [](const RopeSpec& spec) -> std::string {
    try {
      Rope rope(spec);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kUser);
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message({.head_dim = 7}), testing::HasSubstr("head_dim 7"));
  EXPECT_THAT(message({.head_dim = 0}), testing::HasSubstr("head_dim 0"));
  EXPECT_THAT(message({.head_dim = 8, .theta = 1.0}), testing::HasSubstr("rope_theta 1"));
  EXPECT_THAT(message({.head_dim = 8, .factor = 0.0}), testing::HasSubstr("factor 0"));
  EXPECT_THAT(message({.head_dim = 8, .factor = std::nan("")}), testing::HasSubstr("factor nan"));
  EXPECT_THAT(message({.type = RopeType::kDynamic, .head_dim = 2, .max_position_embeddings = 4}),
              testing::HasSubstr("head_dim 2"));
  EXPECT_THAT(message({.type = RopeType::kYarn, .head_dim = 8}),
              testing::HasSubstr("original_max_position_embeddings 0"));
  EXPECT_THAT(
      message(
          {.type = RopeType::kLlama3, .head_dim = 8, .original_max_position_embeddings = 8, .low_freq_factor = 4.0}),
      testing::HasSubstr("low_freq_factor 4"));
}

TEST(RopeTest, RefusesShapesThatDoNotFit) {
  const Rope rope(RopeSpec{.head_dim = 8});
  EXPECT_THROW(rope.cos_sin(at::zeros({2}), 0), Error);
  const auto [cos, sin] = rope.cos_sin(at::arange(3), 0);
  EXPECT_THROW(apply_rope(at::zeros({2, 1, 8}), cos, sin), Error);
  EXPECT_THROW(apply_rope(at::zeros({3, 1, 6}), cos, sin), Error);
}

}  // namespace
}  // namespace rotunda::ops
