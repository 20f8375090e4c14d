// The packed cache against the method itself: balance, shift, rotation, codes, unbiased scale and feedback in fp64 with dense matrices,
// written from the formulas (docs/formats.md) and sharing no code with the cache.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kv_harness.h"

namespace rotunda::kv {
namespace {

using testing::exact_attention;
using testing::FusedCache;
using testing::nmse;
using testing::Text;

at::Tensor sylvester(int64_t n) {
  at::Tensor matrix = at::ones({1, 1}, at::kDouble);
  while (matrix.size(0) < n) matrix = at::cat({at::cat({matrix, matrix}, 1), at::cat({matrix, -matrix}, 1)}, 0);
  return matrix / std::sqrt(static_cast<double>(n));
}

// Projections of unequal channels, as trained ones are: what balance and feedback live on. `bias`: size of the key bias.
ProjectionWeights random_projections(const KvModel& model, int layer, double bias) {
  at::manual_seed(100 + layer);
  ProjectionWeights weights = testing::identity_projections(model);
  const int64_t d = model.head_dim;
  const auto mix = [&](at::Tensor& weight) {
    const at::Tensor heads = weight.view({-1, d, weight.size(1)});
    const at::Tensor level = at::randn({heads.size(0), d, 1}).mul(0.7).exp();
    const at::Tensor mixing = at::eye(d) + 0.15 * at::randn({heads.size(0), d, d});
    weight = (level * at::bmm(mixing, heads)).reshape(weight.sizes());
  };
  mix(weights.q_weight);
  mix(weights.k_weight);
  weights.input_gain = at::rand({weights.q_weight.size(1)}) + 0.5;
  // The norm's gain stands in front of the weights; the harness has no norm, so it goes into the text (see projected()).
  if (bias > 0) {
    weights.k_bias = at::zeros({model.kv_channels()});
    weights.q_bias = at::randn({int64_t{model.n_heads} * d}) * 0.3;
    weights.v_bias = at::randn({model.kv_channels()});
    // The four pairs that turn slowest, as in Qwen2.
    const at::Tensor per_head = weights.k_bias.view({model.n_kv_heads, 2, d / 2});
    per_head.narrow(2, d / 2 - 4, 4).fill_(bias);
  }
  return weights;
}

FusedCache::Projections projections(const KvModel& model, double bias = 0.0) {
  return [model, bias](int layer) { return random_projections(model, layer, bias); };
}

// Inputs of the projections, gain in.
Text random_inputs(const KvModel& model, int64_t n_tokens, uint64_t seed, const FusedCache::Projections& original) {
  at::manual_seed(seed);
  Text text;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const at::Tensor x = at::randn({n_tokens, int64_t{model.n_heads} * model.head_dim + 2 * model.kv_channels()}) *
                         original(layer).input_gain;
    const auto parts =
        x.split_with_sizes({int64_t{model.n_heads} * model.head_dim, model.kv_channels(), model.kv_channels()}, 1);
    text.q.push_back(parts[0].reshape({n_tokens, model.n_heads, model.head_dim}));
    text.k.push_back(parts[1].reshape({n_tokens, model.n_kv_heads, model.head_dim}));
    text.v.push_back(parts[2].reshape({n_tokens, model.n_kv_heads, model.head_dim}));
    text.hidden.push_back(at::randn({n_tokens, model.hidden_size}));
  }
  return text;
}

// The queries, keys and values that the unfused projections make of these inputs.
Text projected(const KvModel& model, const Text& inputs, const FusedCache::Projections& original) {
  Text text = inputs;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const ProjectionWeights w = original(layer);
    const at::Tensor x = testing::projection_input(inputs, layer);
    text.q[layer] = testing::project(model, x, w.q_weight, w.q_bias, w.q_norm);
    text.k[layer] = testing::project(model, x, w.k_weight, w.k_bias, w.k_norm);
    text.v[layer] = testing::project(model, x, w.v_weight, w.v_bias);
  }
  return text;
}

// ---- the method ------------------------------------------------------------------------------------------------------------------

struct Method {
  int key_bits = 2;
  int value_bits = 2;
  bool balance = true;
  bool feedback = true;
  bool unbiased = true;
  int64_t recent = 64;
  int64_t first = 4;
};

