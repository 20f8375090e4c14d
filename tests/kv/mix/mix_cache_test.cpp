// What a mix adds to its parts; that it is a cache like any other is shown by the conformance suite.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kv_harness.h"

namespace rotunda::kv::mix {
namespace {

using ::testing::AllOf;
using testing::FusedCache;
using ::testing::HasSubstr;
using testing::Text;

KvModel model_of(int n_layers) {
  KvModel model = testing::small_model();
  model.n_layers = n_layers;
  return model;
}

std::string reason(const std::string& spec_text, int n_layers) {
  const KvSpec spec = parse_kv_spec(spec_text);
  return kv_registry().get(spec).unsupported_reason(spec, model_of(n_layers)).value_or("");
}

TEST(MixTest, EveryLayerIsThatOfItsFormatAlone) {
  const KvModel model = model_of(5);
  const Text text = testing::random_text(model, 200, 3);
  FusedCache mix("layers 0,-1=bf16;layers 2=rotate2:recent=16;rotunda2:recent=0", model);
  const std::vector<std::string> alone = {"bf16", "rotunda2:recent=0", "rotate2:recent=16", "rotunda2:recent=0",
                                          "bf16"};
  const auto run = [&](FusedCache& fused) {
    const SeqId seq = fused.cache().create();
    std::vector<at::Tensor> outs = {fused.step({{seq, &text, 0, 180}})};
    for (int64_t t = 180; t < 200; ++t) outs.push_back(fused.step({{seq, &text, t, t + 1}}));
    return at::cat(outs, 1);  // [layer, T, n_heads, d]
  };
  const at::Tensor mixed = run(mix);
  for (int layer = 0; layer < model.n_layers; ++layer) {
    FusedCache single(alone[layer], model);
    EXPECT_TRUE(mixed[layer].equal(run(single)[layer])) << "layer " << layer;
  }
}

TEST(MixTest, CalibrationsReachTheirLayers) {
  // Layers whose means differ: a slice of the wrong layer would be another shift and another order of channels.
  const KvModel model = model_of(4);
  const Text text = testing::random_text(model, 150, 4);
  FusedCache mix("layers 1,3=rotunda2:shift=mean,balance=calibrated,feedback=calibrated,recent=0;rotate2:recent=0",
                 model);
  FusedCache house("rotunda2:shift=mean,balance=calibrated,feedback=calibrated,recent=0", model);
  FusedCache rotate("rotate2:recent=0", model);
  const auto run = [&](FusedCache& fused) {
    return fused.step({{fused.cache().create(), &text, 0, 150}}, StepKind::kQuantizeAll);
  };
  const at::Tensor mixed = run(mix), by_house = run(house), by_rotate = run(rotate);
  for (const int layer : {1, 3}) EXPECT_TRUE(mixed[layer].equal(by_house[layer])) << layer;
  for (const int layer : {0, 2}) EXPECT_TRUE(mixed[layer].equal(by_rotate[layer])) << layer;
}

TEST(MixTest, LayersThatDoNotFitTheModelAreNamed) {
  EXPECT_EQ(reason("layers 0,-1=bf16;rotunda2", 12), "");
  EXPECT_EQ(reason("layers 0-5=bf16;layers -6--1=rotunda2", 12), "");
  EXPECT_THAT(reason("layers 12=bf16;rotunda2", 12),
              HasSubstr("layer 12, the model has layers 0 to 11 (or -12 to -1)"));
  EXPECT_THAT(reason("layers -13=bf16;rotunda2", 12), HasSubstr("layer -13, the model has"));
  EXPECT_THAT(reason("layers 0-2147483647=bf16;rotunda2", 12), HasSubstr("layer 2147483647"));
  EXPECT_THAT(reason("layers 3-1=bf16;rotunda2", 12), HasSubstr("layers 3-1 end before they begin"));
  EXPECT_THAT(reason("layers 0,11=bf16;layers -1=fp16;rotunda2", 12), HasSubstr("layer 11 is named twice"));
  EXPECT_THAT(reason("layers 0-3,2=bf16;rotunda2", 12), HasSubstr("layer 2 is named twice"));
  EXPECT_THAT(reason("layers 0=bf16;layers 2=rotunda2", 12),
              HasSubstr("layer 1 has no format, expected '; FORMAT' at the end"));
  EXPECT_THAT(reason("layers 0-11=bf16;rotunda2", 12), HasSubstr("no layer remains for rotunda2"));
  KvModel odd = testing::small_model(2, 2, 40);
  const KvSpec spec = parse_kv_spec("layers 0=bf16;rotunda2");
  EXPECT_THAT(*kv_registry().get(spec).unsupported_reason(spec, odd), HasSubstr("head_dim 40"));
}

TEST(MixTest, PartsOfOneSpecAreOneCache) {
  const KvSpec spec = parse_kv_spec("layers 3=rotunda2;layers 0,1=bf16;layers -1=bf16;layers 2=rotunda2;rotunda3");
  const KvSpec used = kv_registry().get(spec).resolved(spec, model_of(6), nullptr);
  ASSERT_EQ(used.parts.size(), 3u);
  EXPECT_EQ(used.parts[0].layers, (std::vector<LayerRange>{{2, 3}}));
  EXPECT_EQ(used.parts[0].spec.options.at("shift"), "bias");
  EXPECT_EQ(used.parts[1].layers, (std::vector<LayerRange>{{0, 1}, {5, 5}}));
  EXPECT_EQ(used.parts[2].layers, (std::vector<LayerRange>{{4, 4}}));
}

TEST(MixTest, BitsAreThoseOfTheParts) {
  const KvModel model = model_of(4);
  const Text text = testing::random_text(model, 256, 5);
  const auto bytes = [&](const std::string& spec) {
    FusedCache fused(spec, model);
    fused.step({{fused.cache().create(), &text, 0, 256}});
    return fused.cache().usage().cache_bytes();
  };
  EXPECT_EQ(4 * bytes("layers 0=bf16;rotunda2"), bytes("bf16") + 3 * bytes("rotunda2"));
}

TEST(MixTest, ErrorsOfAPartNameTheLayerOfTheModel) {
  const KvModel model = model_of(4);
  for (const char* spec : {"layers 0,1=fp16;rotunda2:recent=0,sinks=0", "layers 0,1=rotunda2:recent=0;fp16"}) {
    FusedCache fused(spec, model);
    Text text = testing::random_text(model, 30, 6);
    text.v[3][7][1][2] = std::numeric_limits<double>::infinity();
    const SeqId seq = fused.cache().create();
    try {
      fused.step({{seq, &text, 0, 30}});
      FAIL() << "taken";
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("layer 3")) << spec;
    }
    EXPECT_EQ(fused.cache().kv_len(seq), 0);
  }
}

TEST(MixTest, ASavedMixOfOtherLayersOrPartsIsRefused) {
  const KvModel model = model_of(3);
  const Text text = testing::random_text(model, 140, 7);
  FusedCache mix("layers 0=bf16;rotunda2", model);
  const SeqId seq = mix.cache().create();
  mix.step({{seq, &text, 0, 140}});
  const ops::TensorBundle saved = mix.cache().export_sequence(seq);
  EXPECT_THAT(saved.meta("rotunda.mix"), AllOf(HasSubstr("layers 0=bf16"), HasSubstr("layers 1-2=rotunda2")));
  const auto error_of = [&](KvCache& cache, const ops::TensorBundle& bundle) -> std::string {
    try {
      cache.import_sequence(bundle);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  FusedCache other("layers 1=bf16;rotunda2", model);
  EXPECT_THAT(error_of(other.cache(), saved), HasSubstr("rotunda.mix is layers 0=bf16"));
  FusedCache single("rotunda2", model);
  EXPECT_THAT(error_of(single.cache(), saved), HasSubstr("rotunda.format is mix"));
  // Parts of two lengths: every part is whole, but they are not of one sequence.
  mix.cache().truncate(seq, 100);
  ops::TensorBundle torn = mix.cache().export_sequence(seq);
  torn.add("part.1/", saved.part("part.1/"));
  EXPECT_THAT(error_of(mix.cache(), torn), HasSubstr("part.1/ holds 140 tokens, part.0/ 100"));
  // A failed import leaves the parts counting apart; sequences made after it are still the right ones.
  const SeqId next = mix.cache().import_sequence(saved);
  EXPECT_EQ(mix.cache().kv_len(next), 140);
  EXPECT_EQ(mix.cache().kv_len(seq), 100);
  mix.cache().release(next);
  mix.cache().release(seq);
  EXPECT_EQ(mix.cache().usage().cache_bytes(), 0);
}

}  // namespace
}  // namespace rotunda::kv::mix
