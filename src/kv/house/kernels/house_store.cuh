#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/ptx.cuh"
#include "kv/house/kernels/house_store_params.h"

namespace rotunda::kv::house {

/// A head's feedback in shared memory, for all warps of a block: the columns of 16 channels together ("panels"), each row 16 floats, rows
/// that lie below the diagonal left out.
class FeedbackPanels {
 public:
  static constexpr int kChannels = 16;

  /// Floats of the panels in front of panel `b`; for b = head_dim / 16 of all.
  static __host__ __device__ constexpr int floats_before(int b) { return kChannels * kChannels * b * (b + 1) / 2; }

  /// Asks for the bytes; they are there after ptx::wait_copies and a barrier. @param feedback [head_dim][head_dim], 16-byte aligned
  static __device__ void copy_async(float* panels, const float* feedback, int head_dim, int n_threads) {
    for (int b = 0; b < head_dim / kChannels; ++b) {
      for (int i = static_cast<int>(threadIdx.x); i < 4 * kChannels * (b + 1); i += n_threads)
        kernels::ptx::copy_16_async(panels + floats_before(b) + 4 * i, feedback + int64_t{i / 4} * head_dim + b * kChannels + i % 4 * 4);
    }
    kernels::ptx::commit_copies();
  }
};

/// Packs the keys, or the values, of one kv head in the order and with the roundings of house_codec.h, so that the bytes are those of every
/// other machine; nothing here may be fused but what is exact or says so (hence the intrinsics, which the compiler leaves alone).
///
/// A lane goes through the channels of its token one after the other. Where there are many tokens (kTokens = 32) a warp takes a pair of
/// blocks, a token a lane, and a lane makes kTries tries of feedback at once, which share what is read of the triangle. Where there are few
/// (kTokens = 4) a warp takes a token of each of four pairs, and the eight lanes of a token share the candidates and the tries among them.
///
/// Feedback is reckoned 16 channels at a time: what the errors of the channels before them add up to comes first (16 sums a try, which hide
/// each other's latency), then the 16 among themselves.
template <int kTokens, int kTries, bool kFeedback>
class HouseStoreWarp {
 public:
  static constexpr int kWarp = 32;
  static constexpr int kLanes = kWarp / kTokens;  ///< of a token
  static constexpr int kPairs = kLanes == 1 ? 1 : kTokens;  ///< that a warp takes at once
  static constexpr int kPanel = FeedbackPanels::kChannels;
  static constexpr int kRowsAtOnce = 4;  ///< of the triangle, to hide the latency of reading them
  static constexpr int kAllTries = static_cast<int>(sizeof(kFeedbackTries) / sizeof(float));
  static_assert(kLanes == 1 || (kTries == 1 && kLanes > kAllTries));

  // Shared memory of a warp: rows of one channel (of codes: eight), one more than lanes or tokens long against bank conflicts.
  static constexpr int kRow = kWarp + 1;
  static constexpr int kTokenRow = kTokens + 1;

  /// Errors of every try, elements, codes of every try and of the best. The errors of the last panel are of no use to anybody; elements,
  /// where a token is a lane, lie in the room of the last try's errors, which are written behind where they are read.
  static __host__ __device__ constexpr int64_t shared_bytes(int head_dim) {
    const int errors = kFeedback ? (kTries * (head_dim - kPanel) + kPanel) * kRow : 0;
    const int elements = kFeedback && kLanes == 1 ? 0 : head_dim * kTokenRow;
    const int codes = head_dim / 8 * ((kFeedback ? kTries * kRow : 0) + kTokenRow);
    return int64_t{errors + elements + codes} * 4;
  }

  /// @param panels of the head's feedback, unread without
  __device__ HouseStoreWarp(const HouseStoreBatch& params, int layer, int head, bool is_key, const float* panels, std::byte* shared)
      : p_(params),
        d_(params.layout.head_dim),
        layer_(layer),
        head_(head),
        is_key_(is_key),
        bits_(is_key ? params.layout.key_bits : params.layout.value_bits),
        top_(static_cast<float>((1 << bits_) - 1)),
        middle_(static_cast<float>(1 << (bits_ - 1))),
        lane_(static_cast<int>(threadIdx.x % kWarp)),
        token_(lane_ / kLanes),
        share_(lane_ % kLanes),
        panels_(panels),
        error_(reinterpret_cast<float*>(shared)),
        y_(error_ + (!kFeedback ? 0 : kTries * (d_ - kPanel) + (kLanes == 1 ? kPanel - d_ : kPanel)) * kRow),
        tried_(reinterpret_cast<uint32_t*>(y_ + d_ * kTokenRow)),
        best_(tried_ + (kFeedback ? kTries * (d_ / 8) * kRow : 0)) {}