double step_candidate(int bits, int i) {
  const double first = bits == 2 ? 0.40 : bits == 3 ? 0.20 : 0.10;
  const double last = bits == 2 ? 0.65 : bits == 3 ? 0.36 : 0.22;
  return first + i * (last - first) / (bits == 2 ? 5 : 4);
}

// x [N, d] -> decoded [N, d]. feedback: S [d, d] in the rotated basis, or undefined.
at::Tensor fake_quantize(const at::Tensor& x, int bits, bool unbiased, const at::Tensor& s) {
  const double top = std::pow(2.0, bits) - 1;
  const auto codes = [&](const at::Tensor& y, const at::Tensor& step) {
    return ((y / (2 * step)).floor() + std::pow(2.0, bits - 1)).clamp(0, top) * 2 - top;
  };
  const at::Tensor rms = x.square().mean(1, true).sqrt();
  at::Tensor best_c, best_gain, best_step;
  for (int i = 0; i < (bits == 2 ? 6 : 5); ++i) {
    const at::Tensor step = rms * step_candidate(bits, i);
    const at::Tensor c = codes(x, step);
    const at::Tensor gain = (x * c).sum(1, true).square() / c.square().sum(1, true);
    if (i == 0) {
      best_c = c, best_gain = gain, best_step = step;
      continue;
    }
    const at::Tensor better = gain > best_gain;
    best_c = at::where(better, c, best_c);
    best_step = at::where(better, step, best_step);
    best_gain = at::where(better, gain, best_gain);
  }
  if (s.defined()) {
    const at::Tensor identity = at::eye(s.size(0), at::kDouble);
    const at::Tensor upper =
        at::linalg_cholesky(at::linalg_inv(s + 0.01 * s.diagonal().mean() * identity), /*upper=*/true);
    at::Tensor least;
    for (const double factor : {1.0, 1.07, 0.93, 1.15, 0.87, 1.25, 0.81}) {
      const at::Tensor step = best_step / factor;
      const at::Tensor plain = codes(x, step);
      const at::Tensor scale = (x * plain).sum(1, true) / plain.square().sum(1, true);
      at::Tensor y = x.clone();
      at::Tensor c = at::zeros_like(x);
      at::Tensor cost = at::zeros_like(scale);
      for (int64_t i = 0; i < x.size(1); ++i) {
        const at::Tensor ci = codes(y.narrow(1, i, 1), step);
        c.narrow(1, i, 1).copy_(ci);
        const at::Tensor e = (y.narrow(1, i, 1) - scale * ci) / upper[i][i];
        cost = cost + e.square();
        y = y - e * upper[i].unsqueeze(0) * (at::arange(x.size(1)) > i);
      }
      const at::Tensor better = least.defined() ? cost.lt(least) : cost.ge(0.0);
      best_c = at::where(better, c, best_c);
      least = least.defined() ? at::minimum(cost, least) : cost;
    }
  }
  const at::Tensor yc = (x * best_c).sum(1, true);
  const at::Tensor scale = unbiased ? x.square().sum(1, true) / yc : yc / best_c.square().sum(1, true);
  return scale.to(at::kHalf).to(at::kDouble) * best_c;
}

// x R_n for positions 0 .. T - 1. x [T, heads, d] fp64, angles [T, d / 2].
at::Tensor turn(const at::Tensor& x, const at::Tensor& angles) {
  const int64_t half = x.size(2) / 2;
  const at::Tensor c = angles.cos().unsqueeze(1), s = angles.sin().unsqueeze(1);
  const at::Tensor a = x.narrow(2, 0, half), b = x.narrow(2, half, half);
  return at::cat({a * c - b * s, b * c + a * s}, 2);
}

at::Tensor angles_of(const KvModel& model, int64_t n_tokens) {
  return at::arange(n_tokens, at::kDouble).unsqueeze(1) * at::tensor(model.rope.inv_freq(0), at::kDouble);
}

// E[R_n^T M R_n] by brute force: every position's turn of rows and columns.
at::Tensor rope_average(const KvModel& model, const at::Tensor& m, int64_t n_positions) {
  const at::Tensor angles = angles_of(model, n_positions);
  at::Tensor sum = at::zeros_like(m);
  for (int64_t n = 0; n < n_positions; ++n) {
    const at::Tensor angle = angles.narrow(0, n, 1).expand({m.size(0), -1});
    const at::Tensor rows = turn(m.unsqueeze(1), angle).squeeze(1);
    sum += turn(rows.t().contiguous().unsqueeze(1), angle).squeeze(1).t();
  }
  return sum / static_cast<double>(n_positions);
}

