#pragma once

#include <cuda_runtime.h>

#include "kernels/paged_decode_case.h"
#include "kv/rotate/kernels/rotate_decode_shape.h"
#include "kv/rotate/kernels/rotate_load_case.h"

namespace rotunda::kv::rotate::testing {

using kernels::testing::PagedCase;

/// Pages of any codes, an order of channels over the whole layer, and the tables of RoPE.
struct DecodeCase {
  DecodeCase(const PagedCase::Shape& shape, ZeroPoint zero, int group_size)
      : layout{2, zero, shape.n_kv_heads, shape.head_dim, kRotateHeads, group_size, PagedCase::kPageTokens / 16},
        paged(shape, layout.page_bytes(), kRotateUnitTokens, 13, [&](std::byte* page, std::mt19937& random) {
          for (int64_t i = 0; i < layout.page_bytes(); ++i) page[i] = static_cast<std::byte>(random());
          LoadCase::fill_scales(layout, page, random);
        }) {
    const std::vector<uint16_t> order = random_order(layout.kv_channels(), paged.random);
    key_group.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) key_group[order[i]] = static_cast<uint16_t>(i / group_size);
    for (const int group : key_group) key_offsets.push_back(rotate_key_offset(group, layout.n_quant_groups()));
    const int half = shape.head_dim / 2;
    const auto turn = [&](int64_t position, int pair) {
      return static_cast<double>(position) * std::pow(1e4, -static_cast<double>(pair) / half);
    };
    for (int page = 0; page < paged.table_stride; ++page) {
      for (int pair = 0; pair < half; ++pair) {
        const double angle = turn(int64_t{page} * PagedCase::kPageTokens, pair);
        page_cos.push_back(static_cast<float>(std::cos(angle)));
        page_sin.push_back(static_cast<float>(std::sin(angle)));
        page_table.push_back(make_float2(page_cos.back(), page_sin.back()));
      }
    }
    token_table.resize(static_cast<size_t>(PagedCase::kPageTokens) * half * 2);
    for (int place = 0; place < PagedCase::kPageTokens; ++place) {
      for (int pair = 0; pair < half; ++pair) {
        uint16_t* const to = token_table.data() + rotate_turn_place(place, pair);
        to[0] = to_half(static_cast<float>(std::cos(turn(place, pair)))).bits;
        to[2] = to_half(static_cast<float>(std::sin(turn(place, pair)))).bits;
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

  kernels::PagedRotate params() const {
    return {layout.n_quant_groups(), layout.zero == ZeroPoint::kMinimum, key_offsets.data(),
            reinterpret_cast<const uint4*>(token_table.data()), page_table.data()};
  }

  std::vector<float> expected() const {
    RotateLayer layer{};
    layer.layout = layout;
    layer.key_group = key_group.data();
    layer.key_hadamard = kernels::hadamard_plan(layout.group_channels());
    const int n_q = paged.shape.n_q;
    const int d = paged.shape.head_dim;
    std::vector<float> max, sum, acc;  // of the rotation group
    return paged.expected([&](const kernels::PageRun& run, int, int head, const float* q, const kernels::SoftmaxState& state) {
      if (head % kRotateHeads == 0) {
        max.assign(kRotateHeads * n_q, -std::numeric_limits<float>::infinity());
        sum.assign(max.size(), 0);
        acc.assign(max.size() * d, 0);
        rotate_decode_ref({&layer, run, head / kRotateHeads, n_q, q, page_cos.data(), page_sin.data(), token_cos.data(), token_sin.data(),
                           {max.data(), sum.data(), acc.data()}});
      }
      const int first = head % kRotateHeads * n_q;
      std::copy_n(max.begin() + first, n_q, state.max);
      std::copy_n(sum.begin() + first, n_q, state.sum);
      std::copy_n(acc.begin() + int64_t{first} * d, n_q * d, state.acc);
    });
  }

  RotatePageLayout layout;
  PagedCase paged;
  std::vector<uint16_t> key_group, key_offsets;
  std::vector<float2> page_table;
  std::vector<uint16_t> token_table;
  std::vector<float> page_cos, page_sin, token_cos, token_sin;
};

/// Keys of size 4 are rounded to fp16 a dozen times between code and score, by 2^-12 of a partial sum each: 1e-3 of a score's spread,
/// which is 10 here, and so up to 1e-2 of a weight; outputs are sums of many with random signs.
inline constexpr double kDecodeTolerance = 5e-3;

}  // namespace rotunda::kv::rotate::testing
