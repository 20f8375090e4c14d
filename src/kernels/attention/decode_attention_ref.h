#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/half.h"
#include "kernels/attention/decode_attention.h"

namespace rotunda::kernels {

/// One element of a plain page.
inline double plain_element_ref(const PlainPageLayout& layout, const std::byte* at, int64_t index) {
  if (layout.type == ElementType::kFp32) {
    float x;
    std::memcpy(&x, at + index * 4, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, at + index * 2, 2);
  return layout.type == ElementType::kBf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
}

/// Softmax over explicit scores and values in double, merged into `state`.
/// @param scores [n_tokens]  @param values [n_tokens][head_dim]
inline void accumulate_softmax_ref(const std::vector<double>& scores, const std::vector<double>& values, int head_dim, float* max,
                                   float* sum, float* acc) {
  if (scores.empty()) return;
  const double old_max = *max;
  const double new_max = std::max(old_max, *std::max_element(scores.begin(), scores.end()));
  const double keep = std::isinf(old_max) ? 0.0 : std::exp(old_max - new_max);
  std::vector<double> out(head_dim);
  for (int c = 0; c < head_dim; ++c) out[c] = acc[c] * keep;
  double total = *sum * keep;
  for (size_t t = 0; t < scores.size(); ++t) {
    const double p = std::exp(scores[t] - new_max);
    total += p;
    for (int c = 0; c < head_dim; ++c) out[c] += p * values[t * head_dim + c];
  }
  *max = static_cast<float>(new_max);
  // The state's maximum is a float: what is lost in rounding it goes into the sums.
  const double slack = std::exp(new_max - static_cast<double>(*max));
  *sum = static_cast<float>(total * slack);
  for (int c = 0; c < head_dim; ++c) acc[c] = static_cast<float>(out[c] * slack);
}

inline void decode_plain_ref(const PlainDecodeParams& p) {
  const PlainPageLayout& layout = p.layout;
  const int d = layout.head_dim;
  for (int h = 0; h < p.n_q; ++h) {
    std::vector<double> scores;
    std::vector<double> values;
    for (int page = 0; page < p.run.n_pages; ++page) {
      for (int64_t t = 0; t < layout.page_tokens(); ++t) {
        const int block = static_cast<int>(t / kTokenBlock);
        const int lane = static_cast<int>(t % kTokenBlock);
        if ((p.run.masks[page * layout.blocks_per_page + block] >> lane & 1) == 0) continue;
        const std::byte* const key = p.run.pages[page] + layout.key_block_offset(p.kv_head, block);
        const std::byte* const value = p.run.pages[page] + layout.value_row_offset(p.kv_head, t);
        double score = 0;
        for (int c = 0; c < d; ++c) score += static_cast<double>(p.q[h * d + c]) * plain_element_ref(layout, key, c * kTokenBlock + lane);
        scores.push_back(score);
        for (int c = 0; c < d; ++c) values.push_back(plain_element_ref(layout, value, c));
      }
    }
    accumulate_softmax_ref(scores, values, d, p.state.max + h, p.state.sum + h, p.state.acc + int64_t{h} * d);
  }
}

}  // namespace rotunda::kernels
