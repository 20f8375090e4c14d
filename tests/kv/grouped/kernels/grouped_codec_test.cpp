// The list of instruction sets must be cut before Highway sees it.
#include "kernels/simd_targets_dot.h"
//
#include "kv/grouped/kernels/grouped_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/aligned.h"
#include "kernels/each_target.h"
#include "kv/grouped/kernels/grouped_codec_ref.h"
#include "kv/grouped/kernels/grouped_ways.h"

namespace rotunda::kv::grouped {
namespace {

using rotunda::testing::AlignedBytes;
using rotunda::testing::for_each_target;
using testing::for_each_way;
using testing::random_rows;
using testing::sized;
using testing::Way;
using testing::way;

constexpr float kInf = std::numeric_limits<float>::infinity();

// ---- quantizers: each by hand --------------------------------------------------------------------------------------

/// The elements that x becomes.
std::vector<double> decoded(const Way& w, const std::vector<float>& x, GroupScale* scale = nullptr) {
  GroupedSide side = w.side;
  side.group = static_cast<int>(x.size());
  std::vector<uint8_t> codes(x.size());
  const auto made = quantize_group(side, w.codec, x.data(), codes.data());
  EXPECT_TRUE(made.has_value());
  std::vector<double> y;
  for (const uint8_t code : codes)
    y.push_back(scale_value(side, made->scale) * static_cast<double>(w.codec.unit) *
                level(side, w.codec, code, made->zero));
  if (scale != nullptr) *scale = *made;
  return y;
}

bool refused(const Way& w, const std::vector<float>& x) {
  GroupedSide side = w.side;
  side.group = static_cast<int>(x.size());
  std::vector<uint8_t> codes(x.size());
  return !quantize_group(side, w.codec, x.data(), codes.data()).has_value();
}

TEST(Bfp, PowersOfTwoAreExactFromTheSmallestSubnormalOn) {
  for (int bits = 2; bits <= 8; ++bits) {
    const Way w{"", {bits, 16, ScaleType::kE8m0, 149, false}, {.rule = Rule::kBlockFloat, .carry = true}};
    for (int e = -149; e <= 105; ++e) {
      const float x = std::ldexp(1.0F, e);
      EXPECT_EQ(decoded(w, {x})[0], x) << bits << " bits, 2^" << e;
      EXPECT_EQ(decoded(w, {-x})[0], -x) << bits << " bits, -2^" << e;
    }
  }
}

TEST(Bfp, RepresentableNumbersAreKept) {
  const Way& w = way("bfp4");
  // Exponent 3: step 1.
  const std::vector<float> x = {-7, -6, -1, 0, 1, 2, 3, 7};
  EXPECT_EQ(decoded(w, x), std::vector<double>(x.begin(), x.end()));
}

TEST(Bfp, ErrorIsAtMostHalfAStepAndFallsWithTheBits) {
  const std::vector<float> x = random_rows(64, 5);
  const float largest =
      std::fabs(*std::max_element(x.begin(), x.end(), [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
  double before = 1e9;
  for (int bits = 2; bits <= 8; ++bits) {
    const Way w{"", {bits, 64, ScaleType::kE8m0, 149, false}, {.rule = Rule::kBlockFloat}};
    const std::vector<double> y = decoded(w, x);
    const double step = std::ldexp(1.0, std::ilogb(largest) + 1 - (bits - 1));
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      // A positive one above the largest mantissa saturates, up to a whole step off.
      EXPECT_LE(std::fabs(y[i] - x[i]), x[i] > (std::ldexp(1.0, bits - 1) - 0.5) * step ? step : step / 2);
      sum += (y[i] - x[i]) * (y[i] - x[i]);
    }
    EXPECT_LT(sum, before);
    before = sum;
  }
}

TEST(Bfp, OverflowSaturatesOrCarriesWhicheverCostsLess) {
  const Way& w = way("bfp4");
  ASSERT_TRUE(w.codec.carry);
  // 7.9 under step 1 saturates at 7 (0.81) or becomes 8 under step 2 (0.01 and nothing for the even rest).
  EXPECT_EQ(decoded(w, {7.9F, 2.0F, -4.0F}), (std::vector<double>{8, 2, -4}));
  // Five odd numbers would lose 1 each under step 2.
  EXPECT_EQ(decoded(w, {7.9F, 1, 3, 5, -1, -3}), (std::vector<double>{7, 1, 3, 5, -1, -3}));
  Way saturating = w;
  saturating.codec.carry = false;
  EXPECT_EQ(decoded(saturating, {7.9F, 2.0F, -4.0F})[0], 7);
  // Negative numbers have the one mantissa more, unless clamped.
  EXPECT_EQ(decoded(w, {-7.9F, 1.0F})[0], -8);
  saturating.codec.symmetric = true;
  EXPECT_EQ(decoded(saturating, {-7.9F, 1.0F})[0], -7);
}

TEST(Bfp, OneOutlierCostsItsNeighboursTheirBits) {
  std::vector<float> x = random_rows(32, 9, 0.1F);
  x[0] = 50;
  const std::vector<double> together = decoded(way("bfp4"), x);
  for (size_t i = 1; i < x.size(); ++i) EXPECT_EQ(together[i], 0);  // step 8
  const std::vector<double> apart = decoded(way("bfp4"), {x.begin() + 1, x.end()});
  double error = 0, energy = 0;
  for (size_t i = 1; i < x.size(); ++i) {
    error += (apart[i - 1] - x[i]) * (apart[i - 1] - x[i]);
    energy += double{x[i]} * x[i];
  }
  // Step 1/16 or 1/32, squared over 12, against 0.01.
  EXPECT_LT(error, 0.05 * energy);
}

TEST(Bfp, ZerosAndWhatItCannotHold) {
  GroupScale scale;
  EXPECT_EQ(decoded(way("bfp4"), std::vector<float>(16, 0.0F), &scale), std::vector<double>(16, 0.0));
  EXPECT_EQ(scale.scale, 0);
  EXPECT_TRUE(refused(way("bfp4"), {1, kInf}));
  EXPECT_TRUE(refused(way("bfp4"), {1, std::nanf("")}));
  EXPECT_TRUE(refused(way("bfp4"), {std::ldexp(1.0F, 127)}));
}

TEST(Integers, MinMaxWithAZeroPoint) {
  Way w = way("int2");
  w.codec.clip = 1.0F;
  GroupScale scale;
  // Step 1, zero at code 1: -1, 0, 1, 2.
  EXPECT_EQ(decoded(w, {-1, 0, 0.4F, 1, 2, 0.6F}, &scale), (std::vector<double>{-1, 0, 0, 1, 2, 1}));
  EXPECT_EQ(to_float(Half{scale.scale}), 1.0F);
  EXPECT_EQ(scale.zero, 1u);
  // All on one side: zero is among the codes still.
  EXPECT_EQ(decoded(w, {3, 6}), (std::vector<double>{4, 6}));
  EXPECT_EQ(decoded(w, {-6, -6}), (std::vector<double>{-6, -6}));
  EXPECT_EQ(decoded(w, {0, 0}), (std::vector<double>{0, 0}));
  EXPECT_TRUE(refused(w, {3e38F, -3e38F}));
}

TEST(Ggml, Q8AndQ4RoundAsGgmlDoes) {
  // d = 127 / 127 = 1; halves away from zero.
  EXPECT_EQ(decoded(way("q8_0"), {127, 0.5F, -0.5F, 1.5F, -126.4F}), (std::vector<double>{127, 1, -1, 2, -126}));
  // d = -4 / -8 = 0.5: codes floor(x / d + 8.5) - 8.
  EXPECT_EQ(decoded(way("q4_0"), {-4, 3.9F, 0.25F, -0.25F, 0}), (std::vector<double>{-4, 3.5, 0.5, 0, 0}));
  // The largest is positive: d is negative and the largest code stands for -8 d.
  EXPECT_EQ(decoded(way("q4_0"), {8, -7, 1}), (std::vector<double>{8, -7, 1}));
}

TEST(Microscaling, ElementGridsOfOcp) {
  // Largest 6 = 1.5 * 4: scale 1. Grid 0 .5 1 1.5 2 3 4 6, ties to even.
  const std::vector<float> x = {6, 5.1F, 4.9F, 5, 3.5F, 2.5F, 1.25F, 1.75F, 0.25F, 0.75F, -0.3F, -6};
  EXPECT_EQ(decoded(way("mxfp4"), x), (std::vector<double>{6, 6, 4, 4, 4, 2, 1, 2, 0, 1, -0.5, -6}));
  // Largest 7.9 has exponent 2 too: it saturates.
  EXPECT_EQ(decoded(way("mxfp4"), {7.9F, 1.0F})[0], 6);
  EXPECT_EQ(decoded(way("mxfp6"), {7.5F, 7.9F, 0.125F, 0.0625F, -3.3F}),
            (std::vector<double>{7.5, 7.5, 0.125, 0, -3.25}));
  GroupScale scale;
  EXPECT_EQ(decoded(way("mxfp8"), {448, 1, 17.0F / 16, -0.0011F, 450}, &scale),
            (std::vector<double>{448, 1, 1, -0.001953125, 448}));
  EXPECT_EQ(scale.scale, 127);
}

TEST(Nvfp4, ScalesAreFp8) {
  GroupScale scale;
  // 13 / 6 = 2.1667 -> 2.25 in e4m3.
  EXPECT_EQ(decoded(way("nvfp4"), {13, 1}, &scale), (std::vector<double>{13.5, 1.125}));
  EXPECT_EQ(scale.scale, 0x41);
  EXPECT_EQ(decoded(way("nvfp4"), {2688, -448})[0], 2688);
  EXPECT_TRUE(refused(way("nvfp4"), {2700, 1}));
}

TEST(SmallFloat, EveryCodeComesBack) {
  const auto check = []<typename Format>(Format, int bits, uint32_t skip) {
    for (uint32_t code = 0; code < 1u << bits; ++code) {
      if ((code & ((1u << (bits - 1)) - 1)) == skip) continue;
      EXPECT_EQ(Format::encode(Format::decode(code)), code) << code;
    }
  };
  check(E2m1(), 4, ~0u);
  check(E2m3(), 6, ~0u);
  check(E4m3(), 8, 0x7f);  // NaN, which is never written
  EXPECT_EQ(E4m3::decode(0x7e), 448);
  EXPECT_EQ(E4m3::decode(0x01), 0x1p-9);
  EXPECT_EQ(E2m3::decode(0x1f), 7.5);
}

// ---- pages ---------------------------------------------------------------------------------------------------------

TEST(GroupedPage, BitsAreThoseOfTheFormat) {
  for_each_way(3, 128, [](const GroupedLayer& layer) {
    const GroupedPageLayout& l = layer.layout;
    EXPECT_EQ(l.head_bytes() % 64, 0);
    const auto side_bits = [&](const GroupedSide& side) {
      return side.bits + (8.0 * side.scale_bytes() + (side.zeros ? side.bits : 0)) / side.group;
    };
    const double bits = 8.0 * static_cast<double>(l.zero_offset(false) + l.zero_bytes(l.value)) /
                        static_cast<double>(l.page_tokens() * l.head_dim);
    EXPECT_DOUBLE_EQ(bits, side_bits(l.key) + side_bits(l.value));
  });
}

// Every code of a token is where it should be, and no other token's bits have changed.
TEST(GroupedStore, TokensKeepToThemselves) {
  for (const int d : {16, 48, 128}) {
    for_each_way(2, d, [&](const GroupedLayer& layer) {
      const GroupedPageLayout& l = layer.layout;
      const std::vector<float> key = random_rows(int64_t{32} * 2 * d, 1);
      const std::vector<float> value = random_rows(int64_t{32} * 2 * d, 2);
      AlignedBytes page(l.page_bytes(), 0xa5);
      // In an order of its own, some of them twice.
      struct Part {
        int block, first, count;
      };
      for (const Part& part : {Part{1, 3, 9}, Part{0, 0, 16}, Part{1, 15, 1}, Part{1, 0, 4}, Part{1, 12, 3}}) {
        const int64_t row = int64_t{part.block * 16 + part.first} * 2 * d;
        ASSERT_TRUE(grouped_store(
            {&layer, key.data() + row, value.data() + row, 2 * d, part.block, part.first, part.count, page.get()}));
      }
      for (int64_t token = 0; token < 32; ++token) {
        for (int head = 0; head < 2; ++head) {
          for (const bool is_key : {true, false}) {
            const GroupedSide& side = is_key ? l.key : l.value;
            std::vector<uint8_t> codes(side.group);
            for (int group = 0; group < l.groups(side); ++group) {
              const float* const x = (is_key ? key : value).data() + (token * 2 + head) * d + group * side.group;
              const auto scale = quantize_group(side, is_key ? layer.key : layer.value, x, codes.data());
              ASSERT_TRUE(scale);
              for (int c = 0; c < side.group; ++c)
                ASSERT_EQ(read_code(l, page.get(), is_key, head, token, group * side.group + c), codes[c])
                    << "token " << token;
              uint16_t stored = 0;
              std::memcpy(&stored, page.get() + scale_place(l, head, is_key, group, token), side.scale_bytes());
              ASSERT_EQ(stored, scale->scale);
              if (!side.zeros) continue;
              ASSERT_EQ(read_code(page.get(), side.bits,
                                  [&](int width) { return zero_place(l, head, is_key, width, group, token); }),
                        scale->zero);
            }
          }
        }
      }
    });
  }
}

/// Pages of random tokens.
struct Sequence {
  Sequence(const GroupedLayer& made, int n_pages, int64_t tokens, float spread = 1.0F) : layer(made) {
    const GroupedPageLayout& l = layer.layout;
    const int64_t channels = int64_t{l.n_kv_heads} * l.head_dim;
    masks.assign(static_cast<size_t>(n_pages) * l.blocks_per_page, 0);
    for (int page = 0; page < n_pages; ++page) {
      pages.emplace_back(l.page_bytes(), 0xff);  // what is not stored has NaN for scales
      pointers.push_back(pages.back().get());
      for (int block = 0; block < l.blocks_per_page; ++block) {
        const int64_t first = int64_t{page} * l.page_tokens() + block * 16;
        const auto count = static_cast<int>(std::clamp<int64_t>(tokens - first, 0, 16));
        if (count == 0) continue;
        const std::vector<float> rows = random_rows(2 * 16 * channels, static_cast<unsigned>(10 + first), spread);
        EXPECT_TRUE(grouped_store(
            {&layer, rows.data(), rows.data() + 16 * channels, channels, block, 0, count, pages.back().get()}));
        masks[page * l.blocks_per_page + block] = static_cast<uint16_t>((1u << count) - 1);
      }
    }
  }
  kernels::PageRun run() const { return {pointers.data(), masks.data(), static_cast<int>(pages.size())}; }

  GroupedLayer layer;
  std::vector<AlignedBytes> pages;
  std::vector<const std::byte*> pointers;
  std::vector<uint16_t> masks;
};

struct State {
  State(int n_q, int head_dim) : max(n_q, -kInf), sum(n_q), acc(static_cast<size_t>(n_q) * head_dim) {}
  kernels::SoftmaxState view() { return {max.data(), sum.data(), acc.data()}; }
  std::vector<float> finish(int head_dim) {
    std::vector<float> out(acc.size());
    kernels::finish_softmax(view(), static_cast<int>(max.size()), head_dim, out.data());
    return out;
  }
  std::vector<float> max, sum, acc;
};

/// Queries on the grid that the kernel rounds them to: one step per head and group.
std::vector<float> rounded_queries(const GroupedLayer& layer, int n_q, unsigned seed) {
  const int d = layer.layout.head_dim;
  std::vector<float> q = random_rows(int64_t{n_q} * d, seed, 1.0F / std::sqrt(static_cast<float>(d)));
  if (layer.key.levels == Levels::kE4m3) return q;
  const int size = layer.layout.key.group;
  for (size_t first = 0; first < q.size(); first += size) {
    float top = 0;
    for (int c = 0; c < size; ++c) top = std::max(top, std::fabs(q[first + c]));
    for (int c = 0; c < size; ++c) q[first + c] = std::nearbyint(q[first + c] * (127.0F / top)) * (top / 127.0F);
  }
  return q;
}

/// What a kernel may differ by from the reference.
struct Tolerance {
  Tolerance(const Sequence& s, int head, const std::vector<float>& q) {
    const GroupedPageLayout& l = s.layer.layout;
    double step = 0, top_level = 0;
    for (size_t page = 0; page < s.pages.size(); ++page) {
      for (int64_t t = 0; t < l.page_tokens(); ++t) {
        if ((s.masks[page * l.blocks_per_page + t / 16] >> t % 16 & 1) == 0) continue;
        ++tokens;
        double norm = 0;
        for (int c = 0; c < l.head_dim; ++c) {
          norm = std::max(norm, std::fabs(element_ref(s.layer, s.pages[page].get(), true, head, t, c)));
          value = std::max(value, std::fabs(element_ref(s.layer, s.pages[page].get(), false, head, t, c)));
        }
        key = std::max(key, norm);
        for (int group = 0; group < l.groups(l.value); ++group)
          step = std::max(step, std::fabs(step_ref(s.layer, s.pages[page].get(), false, head, t, group)));
      }
    }
    for (uint32_t code = 0; code < 1u << l.value.bits; ++code) {
      for (const uint32_t zero : {0u, (1u << l.value.bits) - 1})
        top_level = std::max(top_level, std::fabs(level(l.value, s.layer.value, code, zero)));
    }
    if (s.layer.value.levels != Levels::kE4m3) rounding = step * top_level / (2 * 32639.0);
    double largest_q = 0;
    for (const float x : q) largest_q = std::max(largest_q, std::fabs(double{x}));
    // fp32: some roundings per group or channel of sums of products.
    score = (8 + l.head_dim / 16.0) * 0x1p-24 * l.head_dim * largest_q * key + 1e-7;
  }
  double output(double sum) const { return tokens * rounding / sum + value * (2 * std::expm1(score) + 1e-5); }

  double score = 0, key = 0, value = 0, rounding = 0;
  int64_t tokens = 0;
};

void expect_same(State& got, State& want, int head_dim, const Tolerance& tolerance) {
  const std::vector<float> a = got.finish(head_dim);
  const std::vector<float> b = want.finish(head_dim);
  for (size_t h = 0; h < got.max.size(); ++h) {
    ASSERT_NEAR(got.max[h], want.max[h], tolerance.score);
    ASSERT_NEAR(got.sum[h], want.sum[h], (2 * std::expm1(tolerance.score) + 1e-5) * want.sum[h]);
    for (int c = 0; c < head_dim; ++c) {
      const size_t i = h * head_dim + c;
      ASSERT_NEAR(a[i], b[i], tolerance.output(want.sum[h])) << "head " << h << " channel " << c;
    }
  }
}

TEST(GroupedDecode, EqualsReference) {
  for (const int d : {48, 64, 128}) {
    for_each_way(2, d, [&](const GroupedLayer& layer) {
      const Sequence s(layer, 3, 75);
      for (const int n_q : {1, 2, 3, 7}) {
        const std::vector<float> q = rounded_queries(layer, n_q, 77);
        const Tolerance tolerance(s, 1, q);
        State want(n_q, d);
        grouped_decode_ref({&layer, s.run(), 1, n_q, q.data(), want.view()});
        for_each_target([&] {
          State got(n_q, d);
          grouped_decode({&layer, s.run(), 1, n_q, q.data(), got.view()});
          expect_same(got, want, d, tolerance);
        });
      }
    });
  }
}

TEST(GroupedDecode, PagesWithoutTokensAreNotReadAndPartsMerge) {
  for_each_way(1, 64, [&](const GroupedLayer& layer) {
    Sequence s(layer, 4, 115);
    const std::vector<float> q = rounded_queries(layer, 2, 78);
    s.masks[2] = s.masks[3] = 0;
    const Tolerance tolerance(s, 0, q);
    State whole(2, 64);
    grouped_decode({&layer, s.run(), 0, 2, q.data(), whole.view()});
    s.pointers[1] = nullptr;  // reading it would crash
    State left(2, 64), right(2, 64);
    grouped_decode({&layer, {s.pointers.data(), s.masks.data(), 2}, 0, 2, q.data(), left.view()});
    grouped_decode({&layer, {s.pointers.data() + 2, s.masks.data() + 4, 2}, 0, 2, q.data(), right.view()});
    kernels::merge_softmax(left.view(), right.view(), 2, 64);
    expect_same(left, whole, 64, tolerance);
  });
}

TEST(GroupedDecode, ZeroQueriesAndZeroValues) {
  for_each_way(1, 64, [](const GroupedLayer& layer) {
    const std::vector<float> zeros(16 * 64, 0.0F);
    const std::vector<float> key = random_rows(16 * 64, 3);
    AlignedBytes page(layer.layout.page_bytes(), 0xff);
    ASSERT_TRUE(grouped_store({&layer, key.data(), zeros.data(), 64, 0, 0, 16, page.get()}));
    const std::byte* const pages[] = {page.get()};
    const uint16_t masks[] = {0xffff, 0};
    for_each_target([&] {
      State state(1, 64);
      grouped_decode({&layer, {pages, masks, 1}, 0, 1, zeros.data(), state.view()});
      EXPECT_EQ(state.max[0], 0);
      EXPECT_NEAR(state.sum[0], 16, 1e-4);
      EXPECT_EQ(state.finish(64), std::vector<float>(64, 0));
    });
  });
}

TEST(GroupedLoad, EqualsReference) {
  for (const int d : {16, 80, 128}) {
    for_each_way(2, d, [&](const GroupedLayer& layer) {
      // Scales from the subnormal to the large.
      for (const float spread : {1.0F, 1e-30F, 300.0F}) {
        const Sequence s(layer, 1, 32, spread);
        for (const int block : {0, 1}) {
          AlignedBytes want_keys(d * 64), want_values(d * 64), keys(d * 64), values(d * 64);
          grouped_load_ref({&layer, s.pages[0].get(), 1, block, want_keys.floats(), want_values.floats()});
          for_each_target([&] {
            grouped_load({&layer, s.pages[0].get(), 1, block, keys.floats(), values.floats()});
            for (int i = 0; i < d * 16; ++i) {
              ASSERT_EQ(keys.floats()[i], want_keys.floats()[i]) << "spread " << spread << " index " << i;
              ASSERT_EQ(values.floats()[i], want_values.floats()[i]) << "spread " << spread << " index " << i;
            }
          });
        }
      }
    });
  }
}

}  // namespace
}  // namespace rotunda::kv::grouped
