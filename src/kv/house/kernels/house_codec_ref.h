#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/half.h"
#include "kernels/attention/decode_attention_ref.h"
#include "kv/house/kernels/house_codec.h"

// The format in plain words: one scalar at a time, fp32 where the format says so, double elsewhere. Compile with -ffp-contract=off.

namespace rotunda::kv::house {

/// Where the bits of a code lie: `low_bits` bits from `low_shift` on of the little-endian word at `low_word` bytes, and for 3 bits
/// one more at bit `high_shift` of the word at `high_word`.
struct CodePlace {
  int64_t low_word = 0;
  int low_bits = 0;
  int low_shift = 0;
  int64_t high_word = -1;  ///< -1: none
  int high_shift = 0;
};

/// @param token within the page
inline CodePlace key_place(const HousePageLayout& l, int head, int64_t token, int channel) {
  const int64_t base = l.key_block_offset(head, static_cast<int>(token / kTokenBlock));
  const auto word = [&](int w) { return base + (int64_t{w} * kTokenBlock + token % kTokenBlock) * 4; };
  if (l.key_bits == 4) return {word(channel / 8), 4, 8 * (channel % 4) + 4 * (channel % 8 / 4), -1, 0};
  CodePlace at{word(channel / 16), 2, 8 * (channel % 4) + 2 * (channel % 16 / 4), -1, 0};
  if (l.key_bits == 3) {
    at.high_word = word(l.head_dim / 16 + channel / 32);
    at.high_shift = 8 * (channel % 4) + channel % 32 / 4;
  }
  return at;
}

/// @param token within the page
inline CodePlace value_place(const HousePageLayout& l, int head, int64_t token, int channel) {
  const int block = static_cast<int>(token / kTokenBlock);
  const int t = static_cast<int>(token % kTokenBlock);
  const int64_t base = l.value_block_offset(head, block) + int64_t{channel} * 4;
  if (l.value_bits == 4) return {base + int64_t{t / 8} * l.head_dim * 4, 4, 8 * (t % 4) + 4 * (t % 8 / 4), -1, 0};
  CodePlace at{base, 2, 8 * (t % 4) + 2 * (t / 4), -1, 0};
  if (l.value_bits == 3) {
    at.high_word = l.value_high_offset(head, block) + int64_t{channel} * 4;
    at.high_shift = 8 * (t % 4) + 4 * (block % 2) + t / 4;
  }
  return at;
}

inline uint32_t read_word(const std::byte* at) {
  uint32_t word;
  std::memcpy(&word, at, 4);
  return word;
}

inline void write_bits(std::byte* at, int shift, uint32_t mask, uint32_t bits) {
  const uint32_t word = (read_word(at) & ~(mask << shift)) | (bits & mask) << shift;
  std::memcpy(at, &word, 4);
}

inline uint32_t read_code(const std::byte* page, const CodePlace& at) {
  uint32_t code = read_word(page + at.low_word) >> at.low_shift & ((1u << at.low_bits) - 1);
  if (at.high_word >= 0) code |= (read_word(page + at.high_word) >> at.high_shift & 1u) << 2;
  return code;
}

inline void write_code(std::byte* page, const CodePlace& at, uint32_t code) {
  write_bits(page + at.low_word, at.low_shift, (1u << at.low_bits) - 1, code);
  if (at.high_word >= 0) write_bits(page + at.high_word, at.high_shift, 1, code >> 2);
}

inline double read_scale(const HousePageLayout& l, const std::byte* page, bool key, int head, int64_t token) {
  uint16_t bits;
  std::memcpy(&bits, page + (key ? l.key_scale_offset(head) : l.value_scale_offset(head)) + token * 2, 2);
  return to_float(Half{bits});
}

/// The codes of one token and head and what they stand for.
struct TokenCodes {
  std::vector<uint32_t> q;
  uint16_t scale_bits = 0;  ///< fp16
};

/// Code of y for the inverse step 0.5 / t. A NaN, which only an overflowing feedback can make, gets code 0.
inline uint32_t code_ref(int bits, float y, float inverse) {
  const float top = static_cast<float>((1 << bits) - 1);
  const float product = y * inverse;
  const float q = std::floor(product + static_cast<float>(1 << (bits - 1)));
  return q > 0.0F ? static_cast<uint32_t>(std::min(q, top)) : 0;
}

inline float code_value(int bits, uint32_t q) {
  return static_cast<float>(2 * static_cast<int>(q) - ((1 << bits) - 1));
}

/// sum y c and sum c^2, channels in ascending order.
inline void code_sums(int bits, const float* y, const std::vector<uint32_t>& q, float& yc, float& cc) {
  yc = 0;
  cc = 0;
  for (size_t i = 0; i < q.size(); ++i) {
    const float c = code_value(bits, q[i]);
    const float product = y[i] * c;
    yc += product;
    cc += c * c;
  }
}

/// Quantizes one token of one head by the four steps of HouseStoreParams.
/// @param y [d]  @param feedback [d][d] or null  @return false where it is refused
inline bool quantize_ref(int bits, ScaleRule rule, const float* y, int d, const float* feedback, TokenCodes& out) {
  const auto fits = [](float scale) { return (to_half(scale).bits & 0x7fffu) < 0x7c00u; };
  float e = 0;
  for (int i = 0; i < d; ++i) {
    const float square = y[i] * y[i];
    e += square;
  }
  if (!std::isfinite(e)) return false;
  const float mean = e / static_cast<float>(d);
  if (mean == 0.0F) {
    out.q.assign(d, 1u << (bits - 1));
    out.scale_bits = 0;
    return true;
  }
  const float r = std::sqrt(mean);
  const StepSearch search = step_search(bits);
  float best = -1.0F;
  float yc = 0;
  float cc = 1;
  float inverse = 0;
  for (int k = 0; k < search.count; ++k) {
    const float t = step_candidate(search, k) * r;
    const float inv = 0.5F / t;
    std::vector<uint32_t> q(d);
    for (int i = 0; i < d; ++i) q[i] = code_ref(bits, y[i], inv);
    float candidate_yc;
    float candidate_cc;
    code_sums(bits, y, q, candidate_yc, candidate_cc);
    const float square = candidate_yc * candidate_yc;
    const float gain = square / candidate_cc;
    if (gain > best) {
      best = gain;
      yc = candidate_yc;
      cc = candidate_cc;
      inverse = inv;
      out.q = q;
    }
  }
  const float s = yc / cc;
  if (!fits(s)) return false;
  if (feedback != nullptr) {
    std::vector<uint32_t> q;
    float least = std::numeric_limits<float>::infinity();
    for (const float factor : kFeedbackTries) {
      const float inv = inverse * factor;
      std::vector<uint32_t> tried(d);
      for (int i = 0; i < d; ++i) tried[i] = code_ref(bits, y[i], inv);
      float tried_yc;
      float tried_cc;
      code_sums(bits, y, tried, tried_yc, tried_cc);
      const float tried_s = tried_yc / tried_cc;
      std::vector<float> x(y, y + d);
      float cost = 0;
      for (int i = 0; i < d; ++i) {
        tried[i] = code_ref(bits, x[i], inv);
        const float decoded = tried_s * code_value(bits, tried[i]);
        const float f = x[i] - decoded;
        const float square = f * f;
        const float seen = square * feedback[static_cast<size_t>(i) * d + i];
        cost += seen;
        for (int j = i + 1; j < d; ++j) {
          x[j] = std::fma(-f, feedback[static_cast<size_t>(i) * d + j], x[j]);
        }
      }
      if (q.empty() || cost < least) {
        least = cost;
        q = tried;
      }
    }
    float fed_yc;
    float fed_cc;
    code_sums(bits, y, q, fed_yc, fed_cc);
    if (fed_yc > 0.0F) {
      yc = fed_yc;
      cc = fed_cc;
      out.q = q;
    }
  }
  const float scale = rule == ScaleRule::kUnbiased ? e / yc : yc / cc;
  if (!fits(scale)) return false;
  out.scale_bits = std::max<uint16_t>(to_half(scale).bits, 1);
  return true;
}

inline bool house_store_ref(const HouseStoreParams& p) {
  const HousePageLayout& l = p.layer->layout;
  const int d = l.head_dim;
  for (int i = 0; i < p.n_tokens; ++i) {
    const int64_t token = int64_t{p.block} * kTokenBlock + p.first + i;
    for (int head = 0; head < l.n_kv_heads; ++head) {
      for (const bool key : {true, false}) {
        const float* const y = (key ? p.key : p.value) + i * p.row_stride + int64_t{head} * d;
        const float* const feedback =
            key && p.layer->feedback != nullptr ? p.layer->feedback + int64_t{head} * d * d : nullptr;
        TokenCodes codes;
        if (!quantize_ref(key ? l.key_bits : l.value_bits, p.layer->scale, y, d, feedback, codes)) return false;
        if (key) {  // bits of no channel are 0
          for (int w = 0; w < l.key_words(); ++w) {
            std::memset(
                p.page + l.key_block_offset(head, p.block) + (int64_t{w} * kTokenBlock + token % kTokenBlock) * 4, 0,
                4);
          }
        }
        for (int c = 0; c < d; ++c)
          write_code(p.page, key ? key_place(l, head, token, c) : value_place(l, head, token, c), codes.q[c]);
        std::memcpy(p.page + (key ? l.key_scale_offset(head) : l.value_scale_offset(head)) + token * 2,
                    &codes.scale_bits, 2);
      }
    }
  }
  return true;
}

/// Element of the stored (rotated) key or value.
inline double element_ref(const HousePageLayout& l, const std::byte* page, bool key, int head, int64_t token,
                          int channel) {
  const uint32_t q = read_code(page, key ? key_place(l, head, token, channel) : value_place(l, head, token, channel));
  return read_scale(l, page, key, head, token) * code_value(key ? l.key_bits : l.value_bits, q);
}

/// What the shift adds to the score of query head `h` and a token of page `page` of the run.
inline double shift_score_ref(const ShiftTerm& s, int half, int page, int h, int64_t token) {
  double score = 0;
  for (int i = 0; i < s.n_pairs; ++i) {
    const int pair = s.pairs[i];
    const int64_t at = (token / kTokenBlock * half + pair) * kTokenBlock + token % kTokenBlock;
    const double page_cos = s.page_cos[int64_t{page} * half + pair];
    const double page_sin = s.page_sin[int64_t{page} * half + pair];
    const double token_cos = s.token_cos[at];
    const double token_sin = s.token_sin[at];
    score += s.a[int64_t{h} * s.n_pairs + i] * (page_cos * token_cos - page_sin * token_sin);
    score += s.b[int64_t{h} * s.n_pairs + i] * (page_sin * token_cos + page_cos * token_sin);
  }
  return score;
}

inline void house_decode_ref(const HouseDecodeParams& p) {
  const HousePageLayout& l = p.layer->layout;
  kernels::decode_pages_ref(
      p.run, l.blocks_per_page, l.head_dim, p.n_q, p.q,
      [&](const std::byte* page, bool key, int64_t token, int channel) {
        return element_ref(l, page, key, p.kv_head, token, channel);
      },
      [&](int page, int h, int64_t token) { return shift_score_ref(p.shift, l.head_dim / 2, page, h, token); }, p.state);
}

inline void house_load_ref(const HouseLoadParams& p) {
  const HousePageLayout& l = p.layer->layout;
  const int d = l.head_dim;
  const int half = d / 2;
  std::vector<double> dense(static_cast<size_t>(d) * d);
  kernels::hadamard_dense(p.layer->hadamard, dense.data());
  const float* const mu = p.layer->shift == nullptr ? nullptr : p.layer->shift + int64_t{p.kv_head} * d;
  for (int lane = 0; lane < kTokenBlock; ++lane) {
    const int64_t token = int64_t{p.block} * kTokenBlock + lane;
    std::vector<double> key(d);
    for (int from = 0; from < d; ++from) {
      const double y = element_ref(l, p.page, true, p.kv_head, token, from);
      for (int to = 0; to < d; ++to) key[to] += y * dense[static_cast<size_t>(to) * d + from];
    }
    if (mu != nullptr) {
      for (int i = 0; i < half; ++i) {
        const double cos = p.cos[i * kTokenBlock + lane];
        const double sin = p.sin[i * kTokenBlock + lane];
        key[i] += mu[i] * cos - mu[half + i] * sin;
        key[half + i] += mu[half + i] * cos + mu[i] * sin;
      }
    }
    for (int c = 0; c < d; ++c) {
      p.key_out[c * p.out_stride + lane] = static_cast<float>(key[c]);
      p.value_out[int64_t{lane} * d + c] = static_cast<float>(element_ref(l, p.page, false, p.kv_head, token, c));
    }
  }
}

}  // namespace rotunda::kv::house