// Attention in which every token sees the packed form of keys and values but for the first tokens and the newest.
at::Tensor method_attention(const KvModel& model, const Text& text, const FusedCache::Projections& original,
                            int64_t n_tokens, const Method& m) {
  const int64_t rep = model.n_heads / model.n_kv_heads, d = model.head_dim, half = d / 2;
  const at::Tensor h = sylvester(d);
  const at::Tensor angles = angles_of(model, n_tokens);
  std::vector<at::Tensor> outs;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const ProjectionWeights w = original(layer);
    const auto rows = [&](const at::Tensor& weight) {
      return (weight.to(at::kDouble) * w.input_gain.to(at::kDouble)).view({-1, d, weight.size(1)});
    };
    const at::Tensor wq = rows(w.q_weight), wk = rows(w.k_weight);
    const at::Tensor q_bias =
        w.q_bias.defined() ? w.q_bias.to(at::kDouble).view({-1, d}) : at::zeros({model.n_heads, d}, at::kDouble);
    const at::Tensor mu =
        w.k_bias.defined() ? w.k_bias.to(at::kDouble).view({-1, d}) : at::zeros({model.n_kv_heads, d}, at::kDouble);
    const at::Tensor q = turn(text.q[layer].slice(0, 0, n_tokens).to(at::kDouble), angles);
    const at::Tensor k = text.k[layer].slice(0, 0, n_tokens).to(at::kDouble);
    const at::Tensor v = text.v[layer].slice(0, 0, n_tokens).to(at::kDouble);
    std::vector<at::Tensor> heads;
    for (int64_t g = 0; g < model.n_kv_heads; ++g) {
      at::Tensor moment = at::zeros({d, d}, at::kDouble);
      for (int64_t r = g * rep; r < (g + 1) * rep; ++r)
        moment += (at::matmul(wq[r], wq[r].t()) + at::outer(q_bias[r], q_bias[r])) / static_cast<double>(rep);
      const at::Tensor q_energy = moment.diagonal().narrow(0, 0, half) + moment.diagonal().narrow(0, half, half);
      const at::Tensor k_energy =
          wk[g].square().sum(1).narrow(0, 0, half) + wk[g].square().sum(1).narrow(0, half, half);
      const at::Tensor lambda = m.balance ? (q_energy / k_energy).pow(0.25) : at::ones({half}, at::kDouble);
      const at::Tensor factor = at::cat({lambda, lambda});
      at::Tensor s;
      if (m.feedback) {
        s = rope_average(model, moment / factor / factor.unsqueeze(1), model.rope.spec().max_position_embeddings);
        s = at::matmul(at::matmul(h.t(), s), h);
      }
      const at::Tensor mu_turned = turn(mu[g].view({1, 1, d}).expand({n_tokens, 1, d}), angles).squeeze(1);
      const at::Tensor k_turned = turn(k.narrow(1, g, 1), angles).squeeze(1);
      const at::Tensor y = at::matmul((k_turned - mu_turned) * factor, h);
      const at::Tensor k_coded = at::matmul(fake_quantize(y, m.key_bits, m.unbiased, s), h.t()) / factor + mu_turned;
      const at::Tensor v_head = v.select(1, g);
      const at::Tensor v_coded = at::matmul(fake_quantize(at::matmul(v_head, h), m.value_bits, m.unbiased, {}), h.t());
      const at::Tensor place = at::arange(n_tokens, at::kLong);
      const at::Tensor distance = place.unsqueeze(1) - place.unsqueeze(0);
      const at::Tensor exact = distance.lt(m.recent).logical_or(place.lt(m.first).unsqueeze(0));
      for (int64_t r = g * rep; r < (g + 1) * rep; ++r) {
        const at::Tensor query = q.select(1, r);
        const at::Tensor scores =
            at::where(exact, at::matmul(query, k_turned.t()), at::matmul(query, k_coded.t())) * model.softmax_scale;
        const at::Tensor p = scores.masked_fill(distance.lt(0), -std::numeric_limits<double>::infinity()).softmax(-1);
        heads.push_back(at::matmul(p.masked_fill(exact.logical_not(), 0.0), v_head) +
                        at::matmul(p.masked_fill(exact, 0.0), v_coded));
      }
    }
    outs.push_back(at::stack(heads, 1));
  }
  return at::stack(outs);
}

