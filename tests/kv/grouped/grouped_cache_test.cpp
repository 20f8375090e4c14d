// The packed caches against the methods themselves: fake quantization in fp64 with dense matrices, written from the papers' formulas and
// sharing no code with the caches.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "kv_harness.h"

namespace rotunda::kv {
namespace {

using testing::exact_attention;
using testing::FusedCache;
using testing::nmse;
using testing::random_text;
using testing::Text;

at::Tensor fp16(const at::Tensor& x) { return x.to(at::kFloat).to(at::kHalf).to(at::kDouble); }

/// Applies f to runs of n channels: x [N, d] -> [N * d / n, n] and back.
at::Tensor by_groups(const at::Tensor& x, int64_t n, const std::function<at::Tensor(const at::Tensor&)>& f) {
  return f(x.reshape({-1, n})).reshape(x.sizes());
}

// ---- the methods: x [N, n] -> decoded, a scale per row ---------------------------------------------------------------

at::Tensor round_to_nearest(const at::Tensor& x, int bits, double clip = 1.0) {
  const double top = std::pow(2.0, bits) - 1;
  const at::Tensor high = clip * x.amax(1, true).clamp_min(0), low = clip * x.amin(1, true).clamp_max(0);
  const at::Tensor scale = fp16((high - low) / top);
  const at::Tensor zero = (-low / scale).round();
  return scale * (((x / scale).round() + zero).clamp(0, top) - zero);
}

at::Tensor block_float(const at::Tensor& x, int bits, bool symmetric = false, bool carry = true) {
  const double top = std::pow(2.0, bits - 1);
  const auto under = [&](const at::Tensor& e) {
    const at::Tensor step = at::exp2(e - (bits - 1));
    return step * (x / step).round().clamp(symmetric ? 1 - top : -top, top - 1);
  };
  const at::Tensor e = x.abs().amax(1, true).log2().floor() + 1;
  const at::Tensor plain = under(e), next = under(e + 1);
  const at::Tensor overflows = (x.abs().amax(1, true) / at::exp2(e - (bits - 1))).round().ge(top);
  const at::Tensor cheaper = (next - x).square().sum(1, true) < (plain - x).square().sum(1, true);
  return carry ? at::where(overflows.logical_and(cheaper), next, plain) : plain;
}

// Nearest of the levels (sorted).
at::Tensor nearest(const at::Tensor& x, const std::vector<double>& levels) {
  const at::Tensor table = at::tensor(levels, at::kDouble);
  const at::Tensor distance = (x.unsqueeze(-1) - table).abs();
  return table.index({distance.argmin(-1)});
}

// Max, "Quantizing for minimum distortion" (1960), table I, on the format's grid of integers.
at::Tensor lloyd_max(const at::Tensor& x, int bits, bool keep_length = false) {
  std::vector<double> upper = bits == 2 ? std::vector<double>{0.4528, 1.510}
                              : bits == 3
                                  ? std::vector<double>{0.2451, 0.7560, 1.344, 2.152}
                                  : std::vector<double>{0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733};
  std::vector<double> levels;
  for (auto it = upper.rbegin(); it != upper.rend(); ++it) levels.push_back(-*it);
  levels.insert(levels.end(), upper.begin(), upper.end());
  const double grid = bits == 2 ? 39.73 : bits == 3 ? 28.87 : 22.32;
  for (double& level : levels) level = std::round(level * grid) / grid;
  const at::Tensor scale = x.square().mean(1, true).sqrt();
  const at::Tensor coded = nearest(x / scale, levels);
  return fp16(keep_length ? (x.square().sum(1, true) / coded.square().sum(1, true)).sqrt() : scale) * coded;
}

// A float format of OCP: exponents from low on, `fraction` bits, largest `top`; ties to even.
at::Tensor small_float(const at::Tensor& x, int low, int fraction, double top) {
  const at::Tensor bounded = x.clamp(-top, top);
  const at::Tensor ulp = at::exp2(bounded.abs().clamp_min(1e-300).log2().floor().clamp_min(low) - fraction);
  return ulp * (bounded / ulp).round();
}

struct Element {
  int low, fraction;
  double top;
};
constexpr Element kE2m1{0, 1, 6.0}, kE2m3{0, 3, 7.5}, kE4m3{-6, 3, 448.0};

at::Tensor microscaling(const at::Tensor& x, const Element& e) {
  const at::Tensor scale = at::exp2(x.abs().amax(1, true).log2().floor() - std::floor(std::log2(e.top)));
  return scale * small_float(x / scale, e.low, e.fraction, e.top);
}

at::Tensor scaled_to_top(const at::Tensor& x, const Element& e, bool fp8_scale) {
  const at::Tensor wanted = x.abs().amax(1, true) / e.top;
  const at::Tensor scale = fp8_scale ? small_float(wanted, kE4m3.low, kE4m3.fraction, kE4m3.top) : fp16(wanted);
  return scale * small_float(x / scale, e.low, e.fraction, e.top);
}

at::Tensor ggml_q8_0(const at::Tensor& x) {
  const at::Tensor d = x.abs().amax(1, true) / 127;
  return fp16(d) * (x / d).round();
}

at::Tensor ggml_q4_0(const at::Tensor& x) {
  const at::Tensor d = x.gather(1, x.abs().argmax(1, true)) / -8;
  return fp16(d) * ((x / d + 8.5).floor().clamp_max(15) - 8);
}

// ---- bases, [n_kv_heads, d, d]: y = x B ------------------------------------------------------------------------------

enum class Basis { kNone, kSorted, kSortedByCalibration, kHadamard, kRandomRotation, kAttentionAware };

at::Tensor sylvester(int64_t n) {
  at::Tensor matrix = at::ones({1, 1}, at::kDouble);
  while (matrix.size(0) < n) matrix = at::cat({at::cat({matrix, matrix}, 1), at::cat({matrix, -matrix}, 1)}, 0);
  return matrix / std::sqrt(static_cast<double>(n));
}

// Largest first; keys: RoPE pairs i and i + d / 2 side by side. energy [d]
at::Tensor sorting(const at::Tensor& energy, bool keys) {
  const int64_t d = energy.size(0), half = d / 2;
  std::vector<int64_t> order;
  const at::Tensor sorted =
      keys ? at::argsort(-(energy.narrow(0, 0, half) + energy.narrow(0, half, half))) : at::argsort(-energy);
  for (int64_t i = 0; i < sorted.size(0); ++i) {
    order.push_back(sorted[i].item<int64_t>());
    if (keys) order.push_back(order.back() + half);
  }
  return at::eye(d, at::kDouble).index_select(1, at::tensor(order, at::kLong));
}

// docs/formats.md: the uniform numbers are the upper 53 bits of SplitMix64's outputs plus one, times 2^-53; its state starts at
// (2 layer + (0 for keys, 1 for values)) * 0xd1342543de82ef95.
at::Tensor random_rotations(int layer, bool keys, int64_t n_heads, int64_t d) {
  uint64_t state = (2 * static_cast<uint64_t>(layer) + (keys ? 0 : 1)) * 0xd1342543de82ef95ULL;
  std::vector<double> uniform;
  for (int64_t i = 0; i < 2 * n_heads * d * d; ++i) {
    state += 0x9e3779b97f4a7c15ULL;
    uint64_t x = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    uniform.push_back(std::ldexp(static_cast<double>(((x ^ (x >> 31)) >> 11) + 1), -53));
  }
  const at::Tensor pairs = at::tensor(uniform, at::kDouble).view({n_heads, d, d, 2});
  const at::Tensor gaussian = (-2 * pairs.select(3, 0).log()).sqrt() * (2 * M_PI * pairs.select(3, 1)).cos();
  // Rows made orthonormal in order: the transposed Q of QR with R's diagonal positive.
  const auto [q, r] = at::linalg_qr(gaussian.transpose(1, 2));
  return (q * r.diagonal(0, 1, 2).sign().unsqueeze(1)).transpose(1, 2);
}

at::Tensor attention_aware(const at::Tensor& moment) {
  const int64_t d = moment.size(0);
  const at::Tensor vectors = std::get<1>(at::linalg_eigh(moment)).flip(1);
  std::vector<int64_t> order;
  for (int64_t i = 0; i < d; ++i) {
    int64_t reversed = 0;
    for (int64_t bit = 1; bit < d; bit *= 2) reversed = 2 * reversed + ((i & bit) != 0 ? 1 : 0);
    order.push_back(reversed);
  }
  return at::matmul(vectors.index_select(1, at::tensor(order, at::kLong)), sylvester(d));
}

struct Case {
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.spec; }
  std::string spec;
  Basis basis = Basis::kNone;
  int64_t group = 64;
  std::function<at::Tensor(const at::Tensor&)> keys, values;
  int64_t recent = 0;
  int64_t first = 0;
};

/// One method for both.
Case both(std::string spec, Basis basis, int64_t group, std::function<at::Tensor(const at::Tensor&)> method) {
  return {std::move(spec), basis, group, method, method};
}

constexpr int64_t kHeadDim = 64;

// Channels of unequal size, which sorting lives on; biases, which no order may lose.
ProjectionWeights unequal_projections(const KvModel& model, int layer) {
  at::manual_seed(100 + layer);
  ProjectionWeights weights = testing::identity_projections(model);
  const auto level = [](const at::Tensor& weight) { return at::randn({weight.size(0), 1}).exp() * weight; };
  weights.k_weight = level(weights.k_weight);
  weights.v_weight = level(weights.v_weight);
  weights.v_bias = at::randn({model.kv_channels()});
  return weights;
}

Text projected(const KvModel& model, const Text& inputs) {
  Text text = inputs;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const ProjectionWeights w = unequal_projections(model, layer);
    const at::Tensor x = testing::projection_input(inputs, layer);
    text.k[layer] = testing::project(model, x, w.k_weight);
    text.v[layer] = testing::project(model, x, w.v_weight, w.v_bias);
  }
  return text;
}

