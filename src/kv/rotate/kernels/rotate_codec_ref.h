#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/half.h"
#include "kernels/attention/decode_attention_ref.h"
#include "kv/rotate/kernels/rotate_codec.h"
#include "kv/rotate/kernels/rotate_place.h"

// The format in plain words: one scalar at a time, fp32 where the format says so, double elsewhere.

namespace rotunda::kv::rotate {

inline uint32_t read_code(const std::byte* page, const CodePlace& at) {
  uint32_t word;
  std::memcpy(&word, page + at.low_word, 4);
  uint32_t code = word >> at.low_shift & ((1u << at.low_bits) - 1);
  if (at.high_word >= 0) {
    const auto byte = static_cast<uint32_t>(page[at.high_word + at.high_shift / 8]);
    code |= (byte >> at.high_shift % 8 & 1u) << 2;
  }
  return code;
}

inline void write_code(std::byte* page, const CodePlace& at, uint32_t code) {
  uint32_t word;
  std::memcpy(&word, page + at.low_word, 4);
  const uint32_t mask = ((1u << at.low_bits) - 1) << at.low_shift;
  word = (word & ~mask) | (code << at.low_shift & mask);
  std::memcpy(page + at.low_word, &word, 4);
  if (at.high_word >= 0) {
    std::byte& byte = page[at.high_word + at.high_shift / 8];
    const std::byte bit = std::byte{1} << at.high_shift % 8;
    byte = (byte & ~bit) | ((code & 4u) != 0 ? bit : std::byte{0});
  }
}

/// Scale and zero point of one token and group.
struct GroupScale {
  uint16_t scale_bits = 0;  ///< fp16 s
  uint16_t minimum_bits = 0;  ///< kMinimum: fp16 lo
  int zero = 0;               ///< kCode: z
  bool constant = false;
};

/// The quantizer's scale. @return false if it cannot be held in fp16
inline bool group_scale_ref(const RotatePageLayout& l, float clip, const std::vector<float>& x, GroupScale& out) {
  for (const float v : x) {
    if (!std::isfinite(v)) return false;
  }
  const float top = *std::max_element(x.begin(), x.end());
  const float bottom = *std::min_element(x.begin(), x.end());
  const int max_code = (1 << l.bits) - 1;
  const auto finite = [](uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; };
  out = {};
  if (top == bottom) {
    out.constant = true;
    const uint16_t bits = to_half(top).bits;
    (l.zero == ZeroPoint::kCode ? out.scale_bits : out.minimum_bits) = bits;
    return finite(bits);
  }
  const float hi = clip * top;
  const float lo = clip * bottom;
  // A range too narrow for fp16 takes the smallest scale there is.
  out.scale_bits = std::max<uint16_t>(to_half((hi - lo) / static_cast<float>(max_code)).bits, 1);
  if (!finite(out.scale_bits)) return false;
  if (l.zero == ZeroPoint::kMinimum) {
    out.minimum_bits = to_half(lo).bits;
    return finite(out.minimum_bits);
  }
  const auto zero_of = [&] { return std::nearbyint(-lo / to_float(Half{out.scale_bits})); };
  if (std::fabs(zero_of()) > 127.0F) {
    out.scale_bits = std::max(out.scale_bits, to_half(std::fabs(lo) / 127.0F).bits);
    if (finite(out.scale_bits) && std::fabs(zero_of()) > 127.0F) ++out.scale_bits;
    if (!finite(out.scale_bits)) return false;
  }
  out.zero = static_cast<int>(zero_of());
  return true;
}

inline uint32_t quantize_ref(const RotatePageLayout& l, const GroupScale& g, float x) {
  if (g.constant) return l.zero == ZeroPoint::kCode ? 1 : 0;
  const float s = to_float(Half{g.scale_bits});
  const float max_code = static_cast<float>((1 << l.bits) - 1);
  const float q = l.zero == ZeroPoint::kCode ? std::nearbyint(x / s) + static_cast<float>(g.zero)
                                             : std::nearbyint((x - to_float(Half{g.minimum_bits})) / s);
  return static_cast<uint32_t>(std::clamp(q, 0.0F, max_code));
}

inline bool rotate_store_ref(const RotateStoreParams& p) {
  const RotateLayer& layer = *p.layer;
  const RotatePageLayout& l = layer.layout;
  const int channels = l.kv_channels();
  for (int i = 0; i < p.n_tokens; ++i) {
    const int64_t token = int64_t{p.block} * kTokenBlock + p.first + i;
    // Bits of no channel (3 bits, an odd number of 16 channels) are 0.
    for (int group = 0; group < l.n_rotation_groups(); ++group) {
      for (int w = 0; w < l.key_words(); ++w) {
        std::memset(p.page + (((int64_t{group} * l.blocks_per_page + p.block) * l.key_words() + w) * kTokenBlock + token % kTokenBlock) * 4, 0, 4);
      }
    }
    for (const bool keys : {true, false}) {
      const float* const x = (keys ? p.key : p.value) + i * p.row_stride;
      std::vector<std::vector<float>> members(l.n_quant_groups());
      const auto group_of = [&](int c) { return keys ? layer.key_group[c] : c / l.group_size; };
      for (int c = 0; c < channels; ++c) members[group_of(c)].push_back(x[c]);
      std::vector<GroupScale> scales(members.size());
      for (size_t g = 0; g < members.size(); ++g) {
        if (!group_scale_ref(l, keys ? layer.key_clip : layer.value_clip, members[g], scales[g])) return false;
        const int group = static_cast<int>(g);
        std::memcpy(p.page + meta_offset(l, keys ? l.key_scale_offset() : l.value_scale_offset(), 2, group, token),
                    &scales[g].scale_bits, 2);
        std::byte* const zero = p.page + meta_offset(l, keys ? l.key_zero_offset() : l.value_zero_offset(), l.zero_bytes(), group, token);
        if (l.zero == ZeroPoint::kCode) {
          const auto z = static_cast<int8_t>(scales[g].zero);
          std::memcpy(zero, &z, 1);
        } else {
          std::memcpy(zero, &scales[g].minimum_bits, 2);
        }
      }
      for (int c = 0; c < channels; ++c) {
        const CodePlace at = keys ? key_place(l, c / l.group_channels(), token, c % l.group_channels())
                                  : value_place(l, c / l.head_dim, token, c % l.head_dim);
        write_code(p.page, at, quantize_ref(l, scales[group_of(c)], x[c]));
      }
    }
  }
  return true;
}

inline double dequantize_ref(const RotatePageLayout& l, const std::byte* page, bool key, int group, int64_t token, uint32_t code) {
  uint16_t scale;
  std::memcpy(&scale, page + meta_offset(l, key ? l.key_scale_offset() : l.value_scale_offset(), 2, group, token), 2);
  const std::byte* const zero = page + meta_offset(l, key ? l.key_zero_offset() : l.value_zero_offset(), l.zero_bytes(), group, token);
  const double s = to_float(Half{scale});
  if (l.zero == ZeroPoint::kCode) {
    int8_t z;
    std::memcpy(&z, zero, 1);
    return s * (static_cast<double>(code) - z);
  }
  uint16_t lo;
  std::memcpy(&lo, zero, 2);
  return s * static_cast<double>(code) + to_float(Half{lo});
}

/// The keys of one token and rotation group, rotated back, before RoPE: [group_channels]. `dense` is hadamard_dense of the layer.
inline std::vector<double> token_keys_ref(const RotateLayer& layer, const std::vector<double>& dense, const std::byte* page, int group,
                                          int64_t token) {
  const RotatePageLayout& l = layer.layout;
  const int n = l.group_channels();
  std::vector<double> rotated(n);
  std::vector<double> key(n);
  for (int c = 0; c < n; ++c) {
    rotated[c] = dequantize_ref(l, page, true, layer.key_group[group * n + c], token, read_code(page, key_place(l, group, token, c)));
  }
  for (int to = 0; to < n; ++to) {
    for (int from = 0; from < n; ++from) key[to] += rotated[from] * dense[static_cast<size_t>(to) * n + from];
  }
  return key;
}

inline std::vector<double> dense_ref(const RotateLayer& layer) {
  std::vector<double> dense(static_cast<size_t>(layer.key_hadamard.n) * layer.key_hadamard.n);
  kernels::hadamard_dense(layer.key_hadamard, dense.data());
  return dense;
}

/// RoPE of the pair (a, b) by an angle.
inline void rope_ref(double cos, double sin, double& a, double& b) {
  const double first = a * cos - b * sin;
  b = b * cos + a * sin;
  a = first;
}

inline void rotate_decode_ref(const RotateDecodeParams& p) {
  const RotateLayer& layer = *p.layer;
  const RotatePageLayout& l = layer.layout;
  const int d = l.head_dim;
  const int half = d / 2;
  const std::vector<double> dense = dense_ref(layer);
  const int n_q = l.heads_per_group * p.n_q_per_kv;
  std::vector<std::vector<double>> scores(n_q);
  std::vector<std::vector<double>> values(l.heads_per_group);
  for (int page = 0; page < p.run.n_pages; ++page) {
    for (int64_t t = 0; t < l.page_tokens(); ++t) {
      const int64_t block = t / kTokenBlock;
      const int64_t lane = t % kTokenBlock;
      if ((p.run.masks[page * l.blocks_per_page + block] >> lane & 1) == 0) continue;
      std::vector<double> key = token_keys_ref(layer, dense, p.run.pages[page], p.rotation_group, t);
      for (int h = 0; h < l.heads_per_group; ++h) {
        for (int i = 0; i < half; ++i) {
          double& a = key[h * d + i];
          double& b = key[h * d + half + i];
          const int64_t at = (block * half + i) * kTokenBlock + lane;
          rope_ref(p.token_cos[at], p.token_sin[at], a, b);
          rope_ref(p.page_cos[page * half + i], p.page_sin[page * half + i], a, b);
        }
        for (int q = h * p.n_q_per_kv; q < (h + 1) * p.n_q_per_kv; ++q) {
          double score = 0;
          for (int c = 0; c < d; ++c) score += key[h * d + c] * static_cast<double>(p.q[q * d + c]);
          scores[q].push_back(score);
        }
        const int head = p.rotation_group * l.heads_per_group + h;
        for (int c = 0; c < d; ++c) {
          values[h].push_back(dequantize_ref(l, p.run.pages[page], false, (head * d + c) / l.group_size, t,
                                             read_code(p.run.pages[page], value_place(l, head, t, c))));
        }
      }
    }
  }
  for (int q = 0; q < n_q; ++q) {
    kernels::accumulate_softmax_ref(scores[q], values[q / p.n_q_per_kv], d, p.state.max + q, p.state.sum + q, p.state.acc + int64_t{q} * d);
  }
}

inline void rotate_load_ref(const RotateLoadParams& p) {
  const RotateLayer& layer = *p.layer;
  const RotatePageLayout& l = layer.layout;
  const int d = l.head_dim;
  const int half = d / 2;
  const std::vector<double> dense = dense_ref(layer);
  for (int lane = 0; lane < kTokenBlock; ++lane) {
    const int64_t token = int64_t{p.block} * kTokenBlock + lane;
    std::vector<double> key = token_keys_ref(layer, dense, p.page, p.rotation_group, token);
    for (int h = 0; h < l.heads_per_group; ++h) {
      for (int i = 0; i < half; ++i) {
        rope_ref(p.cos[i * kTokenBlock + lane], p.sin[i * kTokenBlock + lane], key[h * d + i], key[h * d + half + i]);
      }
      const int head = p.rotation_group * l.heads_per_group + h;
      for (int c = 0; c < d; ++c) {
        p.key_out[(h * d + c) * p.out_stride + lane] = static_cast<float>(key[h * d + c]);
        p.value_out[h * p.value_head_stride + int64_t{lane} * d + c] = static_cast<float>(dequantize_ref(
            l, p.page, false, (head * d + c) / l.group_size, token, read_code(p.page, value_place(l, head, token, c))));
      }
    }
  }
}

}  // namespace rotunda::kv::rotate
