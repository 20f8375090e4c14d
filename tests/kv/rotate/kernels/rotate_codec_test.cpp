#include "kv/rotate/kernels/rotate_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kernels/each_target.h"
#include "kv/rotate/kernels/rotate_codec_ref.h"

namespace rotunda::kv::rotate {
namespace {

using testing::AlignedBytes;
using testing::for_each_target;

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Shape {
  int n_kv_heads;
  int head_dim;
  int heads_per_group;
  int group_size;
};

/// Every head dimension, groups within a head, across heads and of 16, MHA, one head alone, transforms with and without a Paley factor.
const Shape kShapes[] = {{4, 64, 4, 128}, {2, 64, 2, 64},   {1, 64, 1, 16},   {4, 80, 4, 80},  {1, 80, 1, 80},  {2, 80, 2, 32},
                         {4, 96, 2, 128}, {1, 96, 1, 48},   {2, 112, 2, 112}, {1, 112, 1, 16}, {4, 112, 4, 64}, {8, 128, 4, 128},
                         {2, 128, 2, 64}, {1, 128, 1, 128}, {2, 256, 1, 512}, {2, 256, 2, 128}, {4, 256, 4, 128}, {3, 48, 3, 144}, {8, 16, 8, 32}};

struct Layer {
  Layer(const Shape& s, int bits, ZeroPoint zero, int blocks_per_page, unsigned seed = 5) {
    layer.layout = {bits, zero, s.n_kv_heads, s.head_dim, s.heads_per_group, s.group_size, blocks_per_page};
    const int channels = layer.layout.kv_channels();
    std::vector<int> order(channels);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(seed);
    std::shuffle(order.begin(), order.end(), random);
    group.resize(channels);
    for (int i = 0; i < channels; ++i) group[order[i]] = static_cast<uint16_t>(i / s.group_size);
    layer.key_group = group.data();
    layer.key_clip = bits == 2 ? 0.8F : 1.0F;
    layer.value_clip = bits == 2 ? 0.8F : 1.0F;
    layer.key_hadamard = kernels::hadamard_plan(layer.layout.group_channels());
  }
  Layer(const Layer&) = delete;
  std::vector<uint16_t> group;
  RotateLayer layer;
};

std::vector<float> random_rows(int64_t count, unsigned seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = spread * normal(random) + 0.3F;
  return x;
}

/// @param every take each every-th shape only, beginning with another one for each format, except for the first format, which takes
/// them all: the reference multiplies by the dense matrix for each token
template <typename Body>
void for_each_format(const Body& body, int every = 1) {
  int format = 0;
  for (const int bits : {2, 3, 4}) {
    for (const ZeroPoint zero : {ZeroPoint::kCode, ZeroPoint::kMinimum}) {
      const int first = format++;
      int index = 0;
      for (const Shape& shape : kShapes) {
        if (first != 0 && (index++ + first) % every != 0) continue;
        SCOPED_TRACE(::testing::Message() << "bits " << bits << " zero " << static_cast<int>(zero) << " heads " << shape.n_kv_heads << " x "
                                          << shape.head_dim << " rotated by " << shape.heads_per_group << " group " << shape.group_size);
        body(bits, zero, shape);
      }
    }
  }
}

/// Index of the first byte that differs, -1 if none.
int64_t first_difference(const AlignedBytes& a, const AlignedBytes& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a.get()[i] != b.get()[i]) return static_cast<int64_t>(i);
  }
  return -1;
}