at::Tensor basis_of(const KvModel& model, const Case& c, int layer, int64_t head, bool keys,
                    const ops::TensorBundle& calibration) {
  const ProjectionWeights w = unequal_projections(model, layer);
  const auto of_head = [&](const char* name) { return calibration.tensors.at(name)[layer][head].to(at::kDouble); };
  switch (c.basis) {
    case Basis::kNone:
      return at::eye(kHeadDim, at::kDouble);
    case Basis::kSorted: {
      at::Tensor energy = (keys ? w.k_weight : w.v_weight).to(at::kDouble).square().sum(1);
      if (!keys) energy = energy + w.v_bias.to(at::kDouble).square();
      return sorting(energy.view({-1, kHeadDim})[head], keys);
    }
    case Basis::kSortedByCalibration:
      return sorting(keys ? of_head("key_energy") : of_head("value_moment").diagonal(), keys);
    case Basis::kHadamard:
      return sylvester(kHeadDim);
    case Basis::kRandomRotation:
      return random_rotations(layer, keys, model.n_kv_heads, kHeadDim)[head];
    case Basis::kAttentionAware: {
      if (keys) return attention_aware(of_head("query_moment"));
      const at::Tensor mean = of_head("value_mean");
      return attention_aware(of_head("value_moment") - at::outer(mean, mean));
    }
  }
  return {};
}

