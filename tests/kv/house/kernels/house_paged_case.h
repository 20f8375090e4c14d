#pragma once

#include "kernels/paged_decode_case.h"
#include "kv/house/kernels/house_codec_ref.h"

namespace rotunda::kv::house::testing {

using kernels::testing::PagedCase;

/// Pages of any codes, scales of the size that trained models have.
inline PagedCase house_case(const PagedCase::Shape& shape, const HousePageLayout& layout) {
  return PagedCase(shape, layout.page_bytes(), PagedCase::kPageTokens, 12, [&](std::byte* page, std::mt19937& random) {
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

inline std::vector<float> house_expected(const PagedCase& test, const HousePageLayout& layout) {
  HouseLayer layer;
  layer.layout = layout;
  return test.expected([&](const kernels::PageRun& run, int head, const float* q, const kernels::SoftmaxState& state) {
    house_decode_ref({&layer, run, head, test.shape.n_q, q, ShiftTerm(), state});
  });
}

/// Queries enter with 13 bits and a sign, weights with 14 bits (12 in every other group of four tokens) of the page's largest: rounding
/// adds up to a few 1e-4 of the outputs, which are sums of random signs.
inline constexpr double kTolerance = 1e-3;

}  // namespace rotunda::kv::house::testing
