// The packed cache against the method itself: fake quantization in fp64 from the paper's formulas, sharing no code with the cache.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "kv_harness.h"

namespace rotunda::kv {
namespace {

using testing::FusedCache;
using testing::nmse;
using testing::random_text;
using testing::Text;

constexpr int64_t kGroup = 32;

at::Tensor fp16(const at::Tensor& x) { return x.to(at::kFloat).to(at::kHalf).to(at::kDouble); }

/// Codes of the last dimension, a group.
using Method = std::function<at::Tensor(const at::Tensor&)>;

/// KIVI, arXiv:2402.02750: z = min, s = (max - min) / (2^B - 1), Q = round((x - z) / s).
at::Tensor min_max(const at::Tensor& x, int bits) {
  const double top = std::pow(2.0, bits) - 1;
  const at::Tensor zero = fp16(x.amin(-1, true));
  const at::Tensor scale = fp16((x.amax(-1, true) - x.amin(-1, true)) / top);
  return scale * ((x - zero) / scale).round().clamp(0, top) + zero;
}

/// The same with z a multiple of s.
at::Tensor integer_zero(const at::Tensor& x, int bits) {
  const double top = std::pow(2.0, bits) - 1;
  const at::Tensor scale = fp16((x.amax(-1, true) - x.amin(-1, true)) / top);
  const at::Tensor zero = fp16((x.amin(-1, true) / scale).round() * scale);
  return scale * ((x - zero) / scale).round().clamp(0, top) + zero;
}

/// Per channel over 32 tokens; the tokens of a group that is not whole as they are. x [T, d]
at::Tensor coded_keys(const at::Tensor& x, const Method& method) {
  const int64_t whole = x.size(0) / kGroup * kGroup;
  const at::Tensor groups = x.slice(0, 0, whole).view({-1, kGroup, x.size(1)}).transpose(1, 2);
  return at::cat({method(groups).transpose(1, 2).reshape({whole, x.size(1)}), x.slice(0, whole)});
}

at::Tensor coded_values(const at::Tensor& x, const Method& method) {
  const int64_t whole = x.size(0) / kGroup * kGroup;
  return at::cat({method(x.slice(0, 0, whole).view({whole, -1, kGroup})).view({whole, x.size(1)}), x.slice(0, whole)});
}

struct Case {
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.spec; }
  std::string spec;
  int bits;
  int64_t recent;
  int64_t first = 0;
  at::Tensor (*quantizer)(const at::Tensor&, int) = min_max;

  at::Tensor operator()(const at::Tensor& x) const { return quantizer(x, bits); }
};

/// @param exact (looking token, token looked at) -> whether it is seen in 16 bits
at::Tensor method_attention(const KvModel& model, const Text& text, int64_t n_tokens, const Method& method,
                            const std::function<bool(int64_t, int64_t)>& exact) {
  const int64_t rep = model.n_heads / model.n_kv_heads;
  const auto [cos, sin] = model.rope.cos_sin(at::arange(n_tokens, at::kLong), n_tokens);
  const auto turned = [&](const at::Tensor& x) {
    return ops::apply_rope(x.slice(0, 0, n_tokens), cos, sin).to(at::kDouble);
  };
  at::Tensor is_exact = at::zeros({n_tokens, n_tokens}, at::kBool);
  for (int64_t i = 0; i < n_tokens; ++i)
    for (int64_t j = 0; j < n_tokens; ++j) is_exact.data_ptr<bool>()[i * n_tokens + j] = exact(i, j);
  const at::Tensor later = at::ones({n_tokens, n_tokens}, at::kBool).triu(1);
  std::vector<at::Tensor> outs;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const at::Tensor q = turned(text.q[layer]), k = turned(text.k[layer]),
                     v = text.v[layer].slice(0, 0, n_tokens).to(at::kDouble);
    std::vector<at::Tensor> heads;
    for (int64_t head = 0; head < model.n_heads; ++head) {
      const at::Tensor key = k.select(1, head / rep), value = v.select(1, head / rep), query = q.select(1, head);
      const at::Tensor scores =
          at::where(is_exact, at::matmul(query, key.t()), at::matmul(query, coded_keys(key, method).t())) *
          model.softmax_scale;
      const at::Tensor p = scores.masked_fill(later, -std::numeric_limits<double>::infinity()).softmax(-1);
      heads.push_back(at::matmul(p.masked_fill(is_exact.logical_not(), 0.0), value) +
                      at::matmul(p.masked_fill(is_exact, 0.0), coded_values(value, method)));
    }
    outs.push_back(at::stack(heads, 1));
  }
  return at::stack(outs);
}

class KiviCacheTest : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kTokens = 210;  // six groups and a part of one
  // Codes agree with fp64 but for elements that fp32 puts on the other side of a tie; exact tokens are fp16.
  static constexpr double kTolerance = 1e-5;
  // Tokens have been through fp16 when they are packed, an error of 2^-11 at most: up to one code in a hundred turns at 4 bits, one in
  // several hundred at 2.
  static constexpr double kPackedLaterTolerance = 1e-3;

  static bool whole_group_is_older(int64_t kv_len, int64_t token) {
    return token < std::max<int64_t>(0, kv_len - GetParam().recent) / kGroup * kGroup;
  }

  KvModel model_ = testing::small_model(4, 2, 64);
  Text text_ = random_text(model_, kTokens, 3);
  FusedCache fused_{GetParam().spec, model_};
};