// Attention in which every token sees the packed form of keys and values but for the first tokens and the newest.
at::Tensor method_attention(const KvModel& model, const Text& text, int64_t n_tokens, const Case& c,
                            const ops::TensorBundle& calibration) {
  const int64_t rep = model.n_heads / model.n_kv_heads;
  const auto [cos, sin] = model.rope.cos_sin(at::arange(n_tokens, at::kLong), n_tokens);
  const auto turned = [&](const at::Tensor& x) {
    return ops::apply_rope(x.slice(0, 0, n_tokens), cos, sin).to(at::kDouble);
  };
  const at::Tensor place = at::arange(n_tokens, at::kLong);
  const at::Tensor distance = place.unsqueeze(1) - place.unsqueeze(0);
  const at::Tensor exact = distance.lt(c.recent).logical_or(place.lt(c.first).unsqueeze(0));
  std::vector<at::Tensor> outs;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const at::Tensor q = turned(text.q[layer]), k = turned(text.k[layer]);
    const at::Tensor v = text.v[layer].slice(0, 0, n_tokens).to(at::kDouble);
    std::vector<at::Tensor> heads;
    for (int64_t g = 0; g < model.n_kv_heads; ++g) {
      const auto coded = [&](const at::Tensor& x, bool keys) {
        const at::Tensor basis = basis_of(model, c, layer, g, keys, calibration);
        return at::matmul(by_groups(at::matmul(x, basis), c.group, keys ? c.keys : c.values), basis.t());
      };
      const at::Tensor key = k.select(1, g), value = v.select(1, g);
      const at::Tensor k_coded = coded(key, true), v_coded = coded(value, false);
      for (int64_t r = g * rep; r < (g + 1) * rep; ++r) {
        const at::Tensor query = q.select(1, r);
        const at::Tensor scores =
            at::where(exact, at::matmul(query, key.t()), at::matmul(query, k_coded.t())) * model.softmax_scale;
        const at::Tensor p = scores.masked_fill(distance.lt(0), -std::numeric_limits<double>::infinity()).softmax(-1);
        heads.push_back(at::matmul(p.masked_fill(exact.logical_not(), 0.0), value) +
                        at::matmul(p.masked_fill(exact, 0.0), v_coded));
      }
    }
    outs.push_back(at::stack(heads, 1));
  }
  return at::stack(outs);
}

