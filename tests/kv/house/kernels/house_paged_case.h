#pragma once

#include <cuda_runtime.h>

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

/// A shift of some RoPE pairs, other ones in every kv head, as large as a model's key biases make it.
struct ShiftCase {
  static constexpr int kSteps = 2;
  static constexpr int kPairs = 11;  // of 16: the rest is padding

  explicit ShiftCase(PagedCase& test) : half(test.shape.head_dim / 2) {
    const int n_heads = test.shape.n_kv_heads * test.shape.n_q;
    std::uniform_real_distribution<float> size(-300, 300);
    for (int head = 0; head < test.shape.n_kv_heads; ++head) {
      std::vector<uint16_t> all(half);
      std::iota(all.begin(), all.end(), uint16_t{0});
      std::shuffle(all.begin(), all.end(), test.random);
      for (int i = 0; i < 8 * kSteps; ++i) pairs.push_back(i < kPairs ? all[i] : 0);
    }
    for (size_t row = 0; row < test.shape.lens.size() * n_heads; ++row) {
      float largest = 0;
      for (int i = 0; i < 8 * kSteps; ++i) {
        const float2 x = i < kPairs && row % 3 != 0 ? make_float2(size(test.random), size(test.random)) : make_float2(0, 0);
        ab.push_back(x);
        largest = std::max(largest, std::hypot(x.x, x.y));
      }
      norm.push_back(largest);
    }
    const auto turn = [&](int64_t position, int pair) { return static_cast<double>(position) * std::pow(1e4, -static_cast<double>(pair) / half); };
    for (int pair = 0; pair < half; ++pair) {
      for (int j = 0; j < PagedCase::kPageTokens; ++j) {
        const double parts[2] = {std::cos(turn(j, pair)), std::sin(turn(j, pair))};
        uint32_t number = 0, rest = 0;
        for (int i = 0; i < 2; ++i) {
          const Half rounded = to_half(static_cast<float>(parts[i]));
          number |= uint32_t{rounded.bits} << 16 * i;
          rest |= uint32_t{to_half(static_cast<float>(parts[i] - to_float(rounded))).bits} << 16 * i;
        }
        token_table.push_back({number, rest});
      }
    }
    for (int page = 0; page < test.table_stride; ++page) {
      for (int pair = 0; pair < half; ++pair) {
        const double angle = turn(int64_t{page} * PagedCase::kPageTokens, pair);
        page_table.push_back(make_float2(static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))));
        page_cos.push_back(page_table.back().x);
        page_sin.push_back(page_table.back().y);
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
  }

  kernels::PagedShift params() const { return {kSteps, pairs.data(), ab.data(), norm.data(), token_table.data(), page_table.data()}; }

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
  std::vector<uint16_t> pairs;
  std::vector<float2> ab, page_table;
  std::vector<uint2> token_table;
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