struct Case {
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.spec; }
  std::string spec;
  Method method;
  double bias = 0.0;
};

KvModel test_model() {
  KvModel model = testing::small_model(8, 4, 64);
  ops::RopeSpec rope;
  rope.head_dim = 64;
  rope.max_position_embeddings = 512;
  model.rope = ops::Rope(rope);
  return model;
}

class HouseCacheTest : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kTokens = 210;
  // Codes agree with fp64 but for ties; feedback carries a flipped code's error on to the codes behind it.
  static constexpr double kTolerance = 1e-3;
  // Keys that leave the window have been through fp16, which turns a code in a thousand (more where the largest channels are tens of
  // times the smallest), and the codes behind it; decode rounds the query to 8 bits. The codes themselves lose 0.1 and more.
  static constexpr double kDecodeTolerance = 1.2e-2;

  KvModel model_ = test_model();
  FusedCache::Projections original_ = projections(model_, GetParam().bias);
  Text inputs_ = random_inputs(model_, kTokens, 3, original_);
  at::Tensor expected_ =
      method_attention(model_, projected(model_, inputs_, original_), original_, kTokens, GetParam().method);
};

TEST_P(HouseCacheTest, QuantizeAllIsTheMethod) {
  FusedCache fused(parse_kv_spec(GetParam().spec), model_, original_);
  const SeqId seq = fused.cache().create();
  EXPECT_LT(nmse(fused.step({{seq, &inputs_, 0, kTokens}}, StepKind::kQuantizeAll), expected_), kTolerance);
}

TEST_P(HouseCacheTest, DecodingTokenByTokenIsTheMethod) {
  FusedCache fused(parse_kv_spec(GetParam().spec), model_, original_);
  const SeqId seq = fused.cache().create();
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < kTokens; ++t) outs.push_back(fused.step({{seq, &inputs_, t, t + 1}}));
  EXPECT_LT(nmse(at::cat(outs, 1), expected_), kDecodeTolerance);
}

TEST_P(HouseCacheTest, DecodingAfterAPromptIsTheMethod) {
  FusedCache fused(parse_kv_spec(GetParam().spec), model_, original_);
  const SeqId seq = fused.cache().create();
  fused.step({{seq, &inputs_, 0, 90}});
  fused.step({{seq, &inputs_, 90, 150}});
  std::vector<at::Tensor> outs;
  for (int64_t t = 150; t < kTokens; ++t) outs.push_back(fused.step({{seq, &inputs_, t, t + 1, false}}));
  EXPECT_LT(nmse(at::cat(outs, 1), expected_.slice(1, 150)), kDecodeTolerance);
}

// Sinks off: which tokens they are is a matter of the layer's input (conformance and sinks_test see to it).
INSTANTIATE_TEST_SUITE_P(
    Variants, HouseCacheTest,
    ::testing::Values(Case{"rotunda2:sinks=0", {}},
                      Case{"rotunda2:sinks=0,recent=0,first=0", {.recent = 0, .first = 0}},
                      Case{"rotunda2:sinks=0,recent=16,feedback=none", {.feedback = false, .recent = 16}},
                      Case{"rotunda2:sinks=0,recent=16,balance=none", {.balance = false, .recent = 16}},
                      Case{"rotunda2:sinks=0,recent=16,scale=least_squares", {.unbiased = false, .recent = 16}},
                      Case{"rotunda2:sinks=0,recent=16,shift_pairs=1", {.recent = 16}, 8.0},
                      Case{"rotunda2:sinks=0,recent=16,values=4", {.value_bits = 4, .recent = 16}},
                      Case{"rotunda3:sinks=0,recent=16", {.key_bits = 3, .value_bits = 3, .recent = 16}},
                      Case{"rotunda4:sinks=0,recent=16", {.key_bits = 4, .value_bits = 4, .recent = 16}, 5.0}));

// ---- properties ------------------------------------------------------------------------------------------------------------------

