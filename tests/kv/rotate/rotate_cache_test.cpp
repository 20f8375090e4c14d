// The packed cache against the method itself: fake quantization in fp64 with dense matrices, written from the paper's formulas and
// sharing no code with the cache.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kv_harness.h"

namespace rotunda::kv {
namespace {

using testing::FusedCache;
using testing::nmse;
using testing::random_text;
using testing::small_model;
using testing::Text;

at::Tensor sylvester(int64_t n) {
  at::Tensor matrix = at::ones({1, 1}, at::kDouble);
  while (matrix.size(0) < n) matrix = at::cat({at::cat({matrix, matrix}, 1), at::cat({matrix, -matrix}, 1)}, 0);
  return matrix / std::sqrt(static_cast<double>(n));
}

struct Method {
  int bits = 2;
  double clip = 0.8;
  bool minimum = false;
  int64_t group = 128;
  int64_t recent = 0;
  bool two_sinks = false;  // tokens 0 and 37, which have massive layer inputs in random_text
};

// x [T, channels], groups of `group` neighbours, per token: min-max with clipping (RotateKV, section 2 of the method).
at::Tensor fake_quantize(const at::Tensor& x, const Method& m) {
  const double top = std::pow(2.0, m.bits) - 1;
  const at::Tensor groups = x.reshape({x.size(0), -1, m.group});
  const at::Tensor low = m.clip * groups.amin(-1, true);
  const at::Tensor high = m.clip * groups.amax(-1, true);
  const auto fp16 = [](const at::Tensor& t) { return t.to(at::kFloat).to(at::kHalf).to(at::kDouble); };
  const at::Tensor scale = fp16((high - low) / top);
  if (m.minimum) {
    const at::Tensor base = fp16(low);
    return (scale * ((groups - base) / scale).round().clamp(0, top) + base).reshape(x.sizes());
  }
  const at::Tensor zero = (-low / scale).round();
  return (scale * (((groups / scale).round() + zero).clamp(0, top) - zero)).reshape(x.sizes());
}

// Attention in which every token sees the quantized form of keys and values but for sinks and the newest `recent`.
at::Tensor method_attention(const KvModel& model, const Text& text, int64_t n_tokens, const Method& m, const at::Tensor& perm) {
  const int64_t heads_per_group = std::gcd(4, model.n_kv_heads);
  const at::Tensor key_matrix = sylvester(heads_per_group * model.head_dim);
  const at::Tensor value_matrix = sylvester(model.head_dim);
  const auto [cos, sin] = model.rope.cos_sin(at::arange(n_tokens, at::kLong), n_tokens);
  const auto turned = [&](const at::Tensor& x) { return ops::apply_rope(x, cos, sin).to(at::kDouble).transpose(0, 1); };
  const int64_t rep = model.n_heads / model.n_kv_heads;
  std::vector<at::Tensor> outs;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const at::Tensor k = text.k[layer].slice(0, 0, n_tokens).to(at::kDouble);
    const at::Tensor v = text.v[layer].slice(0, 0, n_tokens).to(at::kDouble);
    at::Tensor rotated = at::matmul(k.reshape({n_tokens, -1, key_matrix.size(0)}), key_matrix).flatten(1);
    at::Tensor coded = rotated;
    if (perm.defined()) {
      const at::Tensor order = perm[layer].to(at::kLong);
      coded = at::empty_like(rotated);
      coded.index_copy_(1, order, fake_quantize(rotated.index_select(1, order), m));
    } else {
      coded = fake_quantize(rotated, m);
    }
    const at::Tensor k_coded = at::matmul(coded.reshape({n_tokens, -1, key_matrix.size(0)}), key_matrix.t()).reshape(k.sizes());
    const at::Tensor v_coded =
        at::matmul(fake_quantize(at::matmul(v, value_matrix).flatten(1), m).reshape(v.sizes()), value_matrix.t());
    const auto per_head = [&](const at::Tensor& x) { return x.repeat_interleave(rep, 0); };
    const at::Tensor q = turned(text.q[layer].slice(0, 0, n_tokens));
    const at::Tensor scores_coded = at::matmul(q, per_head(turned(k_coded.to(at::kFloat))).transpose(1, 2)) * model.softmax_scale;
    const at::Tensor scores_exact = at::matmul(q, per_head(turned(k.to(at::kFloat))).transpose(1, 2)) * model.softmax_scale;
    const at::Tensor place = at::arange(n_tokens, at::kLong);
    const at::Tensor distance = place.unsqueeze(1) - place.unsqueeze(0);
    at::Tensor exact = distance.lt(m.recent);
    if (m.two_sinks)
      for (const int64_t sink : {0, 37}) exact.select(1, sink).fill_(true);
    const at::Tensor scores =
        at::where(exact, scores_exact, scores_coded).masked_fill(distance.lt(0), -std::numeric_limits<double>::infinity());
    const at::Tensor p = scores.softmax(-1);
    const at::Tensor out = at::matmul(p.masked_fill(exact, 0.0), per_head(v_coded.transpose(0, 1))) +
                           at::matmul(p.masked_fill(exact.logical_not(), 0.0), per_head(v.transpose(0, 1)));
    outs.push_back(out.transpose(0, 1));
  }
  return at::stack(outs);
}

struct Case {
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.spec; }
  std::string spec;
  Method method;
  std::string perm;  // tensor of the calibration; empty: none
};