  /// @param item of the pairs, kPairs each
  __device__ void run(int item) {
    first_pair_ = item * kPairs;
    if constexpr (kLanes == 1) {
      if (p_.pairs[first_pair_].tokens != 0) store();
    } else {
      int most = 0;
      for (int t = 0; t < kTokens; ++t) most = max(most, first_pair_ + t < p_.n_pairs ? __popc(p_.pairs[first_pair_ + t].tokens) : 0);
      for (round_ = 0; round_ < most; ++round_) store();
    }
  }

 private:
  /// Where a token of the warp comes from and goes to.
  struct Place {
    bool there;
    int slot;  // within the pair
    StorePair pair;
    int64_t row;
  };
  __device__ Place place(int token) const {
    const int at = first_pair_ + (kLanes == 1 ? 0 : token);
    if (at >= p_.n_pairs) return {false, 0, {}, 0};
    const StorePair pair = p_.pairs[at];
    const int first = __ffs(static_cast<int>(pair.tokens)) - 1;
    if constexpr (kLanes == 1) return {(pair.tokens >> token & 1U) != 0, token, pair, int64_t{pair.row} + token - first};
    return {round_ < __popc(pair.tokens), first + round_, pair, int64_t{pair.row} + round_};
  }

  __device__ void store() {
    load();
    const bool mine = place(token_).there;
    uint16_t scale = 0;
    if (!quantize(&scale) && mine) p_.refused[layer_] = 1;
    __syncwarp();
    write(mine, scale);
    __syncwarp();
  }

  // Elements: [channel][token].
  __device__ float y(int c) const { return y_[c * kTokenRow + token_]; }
  __device__ float& error(int i, int c) const { return error_[(i * (d_ - kPanel) + c) * kRow + lane_]; }
  // Codes, eight a word: of this lane's try i, of the best try of a token.
  __device__ uint32_t& tried(int i, int w) const { return tried_[(i * (d_ / 8) + w) * kRow + lane_]; }
  __device__ uint32_t& best(int w, int token) const { return best_[w * kTokenRow + token]; }
  __device__ uint32_t best_code(int c, int token) const { return best(c / 8, token) >> (4 * (c % 8)) & 15U; }

  /// Rows come in whole, as many loads under way as there are tokens; a token that is not there is 0. Again before each try but the first,
  /// where a token is a lane: errors have taken the elements' place.
  __device__ void load() {
    __syncwarp();
    const float* const rows = (is_key_ ? p_.key : p_.value) + layer_ * p_.layer_stride + int64_t{head_} * d_;
    uint32_t there = 0;
    const float* from[kPairs];  // of token 0 of the pair, or of every token
#pragma unroll
    for (int t = 0; t < kPairs; ++t) {
      const Place at = place(t);
      from[t] = rows + at.row * p_.row_stride;
      there |= static_cast<uint32_t>(at.there) << t;
    }
    if constexpr (kLanes == 1) there = p_.pairs[first_pair_].tokens;
    for (int c = lane_; c < d_; c += kWarp) {
      float x[kTokens];
      const float* at = from[0] + c;
#pragma unroll
      for (int t = 0; t < kTokens; ++t, at += p_.row_stride) {
        if constexpr (kLanes > 1) at = from[t] + c;
        x[t] = (there >> t & 1U) == 0 ? 0.0F : *at;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) y_[c * kTokenRow + t] = x[t];
    }
    __syncwarp();
  }

  // ---- one token ---------------------------------------------------------------------------------------------------

