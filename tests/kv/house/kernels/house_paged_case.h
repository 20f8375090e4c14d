#pragma once

#include <cuda_runtime.h>

#include <array>

#include "kernels/paged_decode_case.h"
#include "kv/house/kernels/house_codec_ref.h"
#include "kv/house/kernels/house_unit.h"

namespace rotunda::kv::house::testing {

using kernels::testing::PagedCase;

/// Pages of any codes, scales of the size that trained models have.
inline PagedCase house_case(const PagedCase::Shape& shape, const HousePageLayout& layout) {
  return PagedCase(shape, layout.page_bytes(), kHouseUnitTokens, 12, [&](std::byte* page, std::mt19937& random) {
    for (int64_t i = 0; i < layout.page_bytes(); ++i) page[i] = static_cast<std::byte>(random());
    std::uniform_real_distribution<float> scale(0.2F, 1.0F);
    for (int head = 0; head < layout.n_kv_heads; ++head) {
      for (int64_t i = 0; i < 2 * layout.page_tokens(); ++i) {
        const Half x = to_half(scale(random));
        std::memcpy(page + layout.key_scale_offset(head) + 2 * i, &x, 2);
      }
    }
  });
}

/// What fp16 holds of two numbers, and what it leaves over: side by side, the first in the low half.
inline std::array<uint32_t, 2> halves_and_rests(double x, double y) {
  std::array<uint32_t, 2> made = {};
  for (int i = 0; i < 2; ++i) {
    const double whole = i == 0 ? x : y;
    const Half rounded = to_half(static_cast<float>(whole));
    made[0] |= uint32_t{rounded.bits} << 16 * i;
    made[1] |= uint32_t{to_half(static_cast<float>(whole - to_float(rounded))).bits} << 16 * i;
  }
  return made;
}

/// A shift of some RoPE pairs, other ones in every kv head, as large as a model's key biases make it.
struct ShiftCase {
  static constexpr int kSteps = 2;
  static constexpr int kPairs = 11;  // of 16: the rest is padding