class RotateCacheTest : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kTokens = 210;
  // Codes agree with fp64 but for ties; what is left is fp16 sinks and windows, and fp32 arithmetic.
  static constexpr double kTolerance = 2e-5;
  // A key that leaves the window has been through fp16 (error up to 2^-11 of its size, so 1e-3 of a code's step), which turns about that
  // share of the codes to the neighbour. A wrong mask, sink or position is off by 1e-2 and more.
  static constexpr double kWindowTolerance = 2e-3;
  KvModel model_ = small_model(8, 4, 64);
  Text text_ = random_text(model_, kTokens, 3);

  double tolerance() const { return GetParam().method.recent > 0 ? kWindowTolerance : kTolerance; }

  at::Tensor expected(const FusedCache& fused) const {
    const Case& c = GetParam();
    return method_attention(model_, text_, kTokens, c.method, c.perm.empty() ? at::Tensor() : fused.calibration().tensors.at(c.perm));
  }
};

TEST_P(RotateCacheTest, QuantizeAllIsTheMethod) {
  FusedCache fused(GetParam().spec, model_);
  const SeqId seq = fused.cache().create();
  EXPECT_LT(nmse(fused.step({{seq, &text_, 0, kTokens}}, StepKind::kQuantizeAll), expected(fused)), kTolerance);
}

TEST_P(RotateCacheTest, DecodingTokenByTokenIsTheMethod) {
  if (GetParam().method.two_sinks) return;  // token by token the sinks of later tokens are not known yet: next test
  FusedCache fused(GetParam().spec, model_);
  const SeqId seq = fused.cache().create();
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < kTokens; ++t) outs.push_back(fused.step({{seq, &text_, t, t + 1}}));
  EXPECT_LT(nmse(at::cat(outs, 1), expected(fused)), tolerance());
}

TEST_P(RotateCacheTest, DecodingAfterAPromptIsTheMethod) {
  FusedCache fused(GetParam().spec, model_);
  const SeqId seq = fused.cache().create();
  fused.step({{seq, &text_, 0, 90}});
  fused.step({{seq, &text_, 90, 150}});
  std::vector<at::Tensor> outs;
  for (int64_t t = 150; t < kTokens; ++t) outs.push_back(fused.step({{seq, &text_, t, t + 1, false}}));
  EXPECT_LT(nmse(at::cat(outs, 1), expected(fused).slice(1, 150)), tolerance());
}

// With two entries, the two tokens of massive layer input are the sinks.
INSTANTIATE_TEST_SUITE_P(
    Variants, RotateCacheTest,
    ::testing::Values(Case{"rotate2:recent=0,sinks=0", {}, "rotate.perm.layer"},
                      Case{"rotate2:recent=0,sinks=0,reorder=group", {}, "rotate.perm.group"},
                      Case{"rotate2:recent=0,sinks=0,reorder=none", {}, ""},
                      Case{"rotate2:recent=0,sinks=2", {.two_sinks = true}, "rotate.perm.layer"},
                      Case{"rotate2:recent=24,sinks=2", {.recent = 24, .two_sinks = true}, "rotate.perm.layer"},
                      Case{"rotate2:recent=64,sinks=0,clip=1.0", {.clip = 1.0, .recent = 64}, "rotate.perm.layer"},
                      Case{"rotate2:recent=0,sinks=0,zero=minimum,group=64", {.minimum = true, .group = 64}, "rotate.perm.layer"},
                      Case{"rotate3:recent=5,sinks=0", {.bits = 3, .clip = 1.0, .recent = 5}, "rotate.perm.layer"},
                      Case{"rotate4:recent=0,sinks=0,zero=minimum", {.bits = 4, .clip = 1.0, .minimum = true}, "rotate.perm.layer"},
                      Case{"rotate4:recent=16,sinks=2", {.bits = 4, .clip = 1.0, .recent = 16, .two_sinks = true}, "rotate.perm.layer"}));