  /// The code of x in the low bits of a float between 2^23 and 2^24; NaN gives 0. Cut off at whole numbers first, then rounded down by an
  /// addition: the same as floor(), without the slow units that it and conversions to integers run on.
  __device__ __forceinline__ float code(float x, float inverse) const {
    return __fadd_rd(fminf(fmaxf(__fadd_rn(__fmul_rn(x, inverse), middle_), 0.0F), top_), kWhole);
  }
  static constexpr float kWhole = 8388608.0F;
  static __device__ __forceinline__ uint32_t bits_of(float code) { return __float_as_uint(code) & 15U; }
  // Exact, both.
  __device__ __forceinline__ float value_of(float code) const { return __fmaf_rn(2.0F, __fsub_rn(code, kWhole), -top_); }
  __device__ __forceinline__ float value_of(uint32_t bits) const {
    return static_cast<float>(2 * static_cast<int>(bits) - ((1 << bits_) - 1));
  }

  static __device__ __forceinline__ void add_sums(float x, float c, float& yc, float& cc) {
    yc = __fadd_rn(yc, __fmul_rn(x, c));
    cc = __fadd_rn(cc, c * c);
  }

  static __device__ bool fits(float scale) { return (__half_as_ushort(__float2half_rn(scale)) & 0x7fffU) < 0x7c00U; }

  /// What lane `share` of this lane's token holds.
  template <typename T>
  __device__ T of_share(T x, int share) const {
    return __shfl_sync(0xffffffffU, x, token_ * kLanes + share);
  }

  /// Leaves the codes in `best_`. All lanes come along, also those whose token is not there (on zeros), for they exchange what they find.
  /// @return false where the token is refused
  __device__ __forceinline__ bool quantize(uint16_t* scale) {
    float e = 0;
    for (int c = 0; c < d_; ++c) e = __fadd_rn(e, __fmul_rn(y(c), y(c)));
    const float mean = __fdiv_rn(e, static_cast<float>(d_));
    float yc = 0;
    float cc = 1;
    const float inverse = search(__fsqrt_rn(mean), yc, cc);
    bool taken = isfinite(e) && (mean == 0.0F || fits(__fdiv_rn(yc, cc)));
    bool fed = false;
    if constexpr (kFeedback) {
      choose_try(inverse);
      if constexpr (kLanes == 1) load();
      float fed_yc = 0;
      float fed_cc = 0;
      for (int c = 0; c < d_; ++c) add_sums(y(c), value_of(best_code(c, token_)), fed_yc, fed_cc);
      __syncwarp();
      if (mean != 0.0F && fed_yc > 0.0F) {
        yc = fed_yc;
        cc = fed_cc;
        fed = true;
      }
    }
    if (!fed) {
      const uint32_t plus_one = (1U << (bits_ - 1)) * 0x11111111U;
      for (int w = share_; w < d_ / 8; w += kLanes) {
        uint32_t word = 0;
        for (int i = 0; i < 8; ++i) word |= bits_of(code(y(8 * w + i), inverse)) << (4 * i);
        best(w, token_) = mean == 0.0F ? plus_one : word;
      }
    }
    if (mean == 0.0F) return taken;
    const float result = p_.scale == ScaleRule::kUnbiased ? __fdiv_rn(e, yc) : __fdiv_rn(yc, cc);
    taken = taken && fits(result);
    const uint16_t half = __half_as_ushort(__float2half_rn(result));
    // A refused token gets the scale 0: what masks leave out must be finite all the same.
    *scale = !taken ? 0 : half == 0 ? 1 : half;
    return taken;
  }