class GroupedCacheTest : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kTokens = 150;
  // Codes agree with fp64 but for elements that fp32 puts on the other side of a tie: a few of 200,000.
  static constexpr double kTolerance = 1e-4;
  // Decode rounds queries to 8 bits: 1/254 of a group's largest element each, in scores that reach some tens here. Tokens of a window have
  // been through fp16, which turns a code in a hundred at 4 bits.
  static constexpr double kDecodeTolerance = 4e-3;

  KvModel model_ = testing::small_model(8, 4, kHeadDim);
  FusedCache::Projections original_ = [this](int layer) { return unequal_projections(model_, layer); };
  Text inputs_ = random_text(model_, kTokens, 3);
  FusedCache fused_{parse_kv_spec(GetParam().spec), model_, original_};
  at::Tensor expected_ =
      method_attention(model_, projected(model_, inputs_), kTokens, GetParam(), fused_.calibration());
};

TEST_P(GroupedCacheTest, QuantizeAllIsTheMethod) {
  const SeqId seq = fused_.cache().create();
  EXPECT_LT(nmse(fused_.step({{seq, &inputs_, 0, kTokens}}, StepKind::kQuantizeAll), expected_), kTolerance);
}

TEST_P(GroupedCacheTest, DecodingTokenByTokenIsTheMethod) {
  const SeqId seq = fused_.cache().create();
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < kTokens; ++t) outs.push_back(fused_.step({{seq, &inputs_, t, t + 1}}));
  // At recent=0 too the token of the step is read back from its page.
  EXPECT_LT(nmse(at::cat(outs, 1), expected_), kDecodeTolerance);
}