TEST(RotateStore, SameBytesAsReference) {
  for_each_target([] {
    for_each_format([](int bits, ZeroPoint zero, const Shape& shape) {
      const Layer l(shape, bits, zero, 2);
      const RotatePageLayout& layout = l.layer.layout;
      const int64_t stride = layout.kv_channels() + 5;
      const std::vector<float> key = random_rows(16 * stride, 1, 3.0F);
      const std::vector<float> value = random_rows(16 * stride, 2);
      AlignedBytes got(layout.page_bytes(), 0xa5);
      AlignedBytes want(layout.page_bytes(), 0xa5);
      // A whole block, and parts of the other, in an order of their own: what is not addressed keeps its bytes.
      struct Part {
        int block, first, count;
      };
      for (const Part& part : {Part{0, 0, 16}, Part{1, 15, 1}, Part{1, 0, 1}, Part{1, 3, 9}}) {
        RotateStoreParams p{&l.layer, key.data(), value.data(), stride, part.block, part.first, part.count, got.get()};
        ASSERT_TRUE(rotate_store(p));
        p.page = want.get();
        ASSERT_TRUE(rotate_store_ref(p));
      }
      ASSERT_EQ(first_difference(got, want), -1);
    });
  });
}

/// Rows that trouble a quantizer; all groups of a row get the same kind.
std::vector<std::vector<float>> awkward_rows(int channels) {
  std::vector<std::vector<float>> rows;
  for (const float x : {0.0F, -0.0F, 1.0F, -2.5F, 6e4F, -6e4F, 65504.0F, 1e-7F, 5.9604645e-8F, 2e-8F, 1e-40F, -1e-40F, 0.1F}) {
    rows.emplace_back(channels, x);
  }
  const auto varied = [&](const auto& f) {
    std::vector<float> row(channels);
    for (int c = 0; c < channels; ++c) row[c] = f(c * 7919 % 1009);
    rows.push_back(std::move(row));
  };
  varied([](int i) { return i == 5 ? 6e4F : 0.01F * static_cast<float>(i % 13); });              // one outlier
  varied([](int i) { return 6e4F - static_cast<float>(i); });                                   // huge and one-sided
  varied([](int i) { return i % 2 == 0 ? 6e4F : -6e4F; });
  varied([](int i) { return 100.0F + 0.001F * static_cast<float>(i % 5); });                    // far from zero: the zero point would not fit
  varied([](int i) { return -100.0F - 0.001F * static_cast<float>(i % 5); });
  varied([](int i) { return 1.0F + 1e-7F * static_cast<float>(i % 3); });                       // scale below fp16
  varied([](int i) { return 1e-7F * static_cast<float>(i % 7); });                              // subnormal scales
  varied([](int i) { return 1e-6F * static_cast<float>(100 + i % 7); });
  varied([](int i) { return -1e-40F * static_cast<float>(i % 9); });                            // subnormal even in fp32
  varied([](int i) { return static_cast<float>(i % 4); });                                      // exact ties and codes
  varied([](int i) { return 0.5F * static_cast<float>(i % 7) - 1.5F; });
  return rows;
}

TEST(RotateStore, AwkwardGroups) {
  for_each_target([] {
    for (const float clip : {0.8F, 1.0F}) {
      for (const int bits : {2, 3, 4}) {
        for (const ZeroPoint zero : {ZeroPoint::kCode, ZeroPoint::kMinimum}) {
          Layer l({2, 64, 2, 32}, bits, zero, 1);
          l.layer.key_clip = l.layer.value_clip = clip;
          const RotatePageLayout& layout = l.layer.layout;
          const int channels = layout.kv_channels();
          std::vector<std::vector<float>> rows = awkward_rows(channels);
          for (size_t i = 0; i < rows.size(); ++i) {
            SCOPED_TRACE(::testing::Message() << "row " << i << " bits " << bits << " zero " << static_cast<int>(zero) << " clip " << clip);
            AlignedBytes got(layout.page_bytes());
            AlignedBytes want(layout.page_bytes());
            RotateStoreParams p{&l.layer, rows[i].data(), rows[i].data(), channels, 0, 4, 1, got.get()};
            const bool good = rotate_store(p);
            p.page = want.get();
            ASSERT_TRUE(rotate_store_ref(p));
            ASSERT_TRUE(good);
            ASSERT_EQ(first_difference(got, want), -1);
            // The same row in all lanes of a block takes the path for many tokens.
            std::vector<float> block;
            for (int t = 0; t < 16; ++t) block.insert(block.end(), rows[i].begin(), rows[i].end());
            RotateStoreParams many{&l.layer, block.data(), block.data(), channels, 0, 0, 16, got.get()};
            ASSERT_TRUE(rotate_store(many));
            many.page = want.get();
            ASSERT_TRUE(rotate_store_ref(many));
            ASSERT_EQ(first_difference(got, want), -1);
            if (i < 13) {  // constant: its value, to fp16 rounding
              for (int c = 0; c < channels; ++c) {
                ASSERT_EQ(dequantize_ref(layout, got.get(), true, l.group[c], 4, read_code(got.get(), key_place(layout, 0, 4, c))),
                          to_float(to_half(rows[i][c])));
              }
            }
          }
        }
      }
    }
  });
}

