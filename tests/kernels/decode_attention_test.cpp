#include "kernels/attention/decode_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kernels/attention/decode_attention_ref.h"
#include "kernels/each_target.h"

namespace rotunda::kernels {
namespace {

using testing::AlignedBytes;
using testing::for_each_target;

constexpr float kInf = std::numeric_limits<float>::infinity();

struct State {
  explicit State(int n_q, int head_dim) : max(n_q, -kInf), sum(n_q), acc(static_cast<size_t>(n_q) * head_dim) {}
  SoftmaxState view() { return {max.data(), sum.data(), acc.data()}; }
  std::vector<float> max, sum, acc;
};

/// Pages of random keys and values; tokens that are never stored hold NaN in every type.
struct Fixture {
  Fixture(ElementType type, int n_kv_heads, int head_dim, int blocks_per_page, int n_pages, int n_tokens) {
    layout = {type, n_kv_heads, head_dim, blocks_per_page};
    const int channels = n_kv_heads * head_dim;
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> rows(size_t{2} * n_tokens * channels);
    for (float& x : rows) x = normal(random);
    for (int i = 0; i < n_pages; ++i) {
      pages.emplace_back(layout.page_bytes(), 0xff);
      pointers.push_back(pages.back().get());
    }
    for (int64_t first = 0; first < n_tokens;) {
      const int64_t in_page = first % layout.page_tokens();
      const int64_t count = std::min<int64_t>({5, n_tokens - first, layout.page_tokens() - in_page});
      EXPECT_TRUE(store_plain(layout, rows.data() + first * channels, rows.data() + (n_tokens + first) * channels, channels, in_page, count,
                              pages[first / layout.page_tokens()].get()));
      first += count;
    }
    masks.assign(static_cast<size_t>(n_pages) * blocks_per_page, 0);
    for (int t = 0; t < n_tokens; ++t) masks[t / 16] |= static_cast<uint16_t>(1u << t % 16);
    source = std::move(rows);
  }
  PageRun run() const { return {pointers.data(), masks.data(), static_cast<int>(pages.size())}; }

  PlainPageLayout layout;
  std::vector<AlignedBytes> pages;
  std::vector<const std::byte*> pointers;
  std::vector<uint16_t> masks;
  std::vector<float> source;
};

std::vector<float> random_q(int n_q, int head_dim) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<size_t>(n_q) * head_dim);
  for (float& x : q) x = 2 * normal(random) / std::sqrt(static_cast<float>(head_dim));
  return q;
}

/// Results of weights that sum to 1 over values of size 4 at most: scores of up to 256 fp32 terms have an absolute error below 1e-5.
constexpr double kTolerance = 5e-5;

void expect_same(State& got, State& want, int n_q, int head_dim) {
  std::vector<float> a(static_cast<size_t>(n_q) * head_dim);
  std::vector<float> b(a.size());
  finish_softmax(got.view(), n_q, head_dim, a.data());
  finish_softmax(want.view(), n_q, head_dim, b.data());
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], kTolerance) << i;
  for (int h = 0; h < n_q; ++h) {
    ASSERT_NEAR(got.max[h], want.max[h], kTolerance);
    ASSERT_NEAR(got.sum[h], want.sum[h], kTolerance * want.sum[h]);
  }
}

TEST(DecodePlain, EqualsReference) {
  for_each_target([] {
    for (const ElementType type : {ElementType::kFp32, ElementType::kBf16, ElementType::kFp16}) {
      for (const int d : {16, 64, 80, 96, 112, 128, 256}) {
        for (const int n_q : {1, 2, 3, 4, 7}) {
          Fixture f(type, 2, d, 2, 3, 75);
          const std::vector<float> q = random_q(n_q, d);
          State got(n_q, d);
          State want(n_q, d);
          decode_plain({f.layout, f.run(), 1, n_q, q.data(), got.view()});
          decode_plain_ref({f.layout, f.run(), 1, n_q, q.data(), want.view()});
          SCOPED_TRACE(::testing::Message() << "type " << static_cast<int>(type) << " head_dim " << d << " n_q " << n_q);
          expect_same(got, want, n_q, d);
        }
      }
    }
  });
}