TEST(RotateCalibrationTest, OrdersChannelsBySignedMeanOfTheRotatedKeys) {
  const KvModel model = small_model(8, 4, 64);
  const Text text = random_text(model, 100, 5);
  const auto calibrator = kv_registry().get("rotate2").make_calibrator(model);
  EXPECT_THROW(kv_registry().get("rotate2").make_calibrator(model)->finish(), Error);
  for (const auto& [begin, end] : {std::pair{0, 60}, {60, 100}})
    for (int layer = 0; layer < model.n_layers; ++layer)
      calibrator->observe(layer, {text.q[layer], text.k[layer].slice(0, begin, end), text.v[layer], text.hidden[layer]});
  const ops::TensorBundle bundle = calibrator->finish();
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const at::Tensor rotated = at::matmul(text.k[layer].to(at::kDouble).flatten(1), sylvester(256)).mean(0);
    EXPECT_TRUE(bundle.tensors.at("rotate.perm.layer")[layer].to(at::kLong).equal(rotated.argsort(true, 0, false)));
    EXPECT_LT(nmse(bundle.tensors.at("rotate.key_mean")[layer], rotated), 1e-10);
  }
}

TEST(RotateCalibrationTest, RefusesWhatIsNoPermutationOfThisModel) {
  const KvModel model = small_model(8, 4, 64);
  FusedCache fused("rotate2", model);
  const KvFormat& format = kv_registry().get("rotate2");
  EXPECT_THROW(format.make_cache({"rotate2", {}, {}}, model, {}), Error);
  for (const int32_t bad : {-1, 256, 7}) {
    ops::TensorBundle bundle = fused.calibration();
    bundle.tensors["rotate.perm.layer"] = bundle.tensors["rotate.perm.layer"].clone();
    bundle.tensors["rotate.perm.layer"][1][3] = bad;
    bundle.tensors["rotate.perm.layer"][1][4] = 7;
    EXPECT_THROW(format.make_cache({"rotate2", {}, {}}, model, bundle), Error) << bad;
  }
  EXPECT_THROW(format.make_cache({"rotate2", {}, {}}, small_model(8, 2, 64), fused.calibration()), Error);
  EXPECT_THROW(format.make_cache({"rotate2", {}, {}}, small_model(8, 4, 128), fused.calibration()), Error);
}

TEST(RotateFormatTest, BitsPerElementAreThePublishedOnesPlusRealMetadata) {
  // 2 bits + (16-bit scale + 8-bit zero point) / 128, nothing else at recent=0,sinks=0 and full pages.
  const KvModel model = small_model(8, 4, 64);
  const Text text = random_text(model, 256, 6);
  for (const auto& [spec, bits] : {std::pair{"rotate2:recent=0,sinks=0", 2.1875}, {"rotate2:recent=0,sinks=0,zero=minimum", 2.25},
                                   {"rotate3:recent=0,sinks=0", 3.1875}, {"rotate4:recent=0,sinks=0", 4.1875}}) {
    FusedCache fused(spec, model);
    const SeqId seq = fused.cache().create();
    fused.step({{seq, &text, 0, 256}});
    EXPECT_DOUBLE_EQ(fused.cache().usage().bits_per_element(), bits) << spec;
  }
}

TEST(RotateFormatTest, SinksOfAPromptInChunksAreThoseOfThePromptAtOnce) {
  const KvModel model = small_model();
  const Text text = random_text(model, 250, 13);
  FusedCache whole("rotate2:sinks=6,recent=0", model);
  FusedCache chunked("rotate2:sinks=6,recent=0", model);
  const SeqId a = whole.cache().create();
  const SeqId b = chunked.cache().create();
  whole.step({{a, &text, 0, 250}});
  for (int64_t t = 0; t < 250; t += 50) chunked.step({{b, &text, t, t + 50}});
  const auto bundle_a = whole.cache().export_sequence(a);
  const auto bundle_b = chunked.cache().export_sequence(b);
  for (const char* layer : {"0", "1"}) {
    const std::string name = std::string("sink_positions.") + layer;
    EXPECT_TRUE(bundle_a.tensors.at(name).equal(bundle_b.tensors.at(name))) << bundle_a.tensors.at(name) << bundle_b.tensors.at(name);
  }
}

TEST(RotateFormatTest, RunningSinksAreChosenAmongGeneratedTokensPromptSinksAreNot) {
  const KvModel model = small_model();
  Text text = random_text(model, 120, 14);
  for (auto& hidden : text.hidden) hidden[80][2] = 900.0;
  for (const auto& [select, expected] : {std::pair{"prompt", false}, {"running", true}}) {
    FusedCache fused(std::string("rotate2:sinks=3,recent=8,sink_select=") + select, model);
    const SeqId seq = fused.cache().create();
    fused.step({{seq, &text, 0, 60}});
    for (int64_t t = 60; t < 120; ++t) fused.step({{seq, &text, t, t + 1, false}});
    const at::Tensor positions = fused.cache().export_sequence(seq).tensors.at("sink_positions.0");
    EXPECT_EQ(positions.eq(80).any().item<bool>(), expected) << select;
    EXPECT_TRUE(positions.eq(0).any().item<bool>());
  }
}

}  // namespace
}  // namespace rotunda::kv