TEST(RotateStore, ReconstructsWithinHalfAStep) {
  for_each_format([](int bits, ZeroPoint zero, const Shape& shape) {
    Layer l(shape, bits, zero, 1);
    l.layer.key_clip = 1.0F;
    const RotatePageLayout& layout = l.layer.layout;
    const std::vector<float> x = random_rows(layout.kv_channels(), 9);
    AlignedBytes page(layout.page_bytes());
    ASSERT_TRUE(rotate_store({&l.layer, x.data(), x.data(), layout.kv_channels(), 0, 2, 1, page.get()}));
    for (int c = 0; c < layout.kv_channels(); ++c) {
      const int n = layout.group_channels();
      const int g = l.group[c];
      const double got = dequantize_ref(layout, page.get(), true, g, 2, read_code(page.get(), key_place(layout, c / n, 2, c % n)));
      uint16_t scale;
      std::memcpy(&scale, page.get() + meta_offset(layout, layout.key_scale_offset(), 2, g, 2), 2);
      // Half a step; the rounded zero point moves the ends of the range by half a step more.
      ASSERT_LE(std::fabs(got - x[c]), (zero == ZeroPoint::kCode ? 1.0 : 0.51) * to_float(Half{scale}) + 1e-3);
    }
  });
}

TEST(RotateStore, RefusesWhatIsNotFiniteOrDoesNotFit) {
  for_each_target([] {
    for (const int bits : {2, 3, 4}) {
      for (const ZeroPoint zero : {ZeroPoint::kCode, ZeroPoint::kMinimum}) {
        const Layer l({2, 80, 2, 80}, bits, zero, 1);
        const RotatePageLayout& layout = l.layer.layout;
        const int channels = layout.kv_channels();
        AlignedBytes page(layout.page_bytes());
        const std::vector<float> fine = random_rows(16 * channels, 3);
        for (const int count : {1, 16}) {
          for (const float bad : {kInf, -kInf, std::nanf(""), 3e38F, -3e38F, 2e6F, -2e6F}) {
            for (const int at : {0, 17, channels - 1}) {
              std::vector<float> x = fine;
              x[(count - 1) * channels + at] = bad;
              const RotateStoreParams keys{&l.layer, x.data(), fine.data(), channels, 0, 0, count, page.get()};
              const RotateStoreParams values{&l.layer, fine.data(), x.data(), channels, 0, 0, count, page.get()};
              ASSERT_EQ(rotate_store(keys), rotate_store_ref(keys)) << bad << " bits " << bits;
              ASSERT_EQ(rotate_store(values), rotate_store_ref(values)) << bad;
              if (!std::isfinite(bad) || std::fabs(bad) > 1e30F) {
                ASSERT_FALSE(rotate_store(keys)) << bad;
                ASSERT_FALSE(rotate_store(values)) << bad;
              }
            }
          }
        }
      }
    }
  });
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

/// Stored pages with their RoPE tables. Tokens never stored hold 0xff bytes: NaN scales.
struct Sequence {
  Sequence(const Layer& l, int n_pages, int n_tokens, int64_t first_position = 0) : layer(l.layer) {
    const RotatePageLayout& layout = layer.layout;
    const int channels = layout.kv_channels();
    const int half = layout.head_dim / 2;
    key = random_rows(int64_t{n_tokens} * channels, 11);
    value = random_rows(int64_t{n_tokens} * channels, 12);
    // A key channel with an outlier, as real ones have.
    for (int t = 0; t < n_tokens; ++t) key[int64_t{t} * channels + 3] += 4.0F;
    rotated = key;
    for (int t = 0; t < n_tokens; ++t) {
      kernels::hadamard_rows(layer.key_hadamard, false, rotated.data() + int64_t{t} * channels, layout.n_rotation_groups(), layout.group_channels());
    }
    for (int i = 0; i < n_pages; ++i) {
      pages.emplace_back(layout.page_bytes(), 0xff);
      pointers.push_back(pages.back().get());
    }
    masks.assign(static_cast<size_t>(n_pages) * layout.blocks_per_page, 0);
    for (int t = 0; t < n_tokens; t += 16) {
      const int count = std::min(16, n_tokens - t);
      const int page = t / static_cast<int>(layout.page_tokens());
      masks[t / 16] = static_cast<uint16_t>((1u << count) - 1);
      EXPECT_TRUE(rotate_store({&layer, rotated.data() + int64_t{t} * channels, value.data() + int64_t{t} * channels, channels,
                                t / 16 % layout.blocks_per_page, 0, count, pages[page].get()}));
    }
    for (int i = 0; i < half; ++i) frequency.push_back(std::pow(10000.0, -i / static_cast<double>(half)));
    for (int page = 0; page < n_pages; ++page) {
      for (const double f : frequency) {
        page_cos.push_back(static_cast<float>(std::cos(static_cast<double>(first_position + page * layout.page_tokens()) * f)));
        page_sin.push_back(static_cast<float>(std::sin(static_cast<double>(first_position + page * layout.page_tokens()) * f)));
      }
    }
    for (int block = 0; block < layout.blocks_per_page; ++block) {
      for (const double f : frequency) {
        for (int t = 0; t < 16; ++t) {
          token_cos.push_back(static_cast<float>(std::cos((block * 16 + t) * f)));
          token_sin.push_back(static_cast<float>(std::sin((block * 16 + t) * f)));
        }
      }
    }
  }
  RotateDecodeParams decode(int rotation_group, int n_q_per_kv, const std::vector<float>& q, State& state) const {
    return {&layer, {pointers.data(), masks.data(), static_cast<int>(pages.size())}, rotation_group, n_q_per_kv, q.data(), page_cos.data(),
            page_sin.data(), token_cos.data(), token_sin.data(), state.view()};
  }

  const RotateLayer& layer;
  std::vector<float> key, value, rotated;
  std::vector<AlignedBytes> pages;
  std::vector<const std::byte*> pointers;
  std::vector<uint16_t> masks;
  std::vector<double> frequency;
  std::vector<float> page_cos, page_sin, token_cos, token_sin;
};

std::vector<float> random_q(int n_q, int head_dim) {
  std::vector<float> q = random_rows(int64_t{n_q} * head_dim, 21);
  for (float& x : q) x *= 1.5F / std::sqrt(static_cast<float>(head_dim));
  return q;
}

/// Keys of size 4 at most and |q| about 1.5: a score of up to 256 terms and 11 butterfly steps in fp32 errs by less than 2e-5, so do
/// weights relatively; results of values of size 4 by 4 times that.
constexpr double kTolerance = 8e-5;

void expect_same(State& got, State& want, int head_dim) {
  const std::vector<float> a = got.finish(head_dim);
  const std::vector<float> b = want.finish(head_dim);
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], kTolerance) << i;
  for (size_t h = 0; h < got.max.size(); ++h) {
    ASSERT_NEAR(got.max[h], want.max[h], kTolerance);
    ASSERT_NEAR(got.sum[h], want.sum[h], kTolerance * want.sum[h]);
  }
}