  /// The inverse step of the best candidate, and its sums.
  __device__ __forceinline__ float search(float r, float& best_yc, float& best_cc) const {
    const StepSearch steps = step_search(bits_);
    constexpr int kMost = 6;
    constexpr int kMine = kLanes == 1 ? kMost : 1;  // candidates of a lane; its first is number share_
    float inverse[kMine];
    float yc[kMine];
    float cc[kMine];
#pragma unroll
    for (int k = 0; k < kMine; ++k) {
      const float part = __fdiv_rn(__fsub_rn(steps.last, steps.first), static_cast<float>(steps.count - 1));
      const float candidate = __fadd_rn(steps.first, __fmul_rn(static_cast<float>(share_ + k), part));
      inverse[k] = __fdiv_rn(0.5F, __fmul_rn(candidate, r));
      yc[k] = 0;
      cc[k] = 0;
    }
    for (int c = 0; c < d_; ++c) {
      const float x = y(c);
#pragma unroll
      for (int k = 0; k < kMine; ++k) add_sums(x, value_of(code(x, inverse[k])), yc[k], cc[k]);
    }
    const auto of_candidate = [&](const float(&x)[kMine], int k) {
      if constexpr (kLanes == 1) return x[k];
      else return of_share(x[0], k);
    };
    float best = -1.0F;
    float chosen = 0;
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      const float of_yc = of_candidate(yc, k);
      const float of_cc = of_candidate(cc, k);
      const float of_inverse = of_candidate(inverse, k);
      const float gain = __fdiv_rn(__fmul_rn(of_yc, of_yc), of_cc);
      if (k >= steps.count || !(gain > best)) continue;
      best = gain;
      best_yc = of_yc;
      best_cc = of_cc;
      chosen = of_inverse;
    }
    return chosen;
  }

  // ---- feedback ----------------------------------------------------------------------------------------------------

  static __device__ float feedback_factor(int i) {
    constexpr float kFactors[] = {1.0F, 1.07F, 0.93F, 1.15F, 0.87F, 1.25F, 0.81F};
    static_assert(sizeof(kFactors) == sizeof(kFeedbackTries) && kFactors[1] == kFeedbackTries[1] && kFactors[6] == kFeedbackTries[6]);
    float factor = kFactors[0];
#pragma unroll
    for (int k = 1; k < kAllTries; ++k) factor = i == k ? kFactors[k] : factor;
    return factor;
  }

  /// The codes of least cost, the first of equals, into `best_`.
  __device__ __forceinline__ void choose_try(float inverse) {
    float least = INFINITY;
    if constexpr (kLanes == 1) {
      int first = 0;
      for (; first + kTries <= kAllTries; first += kTries) {
        if (first > 0) load();
        keep_best<kTries>(first, inverse, least);
      }
      if constexpr (kAllTries % kTries != 0) {
        load();
        keep_best<kAllTries % kTries>(first, inverse, least);
      }
    } else {
      float costs[1];
      try_feedback<1>(share_, inverse, least, costs);
      int winner = 0;
      for (int i = 0; i < kAllTries; ++i) {
        const float cost = of_share(costs[0], i);
        if (i > 0 && !(cost < least)) continue;
        least = cost;
        winner = i;
      }
      for (int w = 0; w < d_ / 8; ++w)
        if (share_ == winner) best(w, token_) = tried(0, w);
      __syncwarp();
    }
  }

  template <int kNow>
  __device__ __forceinline__ void keep_best(int first, float inverse, float& least) {
    float costs[kNow];
    try_feedback<kNow>(first, inverse, least, costs);
#pragma unroll
    for (int i = 0; i < kNow; ++i) {
      if (first + i > 0 && !(costs[i] < least)) continue;
      least = costs[i];
      for (int w = 0; w < d_ / 8; ++w) best(w, token_) = tried(i, w);
    }
  }

