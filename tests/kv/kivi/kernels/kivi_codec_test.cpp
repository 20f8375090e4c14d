#include "kv/kivi/kernels/kivi_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kv/kivi/kernels/kivi_codec_ref.h"

namespace rotunda::kv::kivi {
namespace {

using testing::AlignedBytes;

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> random_rows(int64_t count, unsigned seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = spread * normal(random) + 0.5F;
  return x;
}

float fp16(double x) { return to_float(to_half(static_cast<float>(x))); }

// ---- packing -----------------------------------------------------------------------------------------------------------

// docs/formats.md in bytes: one head of 32 channels, the second span of a page.
TEST(KiviStore, BytesAreThoseOfTheDocument) {
  const KiviPageLayout l{2, 1, 32, 8};
  std::vector<float> key(32 * 32), value(32 * 32);
  for (int t = 0; t < 32; ++t) {
    for (int c = 0; c < 32; ++c) {
      key[t * 32 + c] = static_cast<float>(c + (t + c) % 4);  // channel c: code (t + c) % 4 over low c, scale 1
      value[t * 32 + c] = static_cast<float>(-t) + 0.5F * static_cast<float>(c % 16 == 0 ? 3 : c % 3);
    }
  }
  AlignedBytes page(l.page_bytes(), 0xff);
  ASSERT_TRUE(kivi_store({&l, ZeroPoint::kMinimum, key.data(), value.data(), 32, 1, page.get()}));
  const auto word = [&](int64_t offset, int bytes) {
    uint32_t bits = 0;
    std::memcpy(&bits, page.get() + offset, static_cast<size_t>(bytes));
    return bits;
  };
  const int64_t codes = 4 * 32 * 8, scales = 4 * 32 * 2;
  for (int c = 0; c < 32; ++c) {
    // Codes 0 1 2 3 0 1 .. are 11 10 01 00 .. from the high bits down; each next channel begins one code later.
    const uint32_t want[] = {0xe4e4e4e4u, 0x39393939u, 0x4e4e4e4eu, 0x93939393u};
    EXPECT_EQ(word((32 + c) * 8, 4), want[c % 4]) << c;
    EXPECT_EQ(word((32 + c) * 8 + 4, 4), want[c % 4]) << c;
    EXPECT_EQ(word(2 * codes + (32 + c) * 2, 2), 0x3c00u);
    EXPECT_EQ(word(2 * codes + scales + (32 + c) * 2, 2), to_half(static_cast<float>(c)).bits);
  }
  for (int t = 0; t < 32; ++t) {
    // Channels 0 .. 15: 3 1 2 0 1 2 0 ..; 16 .. 31: 3 2 0 1 2 0 ..
    EXPECT_EQ(word(codes + (32 + t) * 8, 4), 0b00'10'01'00'10'01'00'10'01'00'10'01'00'10'01'11u) << t;
    EXPECT_EQ(word(codes + (32 + t) * 8 + 4, 4), 0b01'00'10'01'00'10'01'00'10'01'00'10'01'00'10'11u) << t;
    EXPECT_EQ(word(2 * codes + 2 * scales + (32 + t) * 2, 2), 0x3800u);
    EXPECT_EQ(word(2 * codes + 3 * scales + (32 + t) * 2, 2), to_half(static_cast<float>(-t)).bits);
  }
  // Nothing of other spans is written.
  for (const int64_t offset : {int64_t{0}, int64_t{31 * 8}, int64_t{64 * 8}, codes, codes + 64 * 8, 2 * codes,
                               2 * codes + 64 * 2, 2 * codes + 2 * scales, 2 * codes + 3 * scales + 64 * 2})
    EXPECT_EQ(word(offset, 2), 0xffffu) << offset;
}

// Against the formulas in double: fp32 puts a few elements on the other side of a tie.
TEST(KiviStore, EveryElementBecomesTheNearestLevel) {
  for (const int bits : {2, 4}) {
    for (const int d : {32, 96, 128}) {
      const KiviPageLayout l{bits, 2, d, 4};
      const int64_t channels = 2 * d;
      const int top = (1 << bits) - 1;
      const std::vector<float> key = random_rows(32 * channels, 1, 4.0F), value = random_rows(32 * channels, 2, 0.01F);
      AlignedBytes page(l.page_bytes(), 0xff);
      ASSERT_TRUE(kivi_store({&l, ZeroPoint::kMinimum, key.data(), value.data(), channels, 1, page.get()}));
      const auto check = [&](bool is_key, int head, int token, int channel, const std::vector<float>& group,
                             int index) {
        const double low = fp16(*std::min_element(group.begin(), group.end()));
        const double most = *std::max_element(group.begin(), group.end()),
                     least = *std::min_element(group.begin(), group.end());
        const double scale = fp16((most - least) / top);
        const double got = element_ref(l, page.get(), is_key, head, 32 + token, channel);
        const double code = (got - low) / scale;
        ASSERT_NEAR(code, std::nearbyint(code), 1e-9);
        ASSERT_TRUE(code > -0.5 && code < top + 0.5);
        const double wanted = std::clamp((group[index] - low) / scale, 0.0, static_cast<double>(top));
        ASSERT_LE(std::fabs(code - wanted), 0.5 + 1e-5) << is_key << head << token << channel;
      };
      for (int head = 0; head < 2; ++head) {
        for (int t = 0; t < 32; ++t) {
          for (int c = 0; c < d; ++c) {
            std::vector<float> of_channel, of_token;
            for (int i = 0; i < 32; ++i) {
              of_channel.push_back(key[i * channels + head * d + c]);
              of_token.push_back(value[t * channels + head * d + c / 32 * 32 + i]);
            }
            check(true, head, t, c, of_channel, t);
            check(false, head, t, c, of_token, c % 32);
          }
        }
      }
    }
  }
}

struct OneGroup {
  explicit OneGroup(int bits, ZeroPoint made = ZeroPoint::kMinimum) : l{bits, 1, 32, 2}, zero(made) {}
  // The elements that x, a value of one token, becomes; nothing where it is refused.
  std::vector<double> decoded(const std::vector<float>& x) const {
    std::vector<float> key(32 * 32, 0.0F), value(32 * 32, 0.0F);
    std::copy(x.begin(), x.end(), value.begin() + 5 * 32);
    AlignedBytes page(l.page_bytes(), 0xff);
    std::vector<double> y;
    if (!kivi_store({&l, zero, key.data(), value.data(), 32, 0, page.get()})) return y;
    for (int c = 0; c < 32; ++c) y.push_back(element_ref(l, page.get(), false, 0, 5, c));
    return y;
  }
  KiviPageLayout l;
  ZeroPoint zero;
};

// From -1.25 to 1.75 in steps of 1: with the minimum as zero point the ends are exact, with a code -1.25 is read as -1, and 0 is exact.
TEST(KiviStore, ZeroPoints) {
  std::vector<float> x(32, 0.0F);
  x[1] = -1.25F;
  x[2] = 1.75F;
  std::vector<double> minimum(32, -0.25), code(32, 0.0);
  minimum[1] = -1.25, minimum[2] = 1.75;
  code[1] = -1.0, code[2] = 2.0;
  EXPECT_EQ(OneGroup(2).decoded(x), minimum);
  EXPECT_EQ(OneGroup(2, ZeroPoint::kCode).decoded(x), code);
  EXPECT_EQ(OneGroup(4, ZeroPoint::kCode).decoded(std::vector<float>(32, 3.25F)), std::vector<double>(32, 3.25))
      << "no scale to be a multiple of";
}

TEST(KiviStore, ConstantTinyAndHugeGroups) {
  for (const int bits : {2, 4}) {
    const OneGroup one(bits);
    const double top = (1 << bits) - 1;
    for (const float constant : {0.0F, -0.0F, 3.0F, -65504.0F, 65504.0F, 0x1p-24F})
      EXPECT_EQ(one.decoded(std::vector<float>(32, constant)), std::vector<double>(32, constant)) << constant;
    EXPECT_EQ(one.decoded(std::vector<float>(32, 0x1p-30F)), std::vector<double>(32, 0.0)) << "below fp16";
    std::vector<float> x(32, 1.0F);
    x[7] = static_cast<float>(1 + top);
    std::vector<double> want(32, 1.0);
    want[7] = 1 + top;
    EXPECT_EQ(one.decoded(x), want);
    // From one end of fp16 to the other: the rounded scale reaches beyond, to what no window can hold.
    x.assign(32, -65504.0F);
    x[7] = 65504.0F;
    EXPECT_TRUE(one.decoded(x).empty());
    for (const float bad : {kInf, -kInf, std::nanf(""), 65520.0F, -65520.0F, 3e38F}) {
      x.assign(32, 1.0F);
      x[31] = bad;
      EXPECT_TRUE(one.decoded(x).empty()) << bad;
    }
  }
}

TEST(KiviStore, BadKeysAreRefusedToo) {
  const KiviPageLayout l{2, 1, 32, 2};
  const std::vector<float> value(32 * 32, 0.0F);
  AlignedBytes page(l.page_bytes());
  for (const float bad : {kInf, std::nanf(""), 1e6F}) {
    std::vector<float> key(32 * 32, 1.0F);
    ASSERT_TRUE(kivi_store({&l, ZeroPoint::kMinimum, key.data(), value.data(), 32, 0, page.get()}));
    key[31 * 32 + 31] = bad;
    EXPECT_FALSE(kivi_store({&l, ZeroPoint::kMinimum, key.data(), value.data(), 32, 0, page.get()})) << bad;
  }
}

// ---- reading -----------------------------------------------------------------------------------------------------------

struct Pages {
  explicit Pages(const KiviPageLayout& layout, int n) : l(layout) {
    const int64_t channels = int64_t{l.n_kv_heads} * l.head_dim;
    for (int i = 0; i < n; ++i) {
      bytes.emplace_back(l.page_bytes(), 0xff);
      pointers.push_back(bytes.back().get());
      for (int span = 0; span < l.spans(); ++span) {
        const std::vector<float> rows = random_rows(2 * 32 * channels, static_cast<unsigned>(50 + 8 * i + span));
        EXPECT_TRUE(kivi_store(
            {&l, ZeroPoint::kMinimum, rows.data(), rows.data() + 32 * channels, channels, span, bytes.back().get()}));
      }
    }
    masks.assign(static_cast<size_t>(n) * l.blocks_per_page, 0xffff);
  }
  kernels::PageRun run() const { return {pointers.data(), masks.data(), static_cast<int>(bytes.size())}; }

  KiviPageLayout l;
  std::vector<AlignedBytes> bytes;
  std::vector<const std::byte*> pointers;
  std::vector<uint16_t> masks;
};

TEST(KiviLoad, EqualsReferenceToTheLastBit) {
  for (const int bits : {2, 4}) {
    for (const int d : {32, 96, 128}) {
      const Pages pages({bits, 2, d, 4}, 1);
      for (int head = 0; head < 2; ++head) {
        for (int block = 0; block < 4; ++block) {
          const int64_t stride = 37;
          std::vector<float> key(d * stride, -1.0F), value(16 * d), key_ref = key, value_ref = value;
          kivi_load({&pages.l, pages.pointers[0], head, block, key.data(), stride, value.data()});
          kivi_load_ref({&pages.l, pages.pointers[0], head, block, key_ref.data(), stride, value_ref.data()});
          // scale * code is exact in fp32: 11 bits times 4.
          EXPECT_EQ(key, key_ref);
          EXPECT_EQ(value, value_ref);
        }
      }
    }
  }
}

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

// Scores: fp32 sums of up to 128 products, partial sums of magnitude 10 at most, 2^-24 of that each. Outputs: twice that relative to
// values of magnitude 5 at most.
constexpr double kTolerance = 1e-4;

TEST(KiviDecode, EqualsReference) {
  for (const int bits : {2, 4}) {
    for (const int d : {32, 96, 128}) {
      Pages pages({bits, 2, d, 4}, 3);
      // A page cut short within a span, single tokens left out, a page with one token.
      pages.masks = {0xffff, 0xfffe, 0, 0x8001, 0xffff, 0x0fff, 0, 0, 0, 0, 0x0100, 0};
      for (const int n_q : {1, 2, 3, 7}) {
        const std::vector<float> q = random_rows(int64_t{n_q} * d, 77, 1.0F / std::sqrt(static_cast<float>(d)));
        State want(n_q, d), got(n_q, d);
        kivi_decode_ref({&pages.l, pages.run(), 1, n_q, q.data(), want.view()});
        kivi_decode({&pages.l, pages.run(), 1, n_q, q.data(), got.view()});
        const std::vector<float> a = got.finish(d), b = want.finish(d);
        for (size_t i = 0; i < a.size(); ++i)
          ASSERT_NEAR(a[i], b[i], kTolerance) << bits << " bits " << d << " element " << i;
        for (int h = 0; h < n_q; ++h) ASSERT_NEAR(got.max[h], want.max[h], kTolerance);
      }
    }
  }
}

TEST(KiviDecode, PagesWithoutTokensAreNotReadAndPartsMerge) {
  Pages pages({2, 1, 64, 2}, 4);
  pages.masks[2] = pages.masks[3] = 0;
  const std::vector<float> q = random_rows(2 * 64, 78, 0.1F);
  State whole(2, 64), left(2, 64), right(2, 64), nothing(2, 64);
  pages.pointers[1] = nullptr;  // reading it would crash
  kivi_decode({&pages.l, pages.run(), 0, 2, q.data(), whole.view()});
  kivi_decode({&pages.l, {pages.pointers.data(), pages.masks.data(), 2}, 0, 2, q.data(), left.view()});
  kivi_decode({&pages.l, {pages.pointers.data() + 2, pages.masks.data() + 4, 2}, 0, 2, q.data(), right.view()});
  kernels::merge_softmax(left.view(), right.view(), 2, 64);
  const std::vector<float> a = left.finish(64), b = whole.finish(64);
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], kTolerance);
  kivi_decode({&pages.l, {pages.pointers.data() + 1, pages.masks.data() + 2, 1}, 0, 2, q.data(), nothing.view()});
  EXPECT_EQ(nothing.max[0], -kInf);
  EXPECT_EQ(nothing.sum[1], 0.0F);
}

}  // namespace
}  // namespace rotunda::kv::kivi
