#pragma once

#include "kernels/paged_decode_case.h"

namespace rotunda::kernels::testing {

/// Pages of normal numbers. @param layout of type kBf16 or kFp16
inline PagedCase plain_case(const PagedCase::Shape& shape, const PlainPageLayout& layout, int unit_tokens) {
  return PagedCase(shape, layout.page_bytes(), unit_tokens, 11, [&](std::byte* page, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < layout.page_bytes() / 2; ++i) {
      const float x = normal(random);
      const uint16_t bits = layout.type == ElementType::kBf16 ? to_bfloat16(x).bits : to_half(x).bits;
      std::memcpy(page + 2 * i, &bits, 2);
    }
  });
}

inline std::vector<float> plain_expected(const PagedCase& test, const PlainPageLayout& layout) {
  return test.expected([&](const PageRun& run, int, int head, const float* q, const SoftmaxState& state) {
    decode_plain_ref({layout, run, head, test.shape.n_q, q, state});
  });
}

}  // namespace rotunda::kernels::testing