  /// Codes with feedback of tries first .. first + kNow - 1, into `tried_`, and their costs; given up where every cost is `least` or more.
  template <int kNow>
  __device__ __forceinline__ void try_feedback(int first_try, float inverse, float least, float (&cost)[kNow]) {
    Tries<kNow> t;
    float cc[kNow];
#pragma unroll
    for (int i = 0; i < kNow; ++i) {
      t.inverse[i] = __fmul_rn(inverse, feedback_factor(first_try + i));
      t.s[i] = 0;
      cc[i] = 0;
      t.cost[i] = 0;
    }
    for (int c = 0; c < d_; ++c) {
      const float x = y(c);
#pragma unroll
      for (int i = 0; i < kNow; ++i) add_sums(x, value_of(code(x, t.inverse[i])), t.s[i], cc[i]);
    }
#pragma unroll
    for (int i = 0; i < kNow; ++i) t.s[i] = __fdiv_rn(t.s[i], cc[i]);
    const float* panel = panels_;
    const int of_try = (d_ - kPanel) * kRow;
    for (int first = 0; first < d_; first += kPanel) {
#pragma unroll
      for (int j = 0; j < kPanel; ++j) {
        const float x = y(first + j);
#pragma unroll
        for (int i = 0; i < kNow; ++i) t.x[i][j] = x;
      }
      const float* errors = &error(kTries - kNow, 0);
      for (int c = 0; c < first; c += kRowsAtOnce, panel += kRowsAtOnce * kPanel, errors += kRowsAtOnce * kRow) {
#pragma unroll
        for (int row = 0; row < kRowsAtOnce; ++row) {
          float f[kNow];
#pragma unroll
          for (int i = 0; i < kNow; ++i) f[i] = errors[row * kRow + i * of_try];
          subtract<0>(t, f, panel + row * kPanel);
        }
      }
#pragma unroll
      for (int i = 0; i < kNow; ++i) t.words[i][0] = t.words[i][1] = 0;
      within<0>(t, panel, first);
      panel += kPanel * kPanel;
#pragma unroll
      for (int i = 0; i < kNow; ++i) {
        tried(i, first / 8) = t.words[i][0];
        tried(i, first / 8 + 1) = t.words[i][1];
      }
      // Costs only grow: where no lane has a try left that could win, the rest, the dearer part, is not worth it.
      if (kLanes == 1 && first_try > 0) {
        bool may_win = false;
#pragma unroll
        for (int i = 0; i < kNow; ++i) may_win = may_win || t.cost[i] < least;
        if (__ballot_sync(0xffffffffU, may_win) == 0) break;
      }
    }
#pragma unroll
    for (int i = 0; i < kNow; ++i) cost[i] = t.cost[i];
  }

  /// Tries under way, and 16 channels of them.
  template <int kNow>
  struct Tries {
    float inverse[kNow], s[kNow], cost[kNow];
    float x[kNow][kPanel];
    uint32_t words[kNow][2];
  };

  /// x[j] -= f row[j] for j >= kFrom.
  template <int kFrom, int kNow>
  static __device__ __forceinline__ void subtract(Tries<kNow>& t, const float (&f)[kNow], const float* row) {
#pragma unroll
    for (int j = kFrom / 4 * 4; j < kPanel; j += 4) {
      const float4 u = *reinterpret_cast<const float4*>(row + j);
      const float four[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (j + k < kFrom) continue;
#pragma unroll
        for (int i = 0; i < kNow; ++i) t.x[i][j + k] = __fmaf_rn(-f[i], four[k], t.x[i][j + k]);
      }
    }
  }

  /// Channels kAt .. 15 of a panel, given what the channels before it have left. @param rows of these channels
  template <int kAt, int kNow>
  __device__ __forceinline__ void within(Tries<kNow>& t, const float* rows, int first) const {
    if constexpr (kAt < kPanel) {
      const float* const row = rows + kAt * kPanel;
      const float seen = row[kAt];
      float f[kNow];
#pragma unroll
      for (int i = 0; i < kNow; ++i) {
        const float q = code(t.x[i][kAt], t.inverse[i]);
        t.words[i][kAt / 8] |= bits_of(q) << (4 * (kAt % 8));
        f[i] = __fsub_rn(t.x[i][kAt], __fmul_rn(t.s[i], value_of(q)));
        t.cost[i] = __fadd_rn(t.cost[i], __fmul_rn(__fmul_rn(f[i], f[i]), seen));
        if (first + kPanel < d_) error(kTries - kNow + i, first + kAt) = f[i];
      }
      subtract<kAt + 1>(t, f, row);
      within<kAt + 1>(t, rows, first);
    }
  }

  // ---- into the page -----------------------------------------------------------------------------------------------

  __device__ std::byte* page(const Place& to) const { return p_.pool + to.pair.page * p_.page_bytes + layer_ * p_.layer_bytes; }

  __device__ void write(bool mine, uint16_t scale) const {
    const HousePageLayout& l = p_.layout;
    if (mine && share_ == 0) {
      const Place to = place(token_);
      auto* const scales = reinterpret_cast<uint16_t*>(page(to) + (is_key_ ? l.key_scale_offset(head_) : l.value_scale_offset(head_)));
      scales[32 * to.pair.pair + to.slot] = scale;
    }
    if (is_key_) write_key();
    else if constexpr (kLanes == 1) write_value_pair(mine);
    else write_values();
  }

