#pragma once

#include "kernels/paged_decode_case.h"
#include "kv/grouped/kernels/fp8_unit.h"
#include "kv/grouped/kernels/grouped_codec_ref.h"

namespace rotunda::kv::grouped::testing {

using kernels::testing::PagedCase;

inline GroupedLayer fp8_layer(int n_kv_heads, int head_dim) {
  const GroupedSide side{8, head_dim, ScaleType::kFp16, 0, false};
  const GroupedCodec codec{.levels = Levels::kE4m3, .rule = Rule::kLargestToTop};
  return {{side, side, n_kv_heads, head_dim, PagedCase::kPageTokens / 16}, codec, codec};
}

/// Pages of any codes but NaN; scales make keys of the size that trained models have, values of sizes far apart.
inline PagedCase fp8_case(const PagedCase::Shape& shape, const GroupedLayer& layer) {
  const GroupedPageLayout& l = layer.layout;
  return PagedCase(shape, l.page_bytes(), kFp8UnitTokens, 13, [&](std::byte* page, std::mt19937& random) {
    for (int64_t i = 0; i < l.page_bytes(); ++i) {
      auto code = static_cast<uint8_t>(random());
      if ((code & 0x7f) == 0x7f) code ^= 1;
      page[i] = static_cast<std::byte>(code);
    }
    std::uniform_real_distribution<float> spread(0.5F, 1.0F);
    for (int head = 0; head < l.n_kv_heads; ++head) {
      for (int64_t t = 0; t < l.page_tokens(); ++t) {
        // Now and then all zero, or subnormal.
        const float sizes[] = {0.02F, 0.02F, 0.02F, 0.002F, 1e-6F, 0.0F};
        const Half key = to_half(spread(random) * sizes[random() % 6]);
        const Half value = to_half(spread(random) * sizes[random() % 6]);
        std::memcpy(page + scale_place(l, head, true, 0, t), &key, 2);
        std::memcpy(page + scale_place(l, head, false, 0, t), &value, 2);
      }
    }
  });
}

inline std::vector<float> fp8_expected(const PagedCase& test, const GroupedLayer& layer) {
  return test.expected([&](const kernels::PageRun& run, int, int head, const float* q, const kernels::SoftmaxState& state) {
    grouped_decode_ref({&layer, run, head, test.shape.n_q, q, state});
  });
}

}  // namespace rotunda::kv::grouped::testing
