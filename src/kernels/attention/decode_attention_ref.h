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

/// Decode attention over a run of pages, whatever they hold; merged into `state`.
/// @param q [n_q][head_dim]
/// @param element (page's bytes, of a key, token within the page, channel) -> double
/// @param given (page of the run, query head, token within the page) -> double, what a score begins with
template <typename Element, typename Given>
void decode_pages_ref(const PageRun& run, int blocks_per_page, int head_dim, int n_q, const float* q, const Element& element,
                      const Given& given, const SoftmaxState& state) {
  std::vector<std::vector<double>> scores(n_q);
  std::vector<double> values;
  for (int page = 0; page < run.n_pages; ++page) {
    for (int64_t t = 0; t < int64_t{blocks_per_page} * kTokenBlock; ++t) {
      if ((run.masks[int64_t{page} * blocks_per_page + t / kTokenBlock] >> t % kTokenBlock & 1) == 0) continue;
      std::vector<double> key(head_dim);
      for (int c = 0; c < head_dim; ++c) {
        key[c] = element(run.pages[page], true, t, c);
        values.push_back(element(run.pages[page], false, t, c));
      }
      for (int h = 0; h < n_q; ++h) {
        double score = given(page, h, t);
        for (int c = 0; c < head_dim; ++c) score += key[c] * q[int64_t{h} * head_dim + c];
        scores[h].push_back(score);
      }
    }
  }
  for (int h = 0; h < n_q; ++h)
    accumulate_softmax_ref(scores[h], values, head_dim, state.max + h, state.sum + h, state.acc + int64_t{h} * head_dim);
}

inline void decode_plain_ref(const PlainDecodeParams& p) {
  const PlainPageLayout& layout = p.layout;
  decode_pages_ref(
      p.run, layout.blocks_per_page, layout.head_dim, p.n_q, p.q,
      [&](const std::byte* page, bool key, int64_t t, int c) {
        if (!key) return plain_element_ref(layout, page + layout.value_row_offset(p.kv_head, t), c);
        const std::byte* const block = page + layout.key_block_offset(p.kv_head, static_cast<int>(t / kTokenBlock));
        return plain_element_ref(layout, block, c * kTokenBlock + t % kTokenBlock);
      },
      [](int, int, int64_t) { return 0.0; }, p.state);
}

}  // namespace rotunda::kernels