TEST(RotateDecode, EqualsReference) {
  for_each_format([](int bits, ZeroPoint zero, const Shape& shape) {
    const Layer l(shape, bits, zero, 2);
    const Sequence s(l, 2, 37);
    const int group = l.layer.layout.n_rotation_groups() - 1;
    for (const int n_q_per_kv : {1, 2, 3, 4, 7}) {
      if (n_q_per_kv != 4 && (bits != 2 || shape.heads_per_group * shape.head_dim > 256)) continue;  // how heads are shared out does not see bits
      const int n_q = n_q_per_kv * shape.heads_per_group;
      const std::vector<float> q = random_q(n_q, shape.head_dim);
      State want(n_q, shape.head_dim);
      rotate_decode_ref(s.decode(group, n_q_per_kv, q, want));
      for_each_target([&] {
        State got(n_q, shape.head_dim);
        rotate_decode(s.decode(group, n_q_per_kv, q, got));
        SCOPED_TRACE(::testing::Message() << "query heads per kv head " << n_q_per_kv);
        expect_same(got, want, shape.head_dim);
      });
    }
  }, 5);
}

TEST(RotateDecode, MasksChooseTokens) {
  for (const int head_dim : {80, 128}) {
    const Layer l({2, head_dim, 2, head_dim}, 2, ZeroPoint::kCode, 4);
    Sequence s(l, 2, 128);
    const std::vector<float> q = random_q(4, head_dim);
    for (const std::vector<uint16_t>& masks : {std::vector<uint16_t>{0, 0, 0, 0, 0, 0, 0, 0},
                                               {0, 0, 1u << 7, 0, 0, 0, 0, 0},
                                               {0xffff, 0, 0xaaaa, 0, 0, 0, 0, 1},
                                               {0, 0, 0, 0, 0x8000, 0xffff, 0xffff, 0x7fff}}) {
      s.masks = masks;
      State want(4, head_dim);
      rotate_decode_ref(s.decode(0, 2, q, want));
      for_each_target([&] {
        State got(4, head_dim);
        rotate_decode(s.decode(0, 2, q, got));
        if (want.sum[0] == 0) {
          EXPECT_EQ(got.max, std::vector<float>(4, -kInf));
          EXPECT_EQ(got.finish(head_dim), std::vector<float>(got.acc.size(), 0));
        } else {
          expect_same(got, want, head_dim);
        }
      });
    }
  }
}