TEST_P(KiviCacheTest, QuantizeAllIsTheMethod) {
  const SeqId seq = fused_.cache().create();
  const at::Tensor expected = method_attention(model_, text_, kTokens, GetParam(), [](int64_t i, int64_t j) {
    return i - j < GetParam().recent || j < GetParam().first;
  });
  EXPECT_LT(nmse(fused_.step({{seq, &text_, 0, kTokens}}, StepKind::kQuantizeAll), expected), kTolerance);
}

TEST_P(KiviCacheTest, DecodingTokenByTokenIsTheMethod) {
  const SeqId seq = fused_.cache().create();
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < kTokens; ++t) outs.push_back(fused_.step({{seq, &text_, t, t + 1}}));
  const at::Tensor expected = method_attention(model_, text_, kTokens, GetParam(), [](int64_t i, int64_t j) {
    return !whole_group_is_older(i + 1, j) || j < GetParam().first;
  });
  EXPECT_LT(nmse(at::cat(outs, 1), expected), kPackedLaterTolerance);
}

// A chunk sees itself exactly, older tokens as they are stored: groups end within chunks and begin in one, end in the next.
TEST_P(KiviCacheTest, ChunksAreTheMethod) {
  const SeqId seq = fused_.cache().create();
  const std::vector<int64_t> ends = {40, 41, 120, 150, kTokens};
  std::vector<at::Tensor> outs;
  int64_t begin = 0;
  for (const int64_t end : ends) {
    outs.push_back(fused_.step({{seq, &text_, begin, end}}));
    begin = end;
  }
  const at::Tensor expected = method_attention(model_, text_, kTokens, GetParam(), [&](int64_t i, int64_t j) {
    const int64_t chunk_end = *std::upper_bound(ends.begin(), ends.end(), i);
    const int64_t chunk_begin = i < ends[0] ? 0 : *(std::upper_bound(ends.begin(), ends.end(), i) - 1);
    // One token alone is appended before it looks around.
    return !whole_group_is_older(chunk_end - chunk_begin == 1 ? chunk_end : chunk_begin, j) || j < GetParam().first;
  });
  EXPECT_LT(nmse(at::cat(outs, 1), expected), kPackedLaterTolerance);
}

TEST_P(KiviCacheTest, BytesAreThoseOfWholeGroupsAndTheWindow) {
  const SeqId seq = fused_.cache().create();
  fused_.step({{seq, &text_, 0, kTokens}});
  const KvUsage usage = fused_.cache().usage();
  const int64_t packed = (kTokens - GetParam().recent) / kGroup * kGroup;
  const int64_t elements = 2 * model_.kv_channels() * model_.n_layers;  // of a token
  EXPECT_EQ(8 * usage.codes_bytes, packed * elements * GetParam().bits);
  EXPECT_EQ(8 * usage.scale_bytes, packed * elements);  // scale and zero point, 16 bits each for 32 elements
  EXPECT_EQ(usage.window_bytes, 2 * elements * ((GetParam().recent + kGroup - 1 + 15) / 16 * 16));
}

INSTANTIATE_TEST_SUITE_P(Formats, KiviCacheTest,
                         ::testing::Values(Case{"kivi2", 2, 128}, Case{"kivi4", 4, 128}, Case{"kivi2:recent=0", 2, 0},
                                           Case{"kivi4:recent=0", 4, 0}, Case{"kivi2:recent=20", 2, 20},
                                           Case{"kivi4:recent=64,first=6", 4, 64, 6},
                                           Case{"kivi2:recent=40,zero=code", 2, 40, 0, integer_zero}));

TEST(KiviOptions, WhatDoesNotFitIsRefusedInOneLine) {
  const auto refusal = [&](const std::string& text, int head_dim) -> std::string {
    const KvSpec spec = parse_kv_spec(text);
    const KvFormat& format = kv_registry().get(spec.format);
    try {
      format.validate(spec);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kUser);
      return error.what();
    }
    return format.unsupported_reason(spec, testing::small_model(4, 2, head_dim)).value_or("");
  };
  EXPECT_EQ(refusal("kivi2:recent=0,first=4", 96), "");
  EXPECT_EQ(refusal("kivi2", 80), "kivi2: its group of 32 channels does not divide head_dim 80");
  EXPECT_EQ(refusal("kivi4:group=64", 64),
            "kivi4: option 'group' is unknown, expected one of: recent, first, sinks, sink_select, zero");
  EXPECT_EQ(refusal("kivi4:zero=none", 64), "kivi4: option zero=none, expected one of: minimum, code");
  EXPECT_EQ(refusal("kivi4:recent=-1", 64), "kivi4: option recent=-1, expected a number from 0 to 1048576");
}

}  // namespace
}  // namespace rotunda::kv