at::Tensor run(FusedCache& fused, const Text& inputs, int64_t prompt, int64_t n_tokens) {
  const SeqId seq = fused.cache().create();
  std::vector<at::Tensor> outs{fused.step({{seq, &inputs, 0, prompt}})};
  for (int64_t t = prompt; t < n_tokens; ++t) outs.push_back(fused.step({{seq, &inputs, t, t + 1, false}}));
  return at::cat(outs, 1);
}

ops::RopeSpec rope_spec(ops::RopeType type) {
  ops::RopeSpec spec;
  spec.type = type;
  spec.head_dim = 64;
  spec.theta = 1e6;
  spec.max_position_embeddings = 100;  // `dynamic` grows within the test
  spec.original_max_position_embeddings = 64;
  if (type != ops::RopeType::kDefault) spec.factor = 4.0;
  if (type == ops::RopeType::kYarn) spec.attention_factor = 1.14;
  return spec;
}

class HouseRopeTest : public ::testing::TestWithParam<ops::RopeType> {};

TEST_P(HouseRopeTest, AllExactTokensGiveExactAttention) {
  KvModel model = test_model();
  model.rope = ops::Rope(rope_spec(GetParam()));
  const auto original = projections(model, 3.0);
  const Text inputs = random_inputs(model, 120, 5, original);
  FusedCache exact(parse_kv_spec("fp32"), model, original);
  FusedCache fused(parse_kv_spec("rotunda2:recent=128"), model, original);
  // fp16 keeps 11 bits of keys and values.
  EXPECT_LT(nmse(run(fused, inputs, 80, 120), run(exact, inputs, 80, 120)), 1e-6);
}

// A key bias like Qwen2's costs nothing when it is shifted, and spoils the cache when it is not.
TEST_P(HouseRopeTest, ALargeKeyBiasIsGivenBackExactly) {
  KvModel model = test_model();
  model.rope = ops::Rope(rope_spec(GetParam()));
  const Text inputs = random_inputs(model, 260, 5, projections(model));
  const auto loss = [&](const std::string& spec, double bias) {
    FusedCache exact(parse_kv_spec("fp32"), model, projections(model, bias));
    FusedCache fused(parse_kv_spec(spec), model, projections(model, bias));
    const at::Tensor want = run(exact, inputs, 230, 260), got = run(fused, inputs, 230, 260);
    return nmse(got.slice(1, 230), want.slice(1, 230));
  };
  const double shifted = loss("rotunda4:recent=8", 60.0);
  EXPECT_LT(shifted, 2 * loss("rotunda4:recent=8", 0.0));
  EXPECT_GT(loss("rotunda4:recent=8,shift=none,balance=none", 60.0), 10 * shifted);
}