TEST(RotateDecode, PagesWithoutTokensAreNotRead) {
  const Layer l({1, 64, 1, 64}, 2, ZeroPoint::kCode, 1);
  Sequence s(l, 2, 32);
  s.pointers[0] = nullptr;  // reading it would crash
  s.masks = {0, 0xffff};
  const std::vector<float> q = random_q(1, 64);
  State state(1, 64);
  rotate_decode(s.decode(0, 1, q, state));
  EXPECT_GT(state.sum[0], 0);
  State none(1, 64);
  RotateDecodeParams p = s.decode(0, 1, q, none);
  p.run.n_pages = 0;
  rotate_decode(p);
  EXPECT_EQ(none.max[0], -kInf);
  EXPECT_EQ(none.sum[0], 0);
}

TEST(RotateDecode, MergeOfSplitsEqualsUnsplit) {
  for_each_target([] {
    const Layer l({4, 64, 4, 128}, 3, ZeroPoint::kMinimum, 2);
    const Sequence s(l, 4, 115);
    const std::vector<float> q = random_q(8, 64);
    State whole(8, 64);
    rotate_decode(s.decode(0, 2, q, whole));
    for (int cut = 0; cut <= 4; ++cut) {
      State left(8, 64);
      State right(8, 64);
      RotateDecodeParams a = s.decode(0, 2, q, left);
      a.run.n_pages = cut;
      rotate_decode(a);
      RotateDecodeParams b = s.decode(0, 2, q, right);
      b.run = {s.pointers.data() + cut, s.masks.data() + cut * 2, 4 - cut};
      b.page_cos += cut * 32;
      b.page_sin += cut * 32;
      rotate_decode(b);
      kernels::merge_softmax(left.view(), right.view(), 8, 64);
      expect_same(left, whole, 64);
    }
  });
}