  __device__ void write_key() const {
    const HousePageLayout& l = p_.layout;
    for (int i = lane_; i < kTokens * l.key_words(); i += kWarp) {
      const int token = i % kTokens;
      const int w = i / kTokens;
      const Place to = place(token);
      if (!to.there) continue;
      uint32_t word = 0;
      if (bits_ == 4) {
#pragma unroll
        for (int k = 0; k < 8; ++k) word |= best_code(8 * w + k, token) << (8 * (k % 4) + 4 * (k / 4));
      } else if (w < d_ / 16) {
#pragma unroll
        for (int k = 0; k < 16; ++k) word |= (best_code(16 * w + k, token) & 3U) << (8 * (k % 4) + 2 * (k / 4));
      } else {
        const int first = 32 * (w - d_ / 16);
        for (int k = 0; k < 32 && first + k < d_; ++k) word |= (best_code(first + k, token) >> 2) << (8 * (k % 4) + k / 4);
      }
      auto* const words = reinterpret_cast<uint32_t*>(page(to) + l.key_block_offset(head_, 2 * to.pair.pair + to.slot / 16));
      words[w * 16 + to.slot % 16] = word;
    }
  }

  /// Few tokens: each by itself into the words that it shares with others.
  __device__ void write_values() const {
    const HousePageLayout& l = p_.layout;
    for (int token = 0; token < kTokens; ++token) {
      const Place to = place(token);
      if (!to.there) continue;
      const int block = 2 * to.pair.pair + to.slot / 16;
      const int t = to.slot % 16;
      for (int channel = lane_; channel < d_; channel += kWarp) {
        const uint32_t code = best_code(channel, token);
        auto* const row = reinterpret_cast<uint32_t*>(page(to) + l.value_block_offset(head_, block)) + channel;
        if (bits_ == 4) {
          const int shift = 8 * (t % 4) + 4 * (t % 8 / 4);
          merge(row + t / 8 * d_, code << shift, 15U << shift);
          continue;
        }
        const int shift = 8 * (t % 4) + 2 * (t / 4);
        merge(row, (code & 3U) << shift, 3U << shift);
        if (bits_ == 3) {
          const int high = 8 * (t % 4) + 4 * (block % 2) + t / 4;
          merge(reinterpret_cast<uint32_t*>(page(to) + l.value_high_offset(head_, block)) + channel, (code >> 2) << high, 1U << high);
        }
      }
    }
  }

  /// The bits of the tokens of one word (16, or 8 at step 4), token 4 j + i to bit 8 i + kStep j.
  template <int kStep>
  static __device__ uint32_t spread(uint32_t tokens) {
    uint32_t word = 0;
#pragma unroll
    for (int t = 0; t < (kStep == 4 ? 8 : 16); ++t) word |= (tokens >> t & 1U) << (8 * (t % 4) + kStep * (t / 4));
    return word;
  }

  /// A pair of blocks: whole words.
  __device__ void write_value_pair(bool mine) const {
    const HousePageLayout& l = p_.layout;
    const StorePair& pair = p_.pairs[first_pair_];
    std::byte* const bytes = page(place(0));
    for (int first = 0; first < d_; first += kWarp) {
      // Lane c gets bit b of channel first + c of all tokens.
      uint32_t planes[4] = {0, 0, 0, 0};
      for (int c = 0; c < kWarp; ++c) {
        const uint32_t code = mine ? best_code(first + c, token_) : 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const uint32_t plane = __ballot_sync(0xffffffffU, (code >> b & 1U) != 0);
          if (c == lane_) planes[b] = plane;
        }
      }
      const int channel = first + lane_;
      for (int half = 0; half < 2; ++half) {
        const int block = 2 * pair.pair + half;
        const uint32_t there = pair.tokens >> (16 * half) & 0xffffU;
        auto* const row = reinterpret_cast<uint32_t*>(bytes + l.value_block_offset(head_, block)) + channel;
        const auto plane = [&](int b) { return planes[b] >> (16 * half) & 0xffffU; };
        if (bits_ == 4) {
          for (int word = 0; word < 2; ++word) {
            const auto eight = [&](uint32_t tokens) { return spread<4>(tokens >> (8 * word)); };
            const uint32_t codes = eight(plane(0)) | eight(plane(1)) << 1 | eight(plane(2)) << 2 | eight(plane(3)) << 3;
            merge(row + word * d_, codes, eight(there) * 15U);
          }
          continue;
        }
        merge(row, spread<2>(plane(0)) | spread<2>(plane(1)) << 1, spread<2>(there) * 3U);
      }
      if (bits_ == 3) {
        // The word of a pair: bits 4 o + j of byte i.
        auto* const row = reinterpret_cast<uint32_t*>(bytes + l.value_high_offset(head_, 2 * pair.pair)) + channel;
        const auto both = [&](uint32_t tokens) { return spread<1>(tokens) | spread<1>(tokens >> 16) << 4; };
        merge(row, both(planes[2]), both(pair.tokens));
      }
    }
  }

  static __device__ void merge(uint32_t* at, uint32_t bits, uint32_t mask) {
    if (mask != 0) *at = (*at & ~mask) | bits;
  }

  const HouseStoreBatch& p_;
  const int d_;
  const int layer_;
  const int head_;
  const bool is_key_;
  const int bits_;
  const float top_;
  const float middle_;
  const int lane_;
  const int token_;  // whose lane this is
  const int share_;  // which of the token's lanes
  int first_pair_ = 0;
  int round_ = 0;  // which of its pair's tokens, where a warp takes several pairs
  const float* const panels_;
  float* const error_;
  float* const y_;
  uint32_t* const tried_;
  uint32_t* const best_;
};

