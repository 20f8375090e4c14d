// The list of instruction sets must be cut before Highway sees it.
#include "kernels/simd_targets_dot.h"
//
#include "kv/house/kernels/house_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kernels/each_target.h"
#include "kv/house/kernels/house_codec_ref.h"

namespace rotunda::kv::house {
namespace {

using testing::AlignedBytes;
using testing::for_each_target;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kHeadDims[] = {16, 48, 64, 80, 96, 112, 128, 256};

std::vector<float> random_rows(int64_t count, unsigned seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = spread * normal(random);
  return x;
}

/// A layer with feedback and shift of random numbers, either of which can be taken away.
struct Layer {
  Layer(int key_bits, int value_bits, int n_kv_heads, int head_dim, int blocks_per_page) {
    layer.layout = {key_bits, value_bits, n_kv_heads, head_dim, blocks_per_page};
    const int64_t matrix = int64_t{head_dim} * head_dim;
    feedback = random_rows(n_kv_heads * matrix, 31, 1.0F / std::sqrt(static_cast<float>(head_dim)));
    // The diagonal and what lies below it are not read.
    for (int64_t i = 0; i < n_kv_heads * matrix; ++i) {
      if (i % matrix / head_dim == i % head_dim) feedback[i] = std::fabs(feedback[i]) + 0.1F;
      if (i % matrix / head_dim > i % head_dim) feedback[i] = std::nanf("");
    }
    shift = random_rows(int64_t{n_kv_heads} * head_dim, 32, 2.0F);
    layer.feedback = feedback.data();
    layer.shift = shift.data();
    layer.hadamard = kernels::hadamard_plan(head_dim);
  }
  Layer(const Layer&) = delete;
  std::vector<float> feedback, shift;
  HouseLayer layer;
};

/// @param body called with key bits and value bits
template <typename Body>
void for_each_bits(const Body& body) {
  for (const int key_bits : {2, 3, 4}) {
    for (const int value_bits : {2, 3, 4}) {
      SCOPED_TRACE(::testing::Message() << "key bits " << key_bits << " value bits " << value_bits);
      body(key_bits, value_bits);
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

TEST(HousePage, HeadsAreWholeLinesAndPartsDoNotOverlap) {
  for_each_bits([](int key_bits, int value_bits) {
    for (const int head_dim : kHeadDims) {
      const HousePageLayout l{key_bits, value_bits, 3, head_dim, 8};
      EXPECT_EQ(l.head_bytes() % 64, 0);
      EXPECT_EQ(l.page_bytes(), 3 * l.head_bytes());
      EXPECT_EQ(l.value_block_offset(1, 0), l.head_bytes() + l.key_codes_bytes());
      EXPECT_EQ(l.key_scale_offset(1), l.value_block_offset(1, 0) + l.value_codes_bytes());
      EXPECT_LE(l.value_scale_offset(1) + l.scale_bytes(), 2 * l.head_bytes());
      const double bits =
          8.0 * static_cast<double>(l.head_bytes()) / static_cast<double>(2 * l.page_tokens() * head_dim);
      const bool padded = key_bits == 3 && head_dim % 32 != 0;
      EXPECT_NEAR(bits, 0.5 * (key_bits + value_bits) + 16.0 / head_dim, padded ? 0.5 : 0.02);
    }
  });
}

TEST(HouseStore, SameBytesAsReference) {
  for_each_bits([](int key_bits, int value_bits) {
    for (const int head_dim : kHeadDims) {
      for (const bool feedback : {false, true}) {
        SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << " feedback " << feedback);
        Layer l(key_bits, value_bits, 3, head_dim, 2);
        if (!feedback) l.layer.feedback = nullptr;
        if (head_dim == 80) l.layer.scale = ScaleRule::kLeastSquares;
        const HousePageLayout& layout = l.layer.layout;
        const int64_t stride = 3 * head_dim + 5;
        const std::vector<float> key = random_rows(16 * stride, 1, 3.0F);
        const std::vector<float> value = random_rows(16 * stride, 2);
        // A whole block, and parts of the other, in an order of their own: what is not addressed keeps its bytes.
        const auto fill = [&](const auto& store, AlignedBytes& page) {
          struct Part {
            int block, first, count;
          };
          for (const Part& part : {Part{0, 0, 16}, Part{1, 15, 1}, Part{1, 0, 1}, Part{1, 3, 9}, Part{1, 12, 2}}) {
            ASSERT_TRUE(store(HouseStoreParams{&l.layer, key.data(), value.data(), stride, part.block, part.first,
                                               part.count, page.get()}));
          }
        };
        AlignedBytes want(layout.page_bytes(), 0xa5);
        fill(house_store_ref, want);
        for_each_target([&] {
          AlignedBytes got(layout.page_bytes(), 0xa5);
          fill(house_store, got);
          ASSERT_EQ(first_difference(got, want), -1);
        });
      }
    }
  });
}

TEST(HouseStore, OtherTokensKeepTheirCodesAndScales) {
  for_each_bits([](int key_bits, int value_bits) {
    const int d = 48;
    const Layer l(key_bits, value_bits, 2, d, 2);
    const HousePageLayout& layout = l.layer.layout;
    const std::vector<float> rows = random_rows(int64_t{64} * 2 * d, 3);
    for (const int count : {1, 3, 7}) {
      AlignedBytes page(layout.page_bytes());
      for (const int block : {0, 1}) {
        ASSERT_TRUE(
            house_store({&l.layer, rows.data() + block * 16 * 2 * d, rows.data(), 2 * d, block, 0, 16, page.get()}));
      }
      const AlignedBytes before(layout.page_bytes());
      std::memcpy(before.get(), page.get(), layout.page_bytes());
      ASSERT_TRUE(
          house_store({&l.layer, rows.data() + 40 * 2 * d, rows.data() + 41 * 2 * d, 2 * d, 1, 5, count, page.get()}));
      int changed = 0;
      for (int head = 0; head < 2; ++head) {
        for (int t = 0; t < 32; ++t) {
          const bool stored = t >= 21 && t < 21 + count;
          for (int c = 0; c < d; ++c) {
            const bool same = read_code(page.get(), key_place(layout, head, t, c)) ==
                                  read_code(before.get(), key_place(layout, head, t, c)) &&
                              read_code(page.get(), value_place(layout, head, t, c)) ==
                                  read_code(before.get(), value_place(layout, head, t, c));
            ASSERT_TRUE(same || stored) << "token " << t << " channel " << c;
            changed += same ? 0 : 1;
          }
          for (const bool key : {true, false}) {
            if (!stored) {
              ASSERT_EQ(read_scale(layout, page.get(), key, head, t), read_scale(layout, before.get(), key, head, t));
            }
          }
        }
      }
      EXPECT_GT(changed, count * d / 2);
    }
  });
}

/// Rows that trouble a quantizer.
std::vector<std::vector<float>> awkward_rows(int channels) {
  std::vector<std::vector<float>> rows;
  for (const float x : {0.0F, -0.0F, 1.0F, -2.5F, 6e4F, -6e4F, 1e-7F, 2e-8F, 1e-21F, 3e-23F, 1e-40F, -1e-40F, 0.1F})
    rows.emplace_back(channels, x);
  const auto varied = [&](const auto& f) {
    std::vector<float> row(channels);
    for (int c = 0; c < channels; ++c) row[c] = f(c * 7919 % 1009);
    rows.push_back(std::move(row));
  };
  const int one = channels / 2 * 7919 % 1009;
  varied([&](int i) { return i == one ? 1.0F : 0.0F; });  // one-hot
  varied([&](int i) { return i == one ? -6e4F : 0.0F; });
  varied([&](int i) { return i == one ? 1e-22F : 0.0F; });                              // energy underflows
  varied([&](int i) { return i == one ? 4e3F : 0.01F * static_cast<float>(i % 13); });  // one outlier
  varied([](int i) { return i % 2 == 0 ? 6e4F : -6e4F; });
  varied([](int i) { return (i % 2 == 0 ? 1e-40F : -1e-40F) * static_cast<float>(i % 9); });  // subnormal
  varied([](int i) { return (i % 3 == 0 ? 1e-20F : -1e-20F) * static_cast<float>(i % 9); });
  varied([](int i) { return 1e-7F * static_cast<float>(i % 7 - 3); });  // subnormal scales
  varied([](int i) { return static_cast<float>(i % 4); });              // exact ties
  varied([](int i) { return static_cast<float>(i % 5 - 2); });
  varied([](int i) { return 0.5F * static_cast<float>(i % 7) - 1.5F; });
  varied([](int i) { return (i % 2 == 0 ? 1.0F : -1.0F) * static_cast<float>(2 * (i % 8) + 1); });
  return rows;
}

TEST(HouseStore, AwkwardRows) {
  for_each_target([] {
    for (const int bits : {2, 3, 4}) {
      for (const bool feedback : {false, true}) {
        const int d = 64;
        Layer l(bits, bits, 1, d, 2);
        if (!feedback) l.layer.feedback = nullptr;
        const HousePageLayout& layout = l.layer.layout;
        const std::vector<std::vector<float>> rows = awkward_rows(d);
        for (size_t i = 0; i < rows.size(); ++i) {
          SCOPED_TRACE(::testing::Message() << "row " << i << " bits " << bits << " feedback " << feedback);
          // The row alone, then in all lanes of a block.
          std::vector<float> block;
          for (int t = 0; t < 16; ++t) block.insert(block.end(), rows[i].begin(), rows[i].end());
          AlignedBytes got(layout.page_bytes());
          AlignedBytes want(layout.page_bytes());
          for (const int count : {1, 16}) {
            HouseStoreParams p{&l.layer, block.data(), block.data(), d, count % 16, 0, count, got.get()};
            ASSERT_TRUE(house_store(p));
            p.page = want.get();
            ASSERT_TRUE(house_store_ref(p));
            ASSERT_EQ(first_difference(got, want), -1);
          }
          double energy = 0;
          for (const float x : rows[i]) energy += static_cast<double>(x) * x;
          if (energy == 0) {
            EXPECT_EQ(read_scale(layout, got.get(), true, 0, 0), 0);
            EXPECT_EQ(read_code(got.get(), key_place(layout, 0, 0, 5)), 1u << (bits - 1));
          }
        }
      }
    }
  });
}

TEST(HouseStore, ScaleIsUnbiased) {
  for_each_bits([](int key_bits, int value_bits) {
    for (const int d : {64, 128}) {
      const Layer l(key_bits, value_bits, 2, d, 2);
      const HousePageLayout& layout = l.layer.layout;
      const std::vector<float> key = random_rows(int64_t{16} * 2 * d, 5, 2.0F);
      const std::vector<float> value = random_rows(int64_t{16} * 2 * d, 6, 0.2F);
      AlignedBytes page(layout.page_bytes());
      ASSERT_TRUE(house_store({&l.layer, key.data(), value.data(), 2 * d, 0, 0, 16, page.get()}));
      for (int t = 0; t < 16; ++t) {
        for (int head = 0; head < 2; ++head) {
          for (const bool is_key : {true, false}) {
            const float* const y = (is_key ? key : value).data() + (t * 2 + head) * d;
            double yy = 0;
            double decoded = 0;
            for (int c = 0; c < d; ++c) {
              yy += static_cast<double>(y[c]) * y[c];
              decoded += y[c] * element_ref(layout, page.get(), is_key, head, t, c);
            }
            // Half an ulp of the fp16 scale, and the fp32 sums of d terms.
            ASSERT_NEAR(decoded / yy, 1.0, 0x1p-11 + d * 0x1p-24);
          }
        }
      }
    }
  });
}

TEST(HouseStore, RefusesWhatIsNotFiniteOrDoesNotFit) {
  for_each_target([] {
    for (const int bits : {2, 3, 4}) {
      const int d = 80;
      const Layer l(bits, bits, 2, d, 2);
      AlignedBytes page(l.layer.layout.page_bytes());
      const std::vector<float> fine = random_rows(int64_t{16} * 2 * d, 3);
      for (const int count : {1, 16}) {
        for (const float bad : {kInf, -kInf, std::nanf(""), 3e38F, -3e38F, 1e19F, 1e18F, 4e6F, -4e6F}) {
          for (const int at : {0, 17, 2 * d - 1}) {
            std::vector<float> x = fine;
            x[(count - 1) * 2 * d + at] = bad;
            const HouseStoreParams keys{&l.layer, x.data(), fine.data(), 2 * d, 0, 0, count, page.get()};
            const HouseStoreParams values{&l.layer, fine.data(), x.data(), 2 * d, 0, 0, count, page.get()};
            ASSERT_EQ(house_store(keys), house_store_ref(keys)) << bad << " bits " << bits;
            ASSERT_EQ(house_store(values), house_store_ref(values)) << bad;
            if (!std::isfinite(bad) || std::fabs(bad) > 1e17F) {
              ASSERT_FALSE(house_store(keys)) << bad;
              ASSERT_FALSE(house_store(values)) << bad;
            }
          }
        }
      }
    }
  });
}

/// Upper Cholesky factor U of the inverse of S + 0.01 mean(diag S) I (inverse = U^T U) as feedback entries U_ij / U_ii.
std::vector<float> feedback_of(std::vector<double> s, int d) {
  double mean = 0;
  for (int i = 0; i < d; ++i) mean += s[i * d + i] / d;
  for (int i = 0; i < d; ++i) s[i * d + i] += 0.01 * mean;
  std::vector<double> inverse(s.size());
  for (int i = 0; i < d; ++i) inverse[i * d + i] = 1;
  for (int i = 0; i < d; ++i) {  // Gauss-Jordan; a positive definite matrix needs no pivots
    const double pivot = s[i * d + i];
    for (int c = 0; c < d; ++c) {
      s[i * d + c] /= pivot;
      inverse[i * d + c] /= pivot;
    }
    for (int r = 0; r < d; ++r) {
      const double factor = s[r * d + i];
      for (int c = 0; c < d && r != i; ++c) {
        s[r * d + c] -= factor * s[i * d + c];
        inverse[r * d + c] -= factor * inverse[i * d + c];
      }
    }
  }
  std::vector<double> upper(s.size());
  for (int i = 0; i < d; ++i) {
    for (int j = i; j < d; ++j) {
      double sum = inverse[i * d + j];
      for (int k = 0; k < i; ++k) sum -= upper[k * d + i] * upper[k * d + j];
      upper[i * d + j] = i == j ? std::sqrt(sum) : sum / upper[i * d + i];
    }
  }
  std::vector<float> feedback(s.size());
  for (int i = 0; i < d; ++i) {
    feedback[i * d + i] = static_cast<float>(1.0 / (upper[i * d + i] * upper[i * d + i]));
    for (int j = i + 1; j < d; ++j) feedback[i * d + j] = static_cast<float>(upper[i * d + j] / upper[i * d + i]);
  }
  return feedback;
}

TEST(HouseStore, FeedbackLowersTheErrorOfScores) {
  for (const int bits : {2, 3, 4}) {
    for (const unsigned seed : {1u, 2u, 3u}) {
      const int d = 64;
      const int rank = 16;
      const std::vector<float> a = random_rows(int64_t{d} * rank, seed);
      std::vector<double> s(static_cast<size_t>(d) * d);
      for (int i = 0; i < d; ++i) {
        for (int j = 0; j < d; ++j) {
          for (int k = 0; k < rank; ++k) s[i * d + j] += static_cast<double>(a[i * rank + k]) * a[j * rank + k];
        }
        s[i * d + i] += 1.0;
      }
      const std::vector<float> feedback = feedback_of(s, d);
      Layer l(bits, bits, 1, d, 8);
      const HousePageLayout& layout = l.layer.layout;
      const std::vector<float> rows = random_rows(int64_t{128} * d, 100 + seed);
      double errors[2] = {};
      for (const bool with : {false, true}) {
        l.layer.feedback = with ? feedback.data() : nullptr;
        AlignedBytes page(layout.page_bytes());
        for (int block = 0; block < 8; ++block) {
          const float* const at = rows.data() + block * 16 * d;
          ASSERT_TRUE(house_store({&l.layer, at, at, d, block, 0, 16, page.get()}));
        }
        for (int t = 0; t < 128; ++t) {
          std::vector<double> e(d);
          for (int c = 0; c < d; ++c) e[c] = element_ref(layout, page.get(), true, 0, t, c) - rows[t * d + c];
          for (int i = 0; i < d; ++i) {
            for (int j = 0; j < d; ++j) errors[with ? 1 : 0] += e[i] * s[i * d + j] * e[j];
          }
        }
      }
      EXPECT_LT(errors[1], 0.8 * errors[0]) << "bits " << bits;
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

/// Stored pages with their tables. Tokens never stored hold 0xff bytes: NaN scales.
struct Sequence {
  Sequence(const Layer& l, int n_pages, int n_tokens, int64_t first_position = 0) : layer(l.layer) {
    const HousePageLayout& layout = layer.layout;
    const int channels = layout.n_kv_heads * layout.head_dim;
    const int half = layout.head_dim / 2;
    key = random_rows(int64_t{n_tokens} * channels, 11);
    value = random_rows(int64_t{n_tokens} * channels, 12);
    for (int i = 0; i < n_pages; ++i) {
      pages.emplace_back(layout.page_bytes(), 0xff);
      pointers.push_back(pages.back().get());
    }
    masks.assign(static_cast<size_t>(n_pages) * layout.blocks_per_page, 0);
    for (int t = 0; t < n_tokens; t += 16) {
      const int count = std::min(16, n_tokens - t);
      const int page = t / static_cast<int>(layout.page_tokens());
      masks[t / 16] = static_cast<uint16_t>((1u << count) - 1);
      EXPECT_TRUE(house_store({&layer, key.data() + int64_t{t} * channels, value.data() + int64_t{t} * channels,
                               channels, t / 16 % layout.blocks_per_page, 0, count, pages[page].get()}));
    }
    for (int i = 0; i < half; ++i) frequency.push_back(std::pow(10000.0, -i / static_cast<double>(half)));
    for (int page = 0; page < n_pages; ++page) {
      for (const double f : frequency) {
        const double angle = static_cast<double>(first_position + page * layout.page_tokens()) * f;
        page_cos.push_back(static_cast<float>(std::cos(angle)));
        page_sin.push_back(static_cast<float>(std::sin(angle)));
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

  /// The first n pairs, in descending order, of a shift `mu` [head_dim] for queries q [n_q][head_dim].
  void set_shift(const float* mu, const std::vector<float>& q, int n_q, int n_pairs) {
    const int d = layer.layout.head_dim;
    const int half = d / 2;
    pairs.clear();
    a.clear();
    b.clear();
    for (int i = 0; i < n_pairs; ++i) pairs.push_back(static_cast<uint16_t>(n_pairs - 1 - i));
    for (int h = 0; h < n_q; ++h) {
      for (const int i : pairs) {
        const float* const at = q.data() + int64_t{h} * d;
        a.push_back(at[i] * mu[i] + at[half + i] * mu[half + i]);
        b.push_back(at[half + i] * mu[i] - at[i] * mu[half + i]);
      }
    }
  }

  HouseDecodeParams decode(int head, int n_q, const std::vector<float>& q, State& state) const {
    const ShiftTerm shift{static_cast<int>(pairs.size()),
                          pairs.data(),
                          a.data(),
                          b.data(),
                          page_cos.data(),
                          page_sin.data(),
                          token_cos.data(),
                          token_sin.data()};
    return {&layer,      {pointers.data(), masks.data(), static_cast<int>(pages.size())}, head, n_q, q.data(), shift,
            state.view()};
  }

  const HouseLayer& layer;
  std::vector<float> key, value;
  std::vector<AlignedBytes> pages;
  std::vector<const std::byte*> pointers;
  std::vector<uint16_t> masks;
  std::vector<double> frequency;
  std::vector<float> page_cos, page_sin, token_cos, token_sin;
  std::vector<uint16_t> pairs;
  std::vector<float> a, b;
};

std::vector<float> random_q(int n_q, int head_dim) {
  return random_rows(int64_t{n_q} * head_dim, 21, 1.5F / std::sqrt(static_cast<float>(head_dim)));
}

/// The queries as the kernel sees them: 8-bit integers times a step, the largest element being 127 steps.
std::vector<float> rounded_q(const std::vector<float>& q, int n_q, int head_dim) {
  std::vector<float> out(q.size());
  for (int h = 0; h < n_q; ++h) {
    const float* const from = q.data() + int64_t{h} * head_dim;
    float top = 0;
    for (int c = 0; c < head_dim; ++c) top = std::max(top, std::fabs(from[c]));
    for (int c = 0; c < head_dim && top > 0; ++c)
      out[h * head_dim + c] = std::nearbyint(from[c] * (127.0F / top)) * (top / 127.0F);
  }
  return out;
}

/// What a decode can be off by, from its arithmetic.
struct Tolerance {
  double value = 0;  ///< largest |value|
  double norm1 = 0;  ///< largest sum of |key| of a token
  int64_t tokens = 0;

  Tolerance(const Sequence& s, int head) {
    const HousePageLayout& l = s.layer.layout;
    for (size_t page = 0; page < s.pages.size(); ++page) {
      for (int64_t t = 0; t < l.page_tokens(); ++t) {
        if ((s.masks[page * l.blocks_per_page + t / 16] >> t % 16 & 1) == 0) continue;
        double norm = 0;
        for (int c = 0; c < l.head_dim; ++c) {
          norm += std::fabs(element_ref(l, s.pages[page].get(), true, head, t, c));
          value = std::max(value, std::fabs(element_ref(l, s.pages[page].get(), false, head, t, c)));
        }
        norm1 = std::max(norm1, norm);
        ++tokens;
      }
    }
  }

  /// Against queries already rounded. Weights times scales are rounded to a step of the page's largest over 32639, so each token's
  /// contribution errs by half of (largest weight 1) * (largest value) / 32639, all of them by `tokens` times that over the sum of
  /// weights. Scores are fp32: their last products and sums, of numbers below 32, err by some 4 roundings of 2^-20, weights by as much.
  double weights(double sum) const { return value * (static_cast<double>(tokens) / (2 * 32639.0 * sum) + kScore); }
  /// Against queries as given: a query element errs by at most 1/254 of the head's largest, a score by that times sum |key|, the
  /// weights' ratios by exp of twice that.
  double queries(double q_top) const { return value * std::expm1(2 * q_top / 254 * norm1); }

  static constexpr double kScore = 4 * 0x1p-20;
};

void expect_same(State& got, State& want, int head_dim, const Tolerance& tolerance) {
  const std::vector<float> a = got.finish(head_dim);
  const std::vector<float> b = want.finish(head_dim);
  for (size_t h = 0; h < got.max.size(); ++h) {
    ASSERT_NEAR(got.max[h], want.max[h], Tolerance::kScore);
    ASSERT_NEAR(got.sum[h], want.sum[h], Tolerance::kScore * want.sum[h]);
    for (int c = 0; c < head_dim; ++c) {
      const size_t i = h * head_dim + c;
      ASSERT_NEAR(a[i], b[i], tolerance.weights(want.sum[h])) << "head " << h << " channel " << c;
    }
  }
}

TEST(HouseDecode, EqualsReference) {
  for_each_bits([](int key_bits, int value_bits) {
    for (const int head_dim : kHeadDims) {
      const Layer l(key_bits, value_bits, 2, head_dim, 2);
      Sequence s(l, 3, 87);
      const Tolerance tolerance(s, 1);
      for (const int n_q : {1, 2, 3, 4, 5, 6, 7, 8, 9}) {
        if (n_q != 4 && (head_dim != 80 && (head_dim != 64 || key_bits != value_bits))) continue;
        SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << " query heads " << n_q);
        const std::vector<float> given = random_q(n_q, head_dim);
        const std::vector<float> q = rounded_q(given, n_q, head_dim);
        State want(n_q, head_dim);
        house_decode_ref(s.decode(1, n_q, q, want));
        State exact(n_q, head_dim);
        house_decode_ref(s.decode(1, n_q, given, exact));
        for_each_target([&] {
          State got(n_q, head_dim);
          house_decode(s.decode(1, n_q, given, got));
          expect_same(got, want, head_dim, tolerance);
          const std::vector<float> a = got.finish(head_dim);
          const std::vector<float> b = exact.finish(head_dim);
          for (int h = 0; h < n_q; ++h) {
            float top = 0;
            for (int c = 0; c < head_dim; ++c) top = std::max(top, std::fabs(given[h * head_dim + c]));
            const double bound = tolerance.weights(exact.sum[h]) + tolerance.queries(top);
            for (int c = 0; c < head_dim; ++c) ASSERT_NEAR(a[h * head_dim + c], b[h * head_dim + c], bound);
          }
        });
      }
    }
  });
}

TEST(HouseDecode, MasksChooseTokens) {
  // Tokens 100 .. 127 were never stored: their scales are NaN.
  for (const int bits : {2, 3, 4}) {
    for (const int head_dim : {80, 128}) {
      const Layer l(bits, bits, 2, head_dim, 4);
      Sequence s(l, 2, 100);
      const std::vector<float> q = rounded_q(random_q(4, head_dim), 4, head_dim);
      for (const std::vector<uint16_t>& masks : {std::vector<uint16_t>{0, 0, 0, 0, 0, 0, 0, 0},
                                                 {0, 0, 1u << 7, 0, 0, 0, 0, 0},
                                                 {0xffff, 0, 0xaaaa, 0, 0, 0, 0, 0},
                                                 {0, 0, 0, 0, 0x8000, 0xffff, 0x000f, 0},
                                                 {0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0x000f, 0}}) {
        s.masks = masks;
        const Tolerance tolerance(s, 0);
        State want(4, head_dim);
        house_decode_ref(s.decode(0, 4, q, want));
        for_each_target([&] {
          State got(4, head_dim);
          house_decode(s.decode(0, 4, q, got));
          if (want.sum[0] == 0) {
            EXPECT_EQ(got.max, std::vector<float>(4, -kInf));
            EXPECT_EQ(got.finish(head_dim), std::vector<float>(got.acc.size(), 0));
          } else {
            expect_same(got, want, head_dim, tolerance);
          }
        });
      }
    }
  }
}

TEST(HouseDecode, PagesWithoutTokensAreNotRead) {
  const Layer l(2, 2, 1, 64, 2);
  Sequence s(l, 3, 96);
  s.pointers[0] = s.pointers[2] = nullptr;  // reading them would crash
  s.masks = {0, 0, 0, 0xffff, 0, 0};
  const std::vector<float> q = random_q(1, 64);
  State state(1, 64);
  house_decode(s.decode(0, 1, q, state));
  EXPECT_GT(state.sum[0], 0);
  State none(1, 64);
  HouseDecodeParams p = s.decode(0, 1, q, none);
  p.run.n_pages = 0;
  house_decode(p);
  EXPECT_EQ(none.max[0], -kInf);
  EXPECT_EQ(none.sum[0], 0);
}

TEST(HouseDecode, ZeroQueriesAndZeroValues) {
  const Layer l(2, 2, 1, 64, 2);
  const std::vector<float> zeros(16 * 64, 0.0F);
  const std::vector<float> key = random_rows(16 * 64, 3);
  AlignedBytes page(l.layer.layout.page_bytes(), 0xff);
  ASSERT_TRUE(house_store({&l.layer, key.data(), zeros.data(), 64, 0, 0, 16, page.get()}));
  const std::byte* const pages[] = {page.get()};
  const uint16_t masks[] = {0xffff, 0};
  for_each_target([&] {
    State state(1, 64);
    house_decode({&l.layer, {pages, masks, 1}, 0, 1, zeros.data(), {}, state.view()});
    EXPECT_EQ(state.max[0], 0);
    EXPECT_NEAR(state.sum[0], 16, 1e-4);
    EXPECT_EQ(state.finish(64), std::vector<float>(64, 0));
  });
}

TEST(HouseDecode, MergeOfSplitsEqualsUnsplit) {
  for_each_target([] {
    const Layer l(3, 2, 2, 64, 2);
    Sequence s(l, 4, 115);
    const std::vector<float> q = random_q(6, 64);
    s.set_shift(l.shift.data(), q, 6, 5);
    const Tolerance tolerance(s, 0);
    State whole(6, 64);
    house_decode(s.decode(0, 6, q, whole));
    for (int cut = 0; cut <= 4; ++cut) {
      State left(6, 64);
      State right(6, 64);
      HouseDecodeParams a = s.decode(0, 6, q, left);
      a.run.n_pages = cut;
      house_decode(a);
      HouseDecodeParams b = s.decode(0, 6, q, right);
      b.run = {s.pointers.data() + cut, s.masks.data() + cut * 2, 4 - cut};
      b.shift.page_cos += cut * 32;
      b.shift.page_sin += cut * 32;
      house_decode(b);
      kernels::merge_softmax(left.view(), right.view(), 6, 64);
      expect_same(left, whole, 64, tolerance);
    }
  });
}

TEST(HouseDecode, ShiftEqualsTheDirectSum) {
  // The definition itself: q . (y H^T + mu R_n) with angles of absolute positions in double. Tables in fp32 err by 2^-25 each, so a
  // term of |q| |mu| = 3 by some 2^-22, all d of them by d times that.
  const int d = 64;
  const int half = d / 2;
  const Layer l(2, 2, 2, d, 2);
  const HousePageLayout& layout = l.layer.layout;
  const float* const mu = l.shift.data() + d;
  for (const int64_t position : {int64_t{0}, int64_t{1}, int64_t{31}, int64_t{32}, int64_t{100000}}) {
    Sequence s(l, 2, 64, position);
    for (const int n_q : {1, 2, 3, 5}) {
      const std::vector<float> q = rounded_q(random_q(n_q, d), n_q, d);
      s.set_shift(mu, q, n_q, half);
      State ref(n_q, d);
      house_decode_ref(s.decode(1, n_q, q, ref));
      State want(n_q, d);
      for (int h = 0; h < n_q; ++h) {
        std::vector<double> scores, values;
        for (int64_t t = 0; t < 64; ++t) {
          double score = 0;
          for (int i = 0; i < half; ++i) {
            const double angle = static_cast<double>(position + t) * s.frequency[i];
            const double first = mu[i] * std::cos(angle) - mu[half + i] * std::sin(angle);
            const double second = mu[half + i] * std::cos(angle) + mu[i] * std::sin(angle);
            score += q[h * d + i] * first + q[h * d + half + i] * second;
          }
          for (int c = 0; c < d; ++c) {
            score += q[h * d + c] * element_ref(layout, s.pointers[t / 32], true, 1, t % 32, c);
            values.push_back(element_ref(layout, s.pointers[t / 32], false, 1, t % 32, c));
          }
          scores.push_back(score);
        }
        kernels::accumulate_softmax_ref(scores, values, d, want.max.data() + h, want.sum.data() + h,
                                        want.acc.data() + h * d);
      }
      const double far = d * 0x1p-22;
      const Tolerance tolerance(s, 1);
      const auto check = [&](State& got) {
        const std::vector<float> a = got.finish(d);
        const std::vector<float> b = want.finish(d);
        for (int h = 0; h < n_q; ++h) {
          ASSERT_NEAR(got.max[h], want.max[h], Tolerance::kScore + far);
          for (int c = 0; c < d; ++c)
            ASSERT_NEAR(a[h * d + c], b[h * d + c], tolerance.weights(want.sum[h]) + 2 * far * tolerance.value);
        }
      };
      check(ref);
      for_each_target([&] {
        State got(n_q, d);
        house_decode(s.decode(1, n_q, q, got));
        check(got);
      });
    }
  }
}

TEST(HouseLoad, EqualsReference) {
  for_each_bits([](int key_bits, int value_bits) {
    for (const int d : kHeadDims) {
      for (const bool shifted : {false, true}) {
        Layer l(key_bits, value_bits, 2, d, 2);
        if (!shifted) l.layer.shift = nullptr;
        const Sequence s(l, 1, 32);
        const std::vector<float> angle = random_rows(int64_t{d} * 8, 3);
        std::vector<float> cos, sin;
        for (const float x : angle) {
          cos.push_back(std::cos(x));
          sin.push_back(std::sin(x));
        }
        for (const int block : {0, 1}) {
          const auto load = [&](const auto& with, std::vector<float>& keys, std::vector<float>& values) {
            keys.assign(d * 19, -7.0F);
            values.assign(d * 16, -7.0F);
            with(HouseLoadParams{&l.layer, s.pages[0].get(), 1, block, shifted ? cos.data() : nullptr,
                                 shifted ? sin.data() : nullptr, keys.data(), 19, values.data()});
          };
          std::vector<float> want_keys, want_values;
          load(house_load_ref, want_keys, want_values);
          for_each_target([&] {
            std::vector<float> keys, values;
            load(house_load, keys, values);
            for (size_t i = 0; i < keys.size(); ++i) {
              // Up to 8 additions of numbers below 64 that are then scaled down.
              ASSERT_NEAR(keys[i], want_keys[i], 2e-5) << "head_dim " << d << " index " << i;
            }
            for (size_t i = 0; i < values.size(); ++i)
              ASSERT_EQ(values[i], want_values[i]) << "head_dim " << d << " index " << i;
          });
        }
      }
    }
  });
}

}  // namespace
}  // namespace rotunda::kv::house
