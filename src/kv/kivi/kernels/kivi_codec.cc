#include "kv/kivi/kernels/kivi_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/half.h"
#include "kernels/scratch.h"

namespace rotunda::kv::kivi {

namespace {

float read_half(const std::byte* at, int64_t index) {
  Half half;
  std::memcpy(&half.bits, at + index * 2, 2);
  return to_float(half);
}

const uint32_t* words(const std::byte* at) { return reinterpret_cast<const uint32_t*>(at); }

/// The codes of n elements, n a multiple of what a word holds, as floats.
template <int kBits>
void unpack(const uint32_t* from, int n, float* codes) {
  constexpr int kPerWord = 32 / kBits;
  for (int i = 0; i < n; i += kPerWord)
    for (int j = 0; j < kPerWord; ++j)
      codes[i + j] = static_cast<float>(static_cast<int32_t>(from[i / kPerWord] >> kBits * j & ((1u << kBits) - 1)));
}

void unpack(int bits, const uint32_t* from, int n, float* codes) {
  bits == 2 ? unpack<2>(from, n, codes) : unpack<4>(from, n, codes);
}

/// One group.
/// @param x element i at i * stride   @param codes [kGroup * bits / 32]   @param scale, low where their fp16 bits go
bool quantize(int bits, ZeroPoint zero, const float* x, int64_t stride, uint32_t* codes, std::byte* scale,
              std::byte* low) {
  float least = x[0];
  float most = x[0];
  for (int i = 0; i < kGroup; ++i) {
    if (!std::isfinite(x[i * stride])) return false;
    least = std::min(least, x[i * stride]);
    most = std::max(most, x[i * stride]);
  }
  const auto top = static_cast<float>((1 << bits) - 1);
  const Half scale_bits = to_half((most - least) / top);
  const float s = to_float(scale_bits);
  const Half low_bits = to_half(zero == ZeroPoint::kMinimum || s == 0.0F ? least : std::nearbyint(least / s) * s);
  const float z = to_float(low_bits);
  // Also what is decoded is to be a number of 16 bits, which a window can hold.
  if (!std::isfinite(z) || !std::isfinite(to_float(to_half(s * top + z)))) return false;
  std::fill_n(codes, bits, 0u);
  for (int i = 0; i < kGroup; ++i) {
    const float code = s == 0.0F ? 0.0F : std::clamp(std::nearbyint((x[i * stride] - z) / s), 0.0F, top);
    codes[i * bits / 32] |= static_cast<uint32_t>(code) << i * bits % 32;
  }
  std::memcpy(scale, &scale_bits.bits, 2);
  std::memcpy(low, &low_bits.bits, 2);
  return true;
}

bool any_attended(const uint16_t* masks, int n_blocks) {
  return std::any_of(masks, masks + n_blocks, [](uint16_t mask) { return mask != 0; });
}

/// Scores of one page; tokens that are not attended get -inf.
/// @param folded [n_q][head_dim] for the query times a span's scales   @param codes [32]   @param scores [n_q][page_tokens]
void page_scores(const KiviDecodeParams& p, const std::byte* page, const uint16_t* masks, float* folded, float* codes,
                 float* scores) {
  const KiviPageLayout& l = *p.layout;
  const int64_t n = l.page_tokens();
  const int d = l.head_dim;
  std::fill_n(scores, p.n_q * n, -std::numeric_limits<float>::infinity());
  for (int span = 0; span < l.spans(); ++span) {
    const uint16_t* const span_masks = masks + span * (kGroup / kTokenBlock);
    if (!any_attended(span_masks, kGroup / kTokenBlock)) continue;
    const std::byte* const scale = page + l.key_scale_offset(p.kv_head) + int64_t{span} * d * 2;
    const std::byte* const low = page + l.key_low_offset(p.kv_head) + int64_t{span} * d * 2;
    for (int h = 0; h < p.n_q; ++h) {
      const float* const q = p.q + int64_t{h} * d;
      float base = 0.0F;
      for (int c = 0; c < d; ++c) {
        base += q[c] * read_half(low, c);
        folded[int64_t{h} * d + c] = q[c] * read_half(scale, c);
      }
      std::fill_n(scores + h * n + span * kGroup, kGroup, base);
    }
    const uint32_t* const from = words(page + l.key_codes_offset(p.kv_head)) + int64_t{span} * d * l.bits;
    for (int c = 0; c < d; ++c) {
      unpack(l.bits, from + int64_t{c} * l.bits, kGroup, codes);
      for (int h = 0; h < p.n_q; ++h) {
        const float q = folded[int64_t{h} * d + c];
        float* const to = scores + h * n + span * kGroup;
        for (int t = 0; t < kGroup; ++t) to[t] += q * codes[t];
      }
    }
    for (int t = 0; t < kGroup; ++t) {
      if ((span_masks[t / kTokenBlock] >> t % kTokenBlock & 1) != 0) continue;
      for (int h = 0; h < p.n_q; ++h) scores[h * n + span * kGroup + t] = -std::numeric_limits<float>::infinity();
    }
  }
}

/// Turns scores of one head, at least one of them finite, into weights under the state's new maximum.
void softmax_step(const KiviDecodeParams& p, int h, float* scores) {
  const int64_t n = p.layout->page_tokens();
  const float old_max = p.state.max[h];
  const float new_max = std::max(old_max, *std::max_element(scores, scores + n));
  const float keep = std::exp(old_max - new_max);  // 0 for a state that has seen nothing
  float sum = p.state.sum[h] * keep;
  for (int64_t t = 0; t < n; ++t) {
    scores[t] = std::exp(scores[t] - new_max);
    sum += scores[t];
  }
  float* const acc = p.state.acc + int64_t{h} * p.layout->head_dim;
  for (int c = 0; c < p.layout->head_dim; ++c) acc[c] *= keep;
  p.state.max[h] = new_max;
  p.state.sum[h] = sum;
}

/// @param weights [n_q][page_tokens], 0 where a token is not attended   @param codes [head_dim]
void add_values(const KiviDecodeParams& p, const std::byte* page, const uint16_t* masks, const float* weights,
                float* codes) {
  const KiviPageLayout& l = *p.layout;
  const int d = l.head_dim;
  for (int64_t t = 0; t < l.page_tokens(); ++t) {
    if ((masks[t / kTokenBlock] >> t % kTokenBlock & 1) == 0) continue;
    unpack(l.bits, words(page + l.value_codes_offset(p.kv_head)) + t * l.value_words(), d, codes);
    for (int g = 0; g < l.value_groups(); ++g) {
      const float scale = read_half(page + l.value_scale_offset(p.kv_head), t * l.value_groups() + g);
      const float low = read_half(page + l.value_low_offset(p.kv_head), t * l.value_groups() + g);
      for (int h = 0; h < p.n_q; ++h) {
        const float weight = weights[h * l.page_tokens() + t];
        float* const acc = p.state.acc + int64_t{h} * d + int64_t{g} * kGroup;
        for (int c = 0; c < kGroup; ++c) acc[c] += weight * scale * codes[g * kGroup + c] + weight * low;
      }
    }
  }
}

}  // namespace

bool kivi_store(const KiviStoreParams& p) {
  const KiviPageLayout& l = *p.layout;
  const int64_t first = int64_t{p.span} * kGroup;
  for (int head = 0; head < l.n_kv_heads; ++head) {
    const int64_t column = int64_t{head} * l.head_dim;
    auto* const key_codes = reinterpret_cast<uint32_t*>(p.page + l.key_codes_offset(head));
    auto* const value_codes = reinterpret_cast<uint32_t*>(p.page + l.value_codes_offset(head));
    for (int c = 0; c < l.head_dim; ++c) {
      const int64_t group = int64_t{p.span} * l.head_dim + c;
      if (!quantize(l.bits, p.zero, p.key + column + c, p.row_stride, key_codes + group * l.bits,
                    p.page + l.key_scale_offset(head) + group * 2, p.page + l.key_low_offset(head) + group * 2))
        return false;
    }
    for (int64_t t = 0; t < kGroup; ++t) {
      for (int g = 0; g < l.value_groups(); ++g) {
        const int64_t group = (first + t) * l.value_groups() + g;
        if (!quantize(l.bits, p.zero, p.value + t * p.row_stride + column + int64_t{g} * kGroup, 1,
                      value_codes + group * l.bits, p.page + l.value_scale_offset(head) + group * 2,
                      p.page + l.value_low_offset(head) + group * 2))
          return false;
      }
    }
  }
  return true;
}

void kivi_decode(const KiviDecodeParams& p) {
  const KiviPageLayout& l = *p.layout;
  const int64_t scores_size = p.n_q * l.page_tokens();
  const int64_t folded_size = int64_t{p.n_q} * l.head_dim;
  static thread_local kernels::Scratch scratch;
  float* const scores = scratch.floats(static_cast<size_t>(scores_size + folded_size + std::max(l.head_dim, kGroup)));
  float* const folded = scores + scores_size;
  float* const codes = folded + folded_size;
  for (int i = 0; i < p.run.n_pages; ++i) {
    const uint16_t* const masks = p.run.masks + int64_t{i} * l.blocks_per_page;
    if (!any_attended(masks, l.blocks_per_page)) continue;
    page_scores(p, p.run.pages[i], masks, folded, codes, scores);
    for (int h = 0; h < p.n_q; ++h) softmax_step(p, h, scores + h * l.page_tokens());
    add_values(p, p.run.pages[i], masks, scores, codes);
  }
}

void kivi_load(const KiviLoadParams& p) {
  const KiviPageLayout& l = *p.layout;
  const int d = l.head_dim;
  const int span = p.block * kTokenBlock / kGroup;
  const int words_per_block = kTokenBlock * l.bits / 32;
  const uint32_t* const key = words(p.page + l.key_codes_offset(p.kv_head));
  for (int c = 0; c < d; ++c) {
    const int64_t group = int64_t{span} * d + c;
    float* const to = p.key_out + c * p.key_stride;
    unpack(l.bits, key + group * l.bits + p.block * kTokenBlock % kGroup / kTokenBlock * words_per_block, kTokenBlock,
           to);
    const float scale = read_half(p.page + l.key_scale_offset(p.kv_head), group);
    const float low = read_half(p.page + l.key_low_offset(p.kv_head), group);
    for (int t = 0; t < kTokenBlock; ++t) to[t] = scale * to[t] + low;
  }
  for (int lane = 0; lane < kTokenBlock; ++lane) {
    const int64_t token = int64_t{p.block} * kTokenBlock + lane;
    float* const to = p.value_out + int64_t{lane} * d;
    unpack(l.bits, words(p.page + l.value_codes_offset(p.kv_head)) + token * l.value_words(), d, to);
    for (int c = 0; c < d; ++c) {
      const int64_t group = token * l.value_groups() + c / kGroup;
      to[c] = read_half(p.page + l.value_scale_offset(p.kv_head), group) * to[c] +
              read_half(p.page + l.value_low_offset(p.kv_head), group);
    }
  }
}

}  // namespace rotunda::kv::kivi