TEST(RotateDecode, RopeAtFarPositionsEqualsAbsoluteRope) {
  // Four bits and the definition of attention itself: what is stored, turned by its absolute position in double.
  const int d = 64;
  const Layer l({2, d, 2, 64}, 4, ZeroPoint::kMinimum, 2);
  const RotatePageLayout& layout = l.layer.layout;
  for (const int64_t position : {0, 4096, 99968}) {
    const Sequence s(l, 2, 64, position);
    const std::vector<float> q = random_q(2, d);
    const std::vector<double> dense = dense_ref(l.layer);
    for_each_target([&] {
      State got(2, d);
      rotate_decode(s.decode(0, 1, q, got));
      for (int h = 0; h < 2; ++h) {
        std::vector<double> scores;
        for (int t = 0; t < 64; ++t) {
          const std::vector<double> key = token_keys_ref(l.layer, dense, s.pages[t / 32].get(), 0, t % 32);
          double score = 0;
          for (int i = 0; i < d / 2; ++i) {
            const double angle = static_cast<double>(position + t) * s.frequency[i];
            double a = key[h * d + i];
            double b = key[h * d + d / 2 + i];
            rope_ref(std::cos(angle), std::sin(angle), a, b);
            score += a * q[h * d + i] + b * q[h * d + d / 2 + i];
          }
          scores.push_back(score);
        }
        const double top = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (const double score : scores) sum += std::exp(score - top);
        // Cosines rounded to fp32 twice, products of them: a few times 2^-24 of |k| |q|.
        ASSERT_NEAR(got.max[h], top, 2e-5);
        ASSERT_NEAR(got.sum[h], sum, 2e-5 * sum);
      }
    });
    (void)layout;
  }
}

TEST(RotateLoad, EqualsReference) {
  for_each_format([](int bits, ZeroPoint zero, const Shape& shape) {
    const Layer l(shape, bits, zero, 2);
    const Sequence s(l, 1, 32);
    const int d = shape.head_dim;
    const int group = l.layer.layout.n_rotation_groups() - 1;
    const int64_t stride = 21;
    const int64_t head_stride = 16 * d + 7;
    const auto load = [&](const auto& f, std::vector<float>& key, std::vector<float>& value) {
      key.assign(l.layer.layout.group_channels() * stride, -77);
      value.assign(shape.heads_per_group * head_stride, -77);
      f(RotateLoadParams{&l.layer, s.pages[0].get(), group, 1, s.token_cos.data() + d / 2 * 16, s.token_sin.data() + d / 2 * 16, key.data(),
                         stride, value.data(), head_stride});
    };
    std::vector<float> key;
    std::vector<float> value;
    std::vector<float> want_key;
    std::vector<float> want_value;
    load(rotate_load_ref, want_key, want_value);
    for_each_target([&] {
      load(rotate_load, key, value);
      for (size_t i = 0; i < key.size(); ++i) ASSERT_NEAR(key[i], want_key[i], 2e-5) << i;
      for (size_t i = 0; i < value.size(); ++i) ASSERT_NEAR(value[i], want_value[i], 4e-6) << i;
    });
  }, 5);
}

}  // namespace
}  // namespace rotunda::kv::rotate