TEST(DecodePlain, MasksChooseTokens) {
  for_each_target([] {
    const int d = 64;
    Fixture f(ElementType::kBf16, 1, d, 4, 2, 128);
    const std::vector<float> q = random_q(2, d);
    for (const std::vector<uint16_t>& masks : {std::vector<uint16_t>{0, 0, 0, 0, 0, 0, 0, 0},
                                               {0, 0, 1u << 7, 0, 0, 0, 0, 0},
                                               {0xffff, 0, 0xaaaa, 0, 0, 0, 0, 1},
                                               {0, 0, 0, 0, 0x8000, 0xffff, 0xffff, 0x7fff}}) {
      f.masks = masks;
      State got(2, d);
      State want(2, d);
      decode_plain({f.layout, f.run(), 0, 2, q.data(), got.view()});
      decode_plain_ref({f.layout, f.run(), 0, 2, q.data(), want.view()});
      if (want.sum[0] == 0) {
        EXPECT_EQ(got.max, std::vector<float>(2, -kInf));
        EXPECT_EQ(got.sum, std::vector<float>(2, 0));
        EXPECT_EQ(got.acc, std::vector<float>(2 * d, 0));
        std::vector<float> out(2 * d, 9);
        finish_softmax(got.view(), 2, d, out.data());
        EXPECT_EQ(out, std::vector<float>(2 * d, 0));
      } else {
        expect_same(got, want, 2, d);
      }
    }
  });
}

TEST(DecodePlain, BlocksWithoutTokensAreNotRead) {
  Fixture f(ElementType::kFp32, 1, 16, 1, 2, 32);
  f.pointers[0] = nullptr;  // reading it would crash
  f.masks = {0, 0xffff};
  const std::vector<float> q = random_q(1, 16);
  State got(1, 16);
  decode_plain({f.layout, f.run(), 0, 1, q.data(), got.view()});
  EXPECT_GT(got.sum[0], 0);
}

TEST(DecodePlain, MergeOfSplitsEqualsUnsplit) {
  for_each_target([] {
    const int d = 80;
    const int n_q = 3;
    Fixture f(ElementType::kFp16, 1, d, 2, 5, 150);
    const std::vector<float> q = random_q(n_q, d);
    State whole(n_q, d);
    decode_plain({f.layout, f.run(), 0, n_q, q.data(), whole.view()});
    for (int cut = 0; cut <= 5; ++cut) {
      State left(n_q, d);
      State right(n_q, d);
      decode_plain({f.layout, {f.pointers.data(), f.masks.data(), cut}, 0, n_q, q.data(), left.view()});
      decode_plain({f.layout, {f.pointers.data() + cut, f.masks.data() + cut * 2, 5 - cut}, 0, n_q, q.data(), right.view()});
      merge_softmax(left.view(), right.view(), n_q, d);
      expect_same(left, whole, n_q, d);
    }
  });
}

TEST(MergeSoftmax, EmptyChangesNothing) {
  State a(1, 2);
  State b(1, 2);
  merge_softmax(a.view(), b.view(), 1, 2);
  EXPECT_EQ(a.max[0], -kInf);
  EXPECT_EQ(a.sum[0], 0);
  b.max[0] = 3;
  b.sum[0] = 2;
  b.acc = {4, 6};
  merge_softmax(a.view(), b.view(), 1, 2);
  EXPECT_EQ(a.acc, b.acc);
  State empty(1, 2);
  merge_softmax(a.view(), empty.view(), 1, 2);
  EXPECT_EQ(a.acc, b.acc);
  EXPECT_EQ(a.sum[0], 2);
}