// On a Gaussian the packed levels reach what Max's table gives. Here of values, which attention to a single token returns.
TEST(Turbo, DistortionIsThatOfLloydMax) {
  const KvModel model = testing::small_model(4, 4, 256);
  const double least[] = {0.1175, 0.03454, 0.009497};
  for (const int bits : {2, 3, 4}) {
    FusedCache fused(concat("turbo", bits), model);
    double error = 0;
    constexpr int kRuns = 12;
    for (int run = 0; run < kRuns; ++run) {
      const Text one = random_text(model, 1, 1000 + run);
      const SeqId seq = fused.cache().create();
      error += nmse(fused.step({{seq, &one, 0, 1}}, StepKind::kQuantizeAll), exact_attention(model, one, 1)) / kRuns;
    }
    const double expected = least[bits - 2];
    // 25,000 elements: a standard error of about 1 %; the tails of a vector of given length are lighter than a Gaussian's, worth 6 / d.
    EXPECT_NEAR(error, expected, 0.05 * expected) << bits;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, GroupedCacheTest,
    ::testing::Values(
        both("int2", Basis::kNone, 64, [](const at::Tensor& x) { return round_to_nearest(x, 2); }),
        both("int3:group=32", Basis::kNone, 32, [](const at::Tensor& x) { return round_to_nearest(x, 3); }),
        both("int8", Basis::kNone, 64, [](const at::Tensor& x) { return round_to_nearest(x, 8); }),
        both("quarot2", Basis::kHadamard, 64, [](const at::Tensor& x) { return round_to_nearest(x, 2); }),
        both("quarot4:group=16", Basis::kHadamard, 16, [](const at::Tensor& x) { return round_to_nearest(x, 4); }),
        both("bfp4", Basis::kSorted, 32, [](const at::Tensor& x) { return block_float(x, 4); }),
        both("bfp3:ksort=calibration,block=16", Basis::kSortedByCalibration, 16,
             [](const at::Tensor& x) { return block_float(x, 3); }),
        both("bfp5:ksort=none,block=64,clamp=symmetric", Basis::kNone, 64,
             [](const at::Tensor& x) { return block_float(x, 5, true); }),
        both("bfp16", Basis::kSorted, 32, [](const at::Tensor& x) { return block_float(x, 8); }),
        Case{"bfp4:values=7", Basis::kSorted, 32, [](const at::Tensor& x) { return block_float(x, 4); },
             [](const at::Tensor& x) { return block_float(x, 7); }},
        both("turbo2", Basis::kRandomRotation, 64, [](const at::Tensor& x) { return lloyd_max(x, 2); }),
        both("turbo2:scale=length", Basis::kRandomRotation, 64,
             [](const at::Tensor& x) { return lloyd_max(x, 2, /*keep_length=*/true); }),
        both("turbo3", Basis::kRandomRotation, 64, [](const at::Tensor& x) { return lloyd_max(x, 3); }),
        both("turbo4", Basis::kRandomRotation, 64, [](const at::Tensor& x) { return lloyd_max(x, 4); }),
        both("q8_0", Basis::kNone, 32, ggml_q8_0), both("q4_0", Basis::kNone, 32, ggml_q4_0),
        both("fp8", Basis::kNone, 64, [](const at::Tensor& x) { return scaled_to_top(x, kE4m3, false); }),
        both("mxint8", Basis::kNone, 32, [](const at::Tensor& x) { return block_float(x, 8, true, false); }),
        both("mxfp8", Basis::kNone, 32, [](const at::Tensor& x) { return microscaling(x, kE4m3); }),
        both("mxfp6", Basis::kNone, 32, [](const at::Tensor& x) { return microscaling(x, kE2m3); }),
        both("mxfp4", Basis::kNone, 32, [](const at::Tensor& x) { return microscaling(x, kE2m1); }),
        both("nvfp4", Basis::kNone, 16, [](const at::Tensor& x) { return scaled_to_top(x, kE2m1, true); }),
        Case{"oscar2", Basis::kAttentionAware, 64, [](const at::Tensor& x) { return round_to_nearest(x, 2, 0.96); },
             [](const at::Tensor& x) { return round_to_nearest(x, 2, 0.92); }, 64, 4}));

// ---- K-sort ------------------------------------------------------------------------------------------------------------

at::Tensor all_at_once(const std::string& spec, const KvModel& model, const Text& inputs, StepKind kind) {
  FusedCache fused(parse_kv_spec(spec), model, [&](int layer) { return unequal_projections(model, layer); });
  const SeqId seq = fused.cache().create();
  return fused.step({{seq, &inputs, 0, inputs.q[0].size(0)}}, kind);
}

// With one block per head, and in 16 bits, no order of channels changes anything but the order of sums: for heads of their own and shared
// ones, biases, and whatever RoPE does to frequencies.
TEST(KSort, ChangesNothingWhereChannelsShareOneExponent) {
  using ops::RopeType;
  for (const int n_kv_heads : {4, 2, 1}) {
    for (const RopeType type :
         {RopeType::kDefault, RopeType::kLinear, RopeType::kDynamic, RopeType::kLlama3, RopeType::kYarn}) {
      KvModel model = testing::small_model(4, n_kv_heads, kHeadDim);
      ops::RopeSpec rope;
      rope.head_dim = kHeadDim;
      rope.type = type;
      rope.factor = 4.0;
      rope.max_position_embeddings = 64;
      rope.original_max_position_embeddings = 32;
      model.rope = ops::Rope(rope);
      const Text inputs = random_text(model, 100, 31);
      for (const std::string spec : {"bfp4:block=64", "bfp4:recent=100"}) {
        const at::Tensor sorted = all_at_once(spec, model, inputs, StepKind::kQuantizeAll);
        EXPECT_LT(nmse(sorted, all_at_once(spec + ",ksort=none", model, inputs, StepKind::kQuantizeAll)), 1e-11)
            << spec << n_kv_heads;
      }
    }
  }
}

TEST(KSort, LosesLessTheShorterTheBlock) {
  const KvModel model = testing::small_model(8, 4, kHeadDim);
  const Text inputs = random_text(model, 100, 32);
  const at::Tensor exact = exact_attention(model, projected(model, inputs), 100);
  // Log-normal channels: sizes within a factor of 3 for two thirds of them.
  for (const auto& [spec, share] : {std::pair{"bfp4:block=16", 0.85}, {"bfp4:block=32", 0.92}}) {
    const double sorted = nmse(all_at_once(spec, model, inputs, StepKind::kQuantizeAll), exact);
    const double plain =
        nmse(all_at_once(std::string(spec) + ",ksort=none", model, inputs, StepKind::kQuantizeAll), exact);
    EXPECT_LT(sorted, share * plain) << spec;
  }
}

// ---- options -----------------------------------------------------------------------------------------------------------

TEST(GroupedOptions, WhatDoesNotFitIsRefusedInOneLine) {
  const KvModel model = testing::small_model(4, 2, 80);
  const auto refusal = [&](const std::string& text) -> std::string {
    const KvSpec spec = parse_kv_spec(text);
    const KvFormat& format = kv_registry().get(spec.format);
    try {
      format.validate(spec);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kUser);
      return error.what();
    }
    return format.unsupported_reason(spec, model).value_or("");
  };
  EXPECT_EQ(refusal("bfp4:block=16"), "");
  EXPECT_EQ(refusal("bfp4"), "bfp4: option block=32, expected a group of channels that divides head_dim 80");
  EXPECT_EQ(refusal("q8_0"), "q8_0: its group of 32 channels does not divide head_dim 80");
  EXPECT_EQ(refusal("nvfp4"), "");
  EXPECT_EQ(refusal("int2:group=24"), "int2: option group=24, expected a multiple of 16 from 16 to 1024");
  EXPECT_EQ(refusal("int2:group=all"), "int2: option group=all, expected a number from 16 to 1024");
  EXPECT_EQ(refusal("bfp4:values=9"), "bfp4: option values=9, expected a number from 2 to 8");
  EXPECT_EQ(refusal("int4:values=9"), "int4: option values=9, expected a grouped format (int4, quarot2, ...)");
  EXPECT_EQ(refusal("int4:values=fp8"), "int4: option values=fp8, expected e4m3 values with e4m3 keys, and others with others");
  EXPECT_EQ(refusal("int4:values=oscar2"),
            "int4: option values=oscar2, which wants a calibration, expected keys of oscar* or bfp* with it");
  EXPECT_EQ(refusal("nvfp4:values=q8_0"), "nvfp4: option values=q8_0, whose groups of 32 channels do not divide head_dim 80");
  EXPECT_EQ(refusal("bfp4:clamp=none"), "bfp4: option clamp=none, expected one of: asymmetric, symmetric");
  EXPECT_EQ(refusal("turbo2:group=32"),
            "turbo2: option 'group' is unknown, expected one of: recent, first, sinks, sink_select, values, scale");
  EXPECT_EQ(refusal("turbo2:scale=unbiased"), "turbo2: option scale=unbiased, expected one of: norm, length");
}

TEST(GroupedOptions, ANumberTooLargeForTheExponentIsRefused) {
  const KvModel model = testing::small_model();
  FusedCache fused("bfp4", model);
  Text text = random_text(model, 20, 33);
  text.v[1][3][0][0] = 1e35F;
  EXPECT_THROW(fused.step({{fused.cache().create(), &text, 0, 20}}), Error);
}

}  // namespace
}  // namespace rotunda::kv