/// How the kernel lies over the work: a block takes some items of one kv head of one layer, each warp every warps-th of them.
struct HouseStoreGrid {
  bool keys;  ///< their heads come first
  bool values;
  int warps;  ///< of a block
  int items_per_warp;

  static constexpr int64_t blocks_of_head(int64_t n_items, int warps, int items_per_warp) {
    return (n_items + int64_t{warps} * items_per_warp - 1) / (int64_t{warps} * items_per_warp);
  }
};

/// Shared memory of a block.
template <int kTokens, int kTries, bool kFeedback>
__host__ __device__ constexpr int64_t house_store_shared_bytes(int head_dim, int warps) {
  const int64_t panels = kFeedback ? FeedbackPanels::floats_before(head_dim / FeedbackPanels::kChannels) * 4 : 0;
  return panels + warps * HouseStoreWarp<kTokens, kTries, kFeedback>::shared_bytes(head_dim);
}

/// The kernel's body. @tparam kFeedback of keys; values have none
template <int kTokens, int kTries, bool kFeedback>
__device__ inline void house_store_block(const HouseStoreBatch& p, const HouseStoreGrid& grid, std::byte* shared) {
  using Warp = HouseStoreWarp<kTokens, kTries, kFeedback>;
  const int warp_in_block = static_cast<int>(threadIdx.x) / Warp::kWarp;
  const int n_items = (p.n_pairs + Warp::kPairs - 1) / Warp::kPairs;
  const auto per_head = static_cast<int>(HouseStoreGrid::blocks_of_head(n_items, grid.warps, grid.items_per_warp));
  const int heads = p.n_layers * p.layout.n_kv_heads;
  const int head = static_cast<int>(blockIdx.x) / per_head;  // of all layers, keys then values
  const bool is_key = grid.keys && head < heads;
  auto* const panels = reinterpret_cast<float*>(shared);
  std::byte* const of_warps = shared + house_store_shared_bytes<kTokens, kTries, kFeedback>(p.layout.head_dim, 0);
  if constexpr (kFeedback) {
    FeedbackPanels::copy_async(panels, p.feedback + int64_t{head} * p.layout.head_dim * p.layout.head_dim, p.layout.head_dim,
                               grid.warps * Warp::kWarp);
    kernels::ptx::wait_copies<0>();
    __syncthreads();
  }
  Warp warp(p, head % heads / p.layout.n_kv_heads, head % p.layout.n_kv_heads, is_key, panels,
            of_warps + warp_in_block * Warp::shared_bytes(p.layout.head_dim));
  const int first = static_cast<int>(blockIdx.x) % per_head * grid.warps * grid.items_per_warp + warp_in_block;
  for (int i = 0; i < grid.items_per_warp && first + i * grid.warps < n_items; ++i) warp.run(first + i * grid.warps);
}

}  // namespace rotunda::kv::house