TEST(StorePlain, RoundsToNearestEvenAndReportsWhatDoesNotFit) {
  for (const ElementType type : {ElementType::kFp32, ElementType::kBf16, ElementType::kFp16}) {
    Fixture f(type, 2, 16, 2, 1, 20);
    // Every stored element equals the scalar conversion.
    for (int t = 0; t < 20; ++t) {
      for (int h = 0; h < 2; ++h) {
        for (int c = 0; c < 16; ++c) {
          const auto rounded = [&](float x) {
            return type == ElementType::kFp32 ? x : type == ElementType::kBf16 ? to_float(to_bfloat16(x)) : to_float(to_half(x));
          };
          const float key = f.source[t * 32 + h * 16 + c];
          const float value = f.source[(20 + t) * 32 + h * 16 + c];
          const std::byte* const page = f.pages[0].get();
          EXPECT_EQ(plain_element_ref(f.layout, page + f.layout.key_block_offset(h, t / 16), c * 16 + t % 16), rounded(key));
          EXPECT_EQ(plain_element_ref(f.layout, page + f.layout.value_row_offset(h, t), c), rounded(value));
        }
      }
    }
    std::vector<float> row(32, 1.0F);
    std::vector<float> bad(32, 1.0F);
    for (const float x : {kInf, -kInf, std::nanf(""), 3.4e38F, 7e4F}) {
      bad[31] = x;
      const bool fits = std::isfinite(x) && (type == ElementType::kFp32 || (type == ElementType::kBf16 && x < 3e38F));
      EXPECT_EQ(store_plain(f.layout, bad.data(), row.data(), 32, 3, 1, f.pages[0].get()), fits) << x;
      EXPECT_EQ(store_plain(f.layout, row.data(), bad.data(), 32, 3, 1, f.pages[0].get()), fits) << x;
    }
  }
}

TEST(StorePlain, WholeBlocksEqualSingleTokens) {
  for_each_target([] {
    for (const ElementType type : {ElementType::kFp32, ElementType::kBf16, ElementType::kFp16}) {
      for (const int d : {16, 80, 128}) {
        const PlainPageLayout layout{type, 2, d, 3};
        std::vector<float> rows(size_t{48} * 2 * d);
        for (size_t i = 0; i < rows.size(); ++i) rows[i] = std::ldexp(static_cast<float>(i * 2654435761u % 8191) - 4000, static_cast<int>(i % 23) - 36);
        AlignedBytes one(layout.page_bytes());
        AlignedBytes many(layout.page_bytes());
        for (int t = 0; t < 48; ++t) {
          const float* const row = rows.data() + size_t{2} * d * t;
          ASSERT_TRUE(store_plain(layout, row, row, 2 * d, t, 1, one.get()));
        }
        ASSERT_TRUE(store_plain(layout, rows.data(), rows.data(), 2 * d, 0, 7, many.get()));
        const float* const rest = rows.data() + size_t{2} * d * 7;
        ASSERT_TRUE(store_plain(layout, rest, rest, 2 * d, 7, 41, many.get()));
        ASSERT_EQ(std::memcmp(one.get(), many.get(), one.size()), 0) << "type " << static_cast<int>(type) << " head_dim " << d;
      }
    }
  });
}

TEST(LoadPlain, GivesWhatWasStored) {
  for_each_target([] {
    for (const ElementType type : {ElementType::kFp32, ElementType::kBf16, ElementType::kFp16}) {
      const int d = 80;
      Fixture f(type, 2, d, 2, 1, 32);
      const int64_t stride = 37;
      std::vector<float> key(d * stride, 5);
      std::vector<float> value(16 * d);
      load_plain(f.layout, f.pages[0].get(), 1, 1, key.data(), stride, value.data());
      for (int t = 0; t < 16; ++t) {
        for (int c = 0; c < d; ++c) {
          ASSERT_EQ(key[c * stride + t], plain_element_ref(f.layout, f.pages[0].get() + f.layout.key_block_offset(1, 1), c * 16 + t));
          ASSERT_EQ(value[t * d + c], plain_element_ref(f.layout, f.pages[0].get() + f.layout.value_row_offset(1, 16 + t), c));
        }
      }
      ASSERT_EQ(key[16], 5) << "wrote beyond the block's columns";
    }
  });
}

}  // namespace
}  // namespace rotunda::kernels