std::string rope_name(const ::testing::TestParamInfo<ops::RopeType>& info) {
  static constexpr const char* kNames[] = {"default", "linear", "dynamic", "llama3", "yarn"};
  return kNames[static_cast<int>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(RopeTypes, HouseRopeTest,
                         ::testing::Values(ops::RopeType::kDefault, ops::RopeType::kLinear, ops::RopeType::kDynamic,
                                           ops::RopeType::kLlama3, ops::RopeType::kYarn),
                         rope_name);

TEST(HouseFormatTest, HowMagnitudeIsSplitBetweenQueriesAndKeysDoesNotMatter) {
  const KvModel model = test_model();
  const auto original = projections(model, 2.0);
  const auto split = [&](int layer) {
    ProjectionWeights w = original(layer);
    at::manual_seed(9 + layer);
    const at::Tensor exponent = at::randint(-6, 7, {model.n_kv_heads, model.head_dim / 2}).to(at::kFloat);
    const at::Tensor factor = at::pow(2.0, at::cat({exponent, exponent}, 1));  // powers of two: exact
    w.k_weight = w.k_weight * factor.view({-1, 1});
    w.k_bias = w.k_bias * factor.flatten();
    const at::Tensor inverse = factor.reciprocal().repeat_interleave(model.n_heads / model.n_kv_heads, 0);
    w.q_weight = w.q_weight * inverse.view({-1, 1});
    w.q_bias = w.q_bias * inverse.flatten();
    return w;
  };
  const Text inputs = random_inputs(model, 200, 6, original);
  FusedCache whole(parse_kv_spec("rotunda2:recent=8"), model, original);
  FusedCache halved(parse_kv_spec("rotunda2:recent=8"), model, split);
  // lambda differs in its last bit, which turns codes on a tie.
  EXPECT_LT(nmse(run(halved, inputs, 150, 200), run(whole, inputs, 150, 200)), 1e-3);
  FusedCache unbalanced(parse_kv_spec("rotunda2:recent=8,balance=none"), model, split);
  EXPECT_GT(nmse(run(unbalanced, inputs, 150, 200), run(whole, inputs, 150, 200)), 1e-2);
}

TEST(HouseFormatTest, QkNormGainsCarryTheBalance) {
  KvModel model = test_model();
  model.key_norm = true;
  const auto original = [&](int layer) {
    ProjectionWeights w = random_projections(model, layer, 0.0);
    w.k_norm = at::randn({model.head_dim}).mul(0.8).exp();
    w.q_norm = w.k_norm.reciprocal();
    return w;
  };
  const Text inputs = random_inputs(model, 100, 7, original);
  FusedCache exact(parse_kv_spec("fp32"), model, original);
  FusedCache fused(parse_kv_spec("rotunda2:recent=128"), model, original);
  EXPECT_LT(nmse(run(fused, inputs, 60, 100), run(exact, inputs, 60, 100)), 1e-6);
  FusedCache balanced(parse_kv_spec("rotunda3:recent=8"), model, original);
  FusedCache unbalanced(parse_kv_spec("rotunda3:recent=8,balance=none"), model, original);
  const at::Tensor want = run(exact, inputs, 60, 100);
  EXPECT_LT(nmse(run(balanced, inputs, 60, 100), want), nmse(run(unbalanced, inputs, 60, 100), want));
}

TEST(HouseFormatTest, ANormWithoutGainsIsRefusedUnlessUnbalanced) {
  KvModel model = test_model();
  model.key_norm = true;
  const auto original = [&](int layer) {
    ProjectionWeights w = random_projections(model, layer, 0.0);
    w.q_norm = w.k_norm = at::Tensor();
    return w;
  };
  try {
    FusedCache fused(parse_kv_spec("rotunda2"), model, original);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kUser);
    EXPECT_THAT(error.what(), ::testing::HasSubstr("balance=none runs without"));
  }
  FusedCache fused(parse_kv_spec("rotunda2:balance=none"), model, original);
}

TEST(HouseFormatTest, BitsPerElementAreCodesAndOneScaleATokenAndHead) {
  for (const int head_dim : {64, 128}) {
    const KvModel model = testing::small_model(8, 4, head_dim);
    const Text text = testing::random_text(model, 256, 6);
    for (const auto& [spec, bits] :
         {std::pair{"rotunda2", 2.0}, {"rotunda3", 3.0}, {"rotunda4", 4.0}, {"rotunda2:values=4", 3.0}}) {
      KvSpec exactless = parse_kv_spec(spec);
      for (const char* option : {"recent", "sinks", "first"}) exactless.options[option] = "0";
      FusedCache fused(exactless, model);
      const SeqId seq = fused.cache().create();
      fused.step({{seq, &text, 0, 256}});
      EXPECT_DOUBLE_EQ(fused.cache().usage().bits_per_element(), bits + 16.0 / head_dim) << spec;
    }
  }
}

// ---- calibration -----------------------------------------------------------------------------------------------------------------

ops::TensorBundle calibrate(const KvModel& model, const Text& text) {
  const auto calibrator = kv_registry().get("rotunda2").make_calibrator(model);
  for (int layer = 0; layer < model.n_layers; ++layer)
    calibrator->observe(layer, {text.q[layer], text.k[layer], text.v[layer], text.hidden[layer]});
  return calibrator->finish();
}

TEST(HouseCalibrationTest, MomentsAreThoseOfTheText) {
  const KvModel model = test_model();
  const Text text = projected(model, random_inputs(model, 100, 5, projections(model, 4.0)), projections(model, 4.0));
  EXPECT_THROW(kv_registry().get("rotunda2").make_calibrator(model)->finish(), Error);
  const ops::TensorBundle bundle = calibrate(model, text);
  const at::Tensor angles = angles_of(model, 100);
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const at::Tensor k = text.k[layer].to(at::kDouble);
    EXPECT_LT(nmse(bundle.tensors.at("key_mean")[layer], k.mean(0)), 1e-10);
    EXPECT_LT(nmse(bundle.tensors.at("key_variance")[layer], k.var(0, /*unbiased=*/false)), 1e-10);
    const at::Tensor q = turn(text.q[layer].to(at::kDouble), angles).view({100, model.n_kv_heads, -1, model.head_dim});
    const at::Tensor moment = at::einsum("tgri,tgrj->gij", {q, q}) / 200.0;
    EXPECT_LT(nmse(bundle.tensors.at("query_moment")[layer], moment), 1e-10);
  }
}