  explicit ShiftCase(PagedCase& test) : half(test.shape.head_dim / 2), pages(test.table_stride + 1) {
    const int n_q = test.shape.n_q, n_kv_heads = test.shape.n_kv_heads;
    std::uniform_real_distribution<float> size(-300, 300);
    for (int head = 0; head < n_kv_heads; ++head) {
      std::vector<uint16_t> all(half);
      std::iota(all.begin(), all.end(), uint16_t{0});
      std::shuffle(all.begin(), all.end(), test.random);
      for (int i = 0; i < 8 * kSteps; ++i) pairs.push_back(i < kPairs ? all[i] : 0);
    }
    for (size_t row = 0; row < test.shape.lens.size() * n_kv_heads * n_q; ++row) {
      float largest = 0;
      for (int i = 0; i < 8 * kSteps; ++i) {
        const float2 x = i < kPairs && row % 3 != 0 ? make_float2(size(test.random), size(test.random)) : make_float2(0, 0);
        ab.push_back(x);
        largest = std::max(largest, std::hypot(x.x, x.y));
      }
      norm.push_back(largest);
    }
    for (int page = 0; page < pages; ++page) {
      for (int pair = 0; pair < half; ++pair) {
        const double angle = turn(int64_t{page} * PagedCase::kPageTokens, pair);
        page_cos.push_back(static_cast<float>(std::cos(angle)));
        page_sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    for (int block = 0; block < PagedCase::kPageTokens / 16; ++block) {
      for (int pair = 0; pair < half; ++pair) {
        for (int t = 0; t < 16; ++t) {
          token_cos.push_back(static_cast<float>(std::cos(turn(block * 16 + t, pair))));
          token_sin.push_back(static_cast<float>(std::sin(turn(block * 16 + t, pair))));
        }
      }
    }
    make_turns(n_kv_heads);
    make_queries(static_cast<int>(test.shape.lens.size()), n_kv_heads, n_q);
  }

  double turn(int64_t position, int pair) const { return static_cast<double>(position) * std::pow(1e4, -static_cast<double>(pair) / half); }

  void make_turns(int n_kv_heads) {
    for (int at = 0; at < n_kv_heads * kSteps * 8; ++at) {  // head, step, operand
      for (int rest = 0; rest < 2; ++rest) {
        for (int lane = 0; lane < 32; ++lane) {
          uint32_t words[4];
          for (int i = 0; i < 4; ++i) {
            const int pair = pairs[at / 8 * 8 + i / 2 * 4 + lane % 4];
            const double angle = turn(at % 8 / 2 * 32 + lane / 4 * 4 + at % 2 * 2 + i % 2, pair);
            words[i] = halves_and_rests(std::cos(angle), std::sin(angle))[rest];
          }
          turns.push_back({words[0], words[1], words[2], words[3]});
        }
      }
    }
  }

  void make_queries(int batch, int n_kv_heads, int n_q) {
    const int sets = n_q <= 4 ? 1 : 2;
    for (int of = 0; of < batch * n_kv_heads; ++of) {
      for (int page = 0; page < pages; ++page) {
        for (int step = 0; step < kSteps; ++step) {
          for (int set = 0; set < sets; ++set) {
            for (int lane = 0; lane < 32; ++lane) {
              const int h = 4 * set + lane / 8;
              uint32_t words[2] = {};
              for (int i = 0; i < 2 && h < n_q; ++i) {
                const int place = 8 * step + 4 * i + lane % 4;
                const float2 x = ab[(of * n_q + h) * 8 * kSteps + place];
                const int pair = pairs[of % n_kv_heads * 8 * kSteps + place];
                const double c = page_cos[page * half + pair], s = page_sin[page * half + pair];
                const double inverse = norm[of * n_q + h] > 0 ? 1 / double{norm[of * n_q + h]} : 0;
                words[i] = halves_and_rests((x.x * c + x.y * s) * inverse, (x.y * c - x.x * s) * inverse)[lane / 4 % 2];
              }
              queries.push_back({words[0], words[1]});
            }
          }
        }
      }
    }
  }

  kernels::PagedShift params() const { return {kSteps, turns.data(), queries.data(), pages, norm.data()}; }

  /// The reference's form of it for one (sequence, kv head), valid until the next call.
  ShiftTerm term(int seq, int head, const PagedCase::Shape& shape) {
    a.clear();
    b.clear();
    for (int h = 0; h < shape.n_q; ++h) {
      for (int i = 0; i < kPairs; ++i) {
        const float2 x = ab[((int64_t{seq} * shape.n_kv_heads + head) * shape.n_q + h) * 8 * kSteps + i];
        a.push_back(x.x);
        b.push_back(x.y);
      }
    }
    return {kPairs, pairs.data() + int64_t{head} * 8 * kSteps, a.data(), b.data(), page_cos.data(), page_sin.data(), token_cos.data(), token_sin.data()};
  }

  int half;
  int pages;
  std::vector<uint16_t> pairs;
  std::vector<float2> ab;
  std::vector<uint4> turns;
  std::vector<uint2> queries;
  std::vector<float> norm, page_cos, page_sin, token_cos, token_sin, a, b;
};

/// @param shift or null
inline std::vector<float> house_expected(const PagedCase& test, const HousePageLayout& layout, ShiftCase* shift = nullptr) {
  HouseLayer layer;
  layer.layout = layout;
  return test.expected([&](const kernels::PageRun& run, int seq, int head, const float* q, const kernels::SoftmaxState& state) {
    house_decode_ref({&layer, run, head, test.shape.n_q, q, shift == nullptr ? ShiftTerm() : shift->term(seq, head, test.shape), state});
  });
}

/// Queries enter with 13 bits and a sign, weights with 14 bits (12 in every other group of four tokens) of the unit's largest: rounding
/// adds up to a few 1e-4 of the outputs, which are sums of random signs.
inline constexpr double kTolerance = 1e-3;

}  // namespace rotunda::kv::house::testing