TEST(HouseCalibrationTest, TheMeanIsGivenBackAndHelps) {
  const KvModel model = test_model();
  const auto original = testing::identity_projections;
  const Text text = testing::random_text(model, 240, 15);  // keys with a stable mean of each channel, and no bias
  const KvFormat& format = kv_registry().get("rotunda2");
  const at::Tensor exact = exact_attention(model, text, 240);
  const auto loss = [&](const std::string& spec_text, const ops::TensorBundle* calibration) {
    FusedCache fused(
        parse_kv_spec(spec_text), model, [&](int) { return original(model); }, calibration);
    const SeqId seq = fused.cache().create();
    return nmse(fused.step({{seq, &text, 0, 240}}, StepKind::kQuantizeAll), exact);
  };
  const ops::TensorBundle calibration = calibrate(model, text);
  EXPECT_LT(loss("rotunda2:recent=0", &calibration), 0.5 * loss("rotunda2:recent=0", nullptr));
  EXPECT_EQ(format.resolved(parse_kv_spec("rotunda2"), model, &calibration).options.at("shift"), "mean");
  EXPECT_EQ(format.resolved(parse_kv_spec("rotunda2"), model, nullptr).options.at("shift"), "bias");
}

TEST(HouseCalibrationTest, WhatDoesNotFitIsRefusedByName) {
  const KvModel model = test_model();
  const KvFormat& format = kv_registry().get("rotunda2");
  const ops::TensorBundle good = calibrate(model, testing::random_text(model, 50, 1));
  format.check_calibration(parse_kv_spec("rotunda2"), model, good);
  for (const auto& [name, tensor] : good.tensors) {
    const auto refused = [&, name = name](const at::Tensor& replacement) {
      ops::TensorBundle bundle = good;
      bundle.tensors.erase(name);
      if (replacement.defined()) bundle.tensors[name] = replacement;
      try {
        format.check_calibration(parse_kv_spec("rotunda2"), model, bundle);
        FAIL() << name << " accepted";
      } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::kUser);
        EXPECT_THAT(error.what(), ::testing::HasSubstr(name));
      }
    };
    refused({});
    refused(at::full_like(tensor, std::numeric_limits<double>::quiet_NaN()));
    refused(tensor.to(at::kDouble));
  }
  EXPECT_THROW(format.check_calibration(parse_kv_spec("rotunda2"), testing::small_model(8, 2, 64), good), Error);
}

TEST(HouseFormatTest, OptionsSayWhatTheyWant) {
  const KvFormat& format = kv_registry().get("rotunda2");
  for (const auto& [spec, expected] :
       {std::pair{"rotunda2:balance=yes", "balance=yes, expected one of: auto, weights, calibrated, none"},
        {"rotunda2:shift=key", "shift=key"},
        {"rotunda2:values=5", "values=5, expected a number from 2 to 4"},
        {"rotunda2:shift_pairs=2", "shift_pairs=2"},
        {"rotunda2:zero=code", "option 'zero' is unknown"}}) {
    try {
      format.validate(parse_kv_spec(spec));
      FAIL() << spec << " accepted";
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), ::testing::HasSubstr(expected));
    }
  }
  EXPECT_EQ(format.calibration_use(parse_kv_spec("rotunda2")), CalibrationUse::kOptional);
  EXPECT_EQ(format.calibration_use(parse_kv_spec("rotunda2:shift=mean")), CalibrationUse::kRequired);
  EXPECT_EQ(format.calibration_use(parse_kv_spec("rotunda2:shift=bias,balance=weights,feedback=none")),
            CalibrationUse::kNone);
}

}  // namespace
}  // namespace rotunda::kv
