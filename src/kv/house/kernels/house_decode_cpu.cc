#include "kernels/simd_targets_dot.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kv/house/kernels/house_decode_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/attention/softmax-inl.h"
#include "kernels/dot4-inl.h"
#include "kernels/scratch.h"
#include "kv/house/kernels/house_codec.h"

#ifndef ROTUNDA_HOUSE_DECODE_ONCE
#define ROTUNDA_HOUSE_DECODE_ONCE
namespace rotunda::kv::house {

/// Query heads that are worked on together.
inline constexpr int kHeadsAtOnce = 4;

/// What a weight times a scale becomes at most: 256 * 127 + 127, so that both bytes, the lower one signed, fit.
inline constexpr float kMaxWeight = 32639.0F;

/// Added to a number below 2^22, rounds it to an integer that stands in the lowest bits.
inline constexpr float kRounder = 12582912.0F;

/// Largest magnitudes below this count as zero: 1 / x stays finite.
inline constexpr float kTiny = 1e-30F;

/// What all pages of a call share, in the thread's scratch memory.
struct DecodeWork {
  uint32_t* q;            ///< of each group of heads: [head_dim / 4][heads] four 8-bit integers
  float* q_step;          ///< [n_q]
  int32_t* q_sum;         ///< [n_q] sum of the integers
  float* shift;           ///< of each group of heads: [n_pairs][2][4] a and b
  float* turned;          ///< [n_pairs][2][4] the same of the current group, turned by the page's first position
  float* shift_at_first;  ///< [4] the shift's part of the score of the page's first token
  float* scores;          ///< [heads][page_tokens] scores, then weights times value scales
  uint32_t* weights;      ///< [blocks_per_page][heads][2][4] upper, then lower bytes of 16 weights
  float* weight_step;     ///< [heads]
  int32_t* weight_sum;    ///< [heads]
};

}  // namespace rotunda::kv::house
#endif  // ROTUNDA_HOUSE_DECODE_ONCE

HWY_BEFORE_NAMESPACE();
namespace rotunda::kv::house {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::Dot4;
using kernels::HWY_NAMESPACE::IfAttended;
using kernels::HWY_NAMESPACE::IntTag;
using kernels::HWY_NAMESPACE::IntVec;
using kernels::HWY_NAMESPACE::kLanes;
using kernels::HWY_NAMESPACE::LaneTag;
using kernels::HWY_NAMESPACE::LaneVec;
using kernels::HWY_NAMESPACE::StoreLowBytes;
using kernels::HWY_NAMESPACE::WordTag;
using kernels::HWY_NAMESPACE::WordVec;

HWY_INLINE WordVec Bytes(uint32_t byte) { return hn::Set(WordTag(), byte * 0x01010101u); }

/// Groups of four codes in a word.
template <int kBits>
constexpr int kGroups = kBits == 4 ? 2 : 4;

/// Codes of group j as bytes. @param high 3 bits: the high bits, those of the word's first group at bit 0 of each byte
template <int kBits, int j>
HWY_INLINE WordVec Codes(WordVec low, WordVec high) {
  const WordVec code = hn::And(hn::ShiftRight<(kBits == 4 ? 4 : 2) * j>(low), Bytes(kBits == 4 ? 15 : 3));
  if constexpr (kBits != 3) return code;
  WordVec top = high;
  if constexpr (j < 2) top = hn::ShiftLeft<2 - j>(high);
  if constexpr (j > 2) top = hn::ShiftRight<j - 2>(high);
  return hn::Or(code, hn::And(top, Bytes(4)));
}

HWY_INLINE void PrefetchBytes(const std::byte* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) hwy::Prefetch(at + i);
}

/// Adds group j of kVectors words to kRows sums each: sum[i][v] + codes of word v times factors[i].
/// @param factors kRows words, `kStride` apart  @param sum [kRows][kVectors]
template <int kBits, int j, int kRows, int kStride, int kVectors>
HWY_INLINE void AddGroup(const WordVec* low, const WordVec* high, const uint32_t* HWY_RESTRICT factors, IntVec* sum) {
  WordVec codes[kVectors];
  HWY_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) codes[v] = Codes<kBits, j>(low[v], high[v]);
  HWY_UNROLL(8)
  for (int i = 0; i < kRows; ++i) {
    if constexpr (kVectors == 1) {
      sum[i] = Dot4(sum[i], codes[0], factors + i * kStride);
    } else {
      // In a register: the processor broadcasts fewer words from memory in a cycle than it multiplies.
      const WordVec factor = hn::Set(WordTag(), factors[i * kStride]);
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) sum[i * kVectors + v] = Dot4(sum[i * kVectors + v], codes[v], factor);
    }
  }
}

/// Vectors of tokens that are scored together: lanes of four blocks or parts of one block.
constexpr int kTokenVectors = kLanes == 16 ? 4 : kLanes == 1 ? 1 : 2;

/// Codes times queries in integers, for kVectors vectors of tokens.
/// @param words of the first; those of the next lie `stride` words further  @param ahead words that are fetched meanwhile, as far apart;
/// a few lines at a time, because a core waits once it has asked for too many  @param q [head_dim / 4][kHeads]  @param sum [kHeads][kVectors]
template <int kBits, int kHeads, int kVectors>
HWY_INLINE void DotKeys(const uint32_t* HWY_RESTRICT words, const uint32_t* ahead, int64_t stride, int head_dim,
                        const uint32_t* HWY_RESTRICT q, IntVec* sum) {
  const IntTag di;
  const WordTag du;
  HWY_UNROLL(16)
  for (int i = 0; i < kHeads * kVectors; ++i) sum[i] = hn::Zero(di);
  const uint32_t* high_at = words + head_dim / 16 * kTokenBlock;
  const uint32_t* high_ahead = ahead + head_dim / 16 * kTokenBlock;
  for (int c = 0; c < head_dim; c += 4 * kGroups<kBits>) {
    WordVec low[kVectors];
    WordVec high[kVectors];
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      low[v] = high[v] = hn::Load(du, words + v * stride);
      hwy::Prefetch(ahead + v * stride);
    }
    if constexpr (kBits == 3) {
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        high[v] = hn::Load(du, high_at + v * stride);
        if ((c & 16) != 0) high[v] = hn::ShiftRight<4>(high[v]);
      }
      if ((c & 16) != 0) {
        HWY_UNROLL(4)
        for (int v = 0; v < kVectors; ++v) hwy::Prefetch(high_ahead + v * stride);
        high_at += kTokenBlock;
        high_ahead += kTokenBlock;
      }
    }
    AddGroup<kBits, 0, kHeads, 1, kVectors>(low, high, q, sum);
    AddGroup<kBits, 1, kHeads, 1, kVectors>(low, high, q + kHeads, sum);
    if constexpr (kGroups<kBits> == 4) {
      AddGroup<kBits, 2, kHeads, 1, kVectors>(low, high, q + 2 * kHeads, sum);
      AddGroup<kBits, 3, kHeads, 1, kVectors>(low, high, q + 3 * kHeads, sum);
    }
    words += kTokenBlock;
    ahead += kTokenBlock;
    q += kGroups<kBits> * kHeads;
  }
}

/// What scores of a page need besides the codes.
struct ScoreParams {
  const hwy::float16_t* scales;  ///< [page_tokens]
  const uint16_t* masks;         ///< [blocks_per_page]
  const float* q_step;           ///< [kHeads]
  const int32_t* q_sum;          ///< [kHeads]
  bool shifted;                  ///< the shift's part is in `scores` already
  float* scores;                 ///< [kHeads][page_tokens]
  int64_t tokens;
};

/// Scores of kVectors vectors of tokens, kLanes or a block apart: the integer sums times one factor per token and head.
template <int kBits, int kHeads, int kVectors>
HWY_INLINE void ScoreVectors(const ScoreParams& p, const uint32_t* HWY_RESTRICT words, const uint32_t* ahead,
                             int64_t block_words, int head_dim, const uint32_t* HWY_RESTRICT q, int block, int lane) {
  const LaneTag d;
  const IntTag di;
  const hn::Rebind<hwy::float16_t, LaneTag> d16;
  IntVec sum[kHeads * kVectors];
  const int64_t at = block * block_words + lane;
  DotKeys<kBits, kHeads, kVectors>(words + at, ahead + at, kLanes == 16 ? block_words : kLanes, head_dim, q, sum);
  // Copies: a store to `scores` might change what p points to, for all the compiler knows.
  float* const HWY_RESTRICT scores = p.scores;
  const int64_t tokens = p.tokens;
  const bool shifted = p.shifted;
  IntVec offset[kHeads];
  LaneVec step[kHeads];
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    offset[h] = hn::Set(di, ((1 << kBits) - 1) * p.q_sum[h]);
    step[h] = hn::Set(d, p.q_step[h]);
  }
  const LaneVec none = hn::Set(d, -std::numeric_limits<float>::infinity());
  HWY_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) {
    const int token = block * kTokenBlock + lane + v * kLanes;
    const LaneVec scale = hn::PromoteTo(d, hn::LoadU(d16, p.scales + token));
    const uint16_t mask = p.masks[token / kTokenBlock];
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      const IntVec total = sum[h * kVectors + v];
      const IntVec values = hn::Sub(hn::Add(total, total), offset[h]);
      float* const to = scores + h * tokens + token;
      LaneVec score = hn::Mul(hn::Mul(hn::ConvertTo(d, values), step[h]), scale);
      if (shifted) score = hn::Add(score, hn::Load(d, to));
      hn::Store(IfAttended(mask, token % kTokenBlock, score, none), d, to);
    }
  }
}

/// The shift's part for kVectors vectors of distances from the page's middle, and their mirror images before it.
/// @param cos, sin of the distances; those of the next vector lie `stride` further
/// @param after, before scores at the middle plus and minus the first distance, [kHeads] rows, `tokens` apart
template <int kHeads, int kVectors>
HWY_INLINE void ShiftVectors(const ShiftTerm& s, const float* HWY_RESTRICT turned, const float* HWY_RESTRICT cos,
                             const float* HWY_RESTRICT sin, int64_t stride, float* after, float* before,
                             int64_t tokens) {
  const LaneTag d;
  LaneVec even[kHeads * kVectors];
  LaneVec odd[kHeads * kVectors];
  HWY_UNROLL(8)
  for (int i = 0; i < kHeads * kVectors; ++i) even[i] = odd[i] = hn::Zero(d);
  for (int i = 0; i < s.n_pairs; ++i, turned += 2 * kHeadsAtOnce) {
    const int64_t at = int64_t{s.pairs[i]} * kTokenBlock;
    LaneVec c[kVectors];
    LaneVec t[kVectors];
    HWY_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      c[v] = hn::LoadU(d, cos + at + v * stride);
      t[v] = hn::LoadU(d, sin + at + v * stride);
    }
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      const LaneVec a = hn::Set(d, turned[h]);
      const LaneVec b = hn::Set(d, turned[kHeadsAtOnce + h]);
      HWY_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) {
        even[h * kVectors + v] = hn::MulAdd(c[v], a, even[h * kVectors + v]);
        odd[h * kVectors + v] = hn::MulAdd(t[v], b, odd[h * kVectors + v]);
      }
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      const LaneVec e = even[h * kVectors + v];
      const LaneVec o = odd[h * kVectors + v];
      hn::StoreU(hn::Add(e, o), d, after + h * tokens + v * kLanes);
      hn::StoreU(hn::Reverse(d, hn::Sub(e, o)), d, before + h * tokens - v * kLanes - (kLanes - 1));
    }
  }
}

/// The shift's part of the scores of a page. Seen from the page's middle, a' cos(j w) + b' sin(j w) serves the tokens j after and, with
/// the other sign, j before it: half the products.
template <int kHeads>
HWY_NOINLINE void ShiftScores(const HouseDecodeParams& p, const DecodeWork& work, int page, int first) {
  const ShiftTerm& s = p.shift;
  const HousePageLayout& l = p.layer->layout;
  const int half = l.head_dim / 2;
  const int64_t tokens = l.page_tokens();
  const int64_t middle = tokens / 2;
  const int64_t block_table = int64_t{half} * kTokenBlock;
  // Four heads a vector: a' = a cos + b sin, b' = b cos - a sin, by the page's first position and then by the middle.
  const hn::CappedTag<float, kHeadsAtOnce> d4;
  const float* const given = work.shift + int64_t{first} * 2 * s.n_pairs;
  for (size_t h = 0; h < kHeadsAtOnce; h += hn::Lanes(d4)) {
    auto at_first = hn::Zero(d4);
    for (int i = 0; i < s.n_pairs; ++i) {
      const int pair = s.pairs[i];
      const auto page_cos = hn::Set(d4, s.page_cos[int64_t{page} * half + pair]);
      const auto page_sin = hn::Set(d4, s.page_sin[int64_t{page} * half + pair]);
      const int64_t table = middle / kTokenBlock * block_table + int64_t{pair} * kTokenBlock;
      const auto cos = hn::Set(d4, s.token_cos[table]);
      const auto sin = hn::Set(d4, s.token_sin[table]);
      const auto a = hn::Load(d4, given + 2 * kHeadsAtOnce * i + h);
      const auto b = hn::Load(d4, given + 2 * kHeadsAtOnce * i + kHeadsAtOnce + h);
      const auto page_a = hn::MulAdd(b, page_sin, hn::Mul(a, page_cos));
      const auto page_b = hn::NegMulAdd(a, page_sin, hn::Mul(b, page_cos));
      at_first = hn::Add(at_first, page_a);
      hn::Store(hn::MulAdd(page_b, sin, hn::Mul(page_a, cos)), d4, work.turned + 2 * kHeadsAtOnce * i + h);
      hn::Store(hn::NegMulAdd(page_a, sin, hn::Mul(page_b, cos)), d4,
                work.turned + 2 * kHeadsAtOnce * i + kHeadsAtOnce + h);
    }
    hn::Store(at_first, d4, work.shift_at_first + h);
  }
  // The mirror image of distance 0 is the middle itself once more; that of the first token, `middle` away, is not among them.
  constexpr int kTogether = kLanes == 16 ? 2 : 1;
  for (int64_t j = 0; j < middle;) {
    const int64_t table = j / kTokenBlock * block_table + j % kTokenBlock;
    float* const after = work.scores + middle + j;
    float* const before = work.scores + middle - j;
    if (j + kTogether * kLanes <= middle) {
      ShiftVectors<kHeads, kTogether>(s, work.turned, s.token_cos + table, s.token_sin + table, block_table, after,
                                      before, tokens);
      j += kTogether * kLanes;
    } else {
      ShiftVectors<kHeads, 1>(s, work.turned, s.token_cos + table, s.token_sin + table, block_table, after, before,
                              tokens);
      j += kLanes;
    }
  }
  for (int h = 0; h < kHeads; ++h) work.scores[h * tokens] = work.shift_at_first[h];
}

/// Scores of kHeads query heads from `first` on against one page into work.scores.
/// @param next bytes of the head in the page to come, fetched meanwhile, or null
template <int kBits, int kHeads>
HWY_NOINLINE void PageScores(const HouseDecodeParams& p, const DecodeWork& work, int page, int first,
                             const std::byte* next) {
  const LaneTag d;
  const HousePageLayout& l = p.layer->layout;
  const std::byte* const bytes = p.run.pages[page];
  const uint16_t* const masks = p.run.masks + int64_t{page} * l.blocks_per_page;
  const ScoreParams s{reinterpret_cast<const hwy::float16_t*>(bytes + l.key_scale_offset(p.kv_head)),
                      masks,
                      work.q_step + first,
                      work.q_sum + first,
                      p.shift.n_pairs > 0,
                      work.scores,
                      l.page_tokens()};
  const auto* const words = reinterpret_cast<const uint32_t*>(bytes + l.key_block_offset(p.kv_head, 0));
  const uint32_t* const q = work.q + int64_t{first} * (l.head_dim / 4);
  const int64_t block_words = int64_t{l.key_words()} * kTokenBlock;
  const uint32_t* const ahead = next == nullptr ? words : reinterpret_cast<const uint32_t*>(next);
  for (int block = 0; block < l.blocks_per_page;) {
    if constexpr (kLanes == 16) {
      bool together = block + kTokenVectors <= l.blocks_per_page;
      for (int b = block; together && b < block + kTokenVectors; ++b) together = masks[b] != 0;
      if (together) {
        ScoreVectors<kBits, kHeads, kTokenVectors>(s, words, ahead, block_words, l.head_dim, q, block, 0);
        block += kTokenVectors;
        continue;
      }
    }
    if (masks[block] == 0) {
      for (int h = 0; h < kHeads; ++h) {
        for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
          hn::Store(hn::Set(d, -std::numeric_limits<float>::infinity()), d,
                    s.scores + h * s.tokens + block * kTokenBlock + lane);
        }
      }
    } else if constexpr (kLanes == 16) {
      ScoreVectors<kBits, kHeads, 1>(s, words, ahead, block_words, l.head_dim, q, block, 0);
    } else {
      for (int lane = 0; lane < kTokenBlock; lane += kTokenVectors * kLanes) {
        ScoreVectors<kBits, kHeads, kTokenVectors>(s, words, ahead, block_words, l.head_dim, q, block, lane);
      }
    }
    ++block;
  }
}

/// exp(x) for x <= 0, exactly 0 from about -87 on (-104 where the processor scales by itself). Relative error below 2^-22.
HWY_INLINE LaneVec ExpOfNegative(LaneVec x) {
  const LaneTag d;
  const LaneVec log2e = hn::Set(d, 1.44269504F);
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  const LaneVec bounded = hn::Max(x, hn::Set(d, -110.0F));
#else
  const LaneVec bounded = hn::Max(x, hn::Set(d, -87.0F));
#endif
  const LaneVec n = hn::Round(hn::Mul(bounded, log2e));
  const LaneVec r = hn::MulSub(bounded, log2e, n);
  // 2^r on [-1/2, 1/2] by interpolation in Chebyshev's nodes.
  LaneVec p = hn::Set(d, 1.3390863e-3F);
  p = hn::MulAdd(p, r, hn::Set(d, 9.6760319e-3F));
  p = hn::MulAdd(p, r, hn::Set(d, 5.5503571e-2F));
  p = hn::MulAdd(p, r, hn::Set(d, 2.4022107e-1F));
  p = hn::MulAdd(p, r, hn::Set(d, 6.9314719e-1F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  return LaneVec{_mm512_scalef_ps(p.raw, n.raw)};
#else
  const IntTag di;
  const IntVec exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  return hn::IfThenElse(hn::Gt(x, hn::Set(d, -87.0F)), hn::Mul(p, hn::BitCast(d, exponent)), hn::Zero(d));
#endif
}

/// Softmax of the page's scores (as kernels::SoftmaxStep does it, all heads side by side) and its weights times value scales as
/// integers of two bytes, relative to the largest of the page.
template <int kHeads>
HWY_NOINLINE void PageWeights(const HouseDecodeParams& p, const DecodeWork& work, int page, int first) {
  const LaneTag d;
  const WordTag du;
  const hn::Rebind<hwy::float16_t, LaneTag> d16;
  const HousePageLayout& l = p.layer->layout;
  const auto tokens = static_cast<int>(l.page_tokens());
  const uint16_t* const masks = p.run.masks + int64_t{page} * l.blocks_per_page;
  const auto* const scales =
      reinterpret_cast<const hwy::float16_t*>(p.run.pages[page] + l.value_scale_offset(p.kv_head));
  float* const HWY_RESTRICT scores = work.scores;
  uint8_t* const HWY_RESTRICT weights = reinterpret_cast<uint8_t*>(work.weights);
  LaneVec top[kHeads];
  LaneVec minus[kHeads];
  LaneVec total[kHeads];
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) top[h] = hn::Load(d, scores + h * tokens);
  for (int t = kLanes; t < tokens; t += kLanes) {
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) top[h] = hn::Max(top[h], hn::Load(d, scores + h * tokens + t));
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    float& max = p.state.max[first + h];
    const float new_max = std::max(max, hn::GetLane(hn::MaxOfLanes(d, top[h])));
    if (max != new_max) {
      const float keep = std::exp(max - new_max);  // 0 for a state that has seen nothing
      p.state.sum[first + h] *= keep;
      float* const acc = p.state.acc + int64_t{first + h} * l.head_dim;
      for (int c = 0; c < l.head_dim; c += kLanes)
        hn::StoreU(hn::Mul(hn::LoadU(d, acc + c), hn::Set(d, keep)), d, acc + c);
      max = new_max;
    }
    minus[h] = hn::Set(d, new_max);
    total[h] = top[h] = hn::Zero(d);
  }
  for (int t = 0; t < tokens; t += kLanes) {
    // The scales of tokens left out may be anything, and 0 * NaN is not 0.
    const LaneVec scale =
        IfAttended(masks[t / kTokenBlock], t % kTokenBlock, hn::PromoteTo(d, hn::LoadU(d16, scales + t)), hn::Zero(d));
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      float* const at = scores + h * tokens + t;
      const LaneVec weight = ExpOfNegative(hn::Sub(hn::Load(d, at), minus[h]));
      total[h] = hn::Add(total[h], weight);
      const LaneVec scaled = hn::Mul(weight, scale);
      hn::Store(scaled, d, at);
      top[h] = hn::Max(top[h], scaled);
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    p.state.sum[first + h] += hn::GetLane(hn::SumOfLanes(d, total[h]));
    const float largest = hn::GetLane(hn::MaxOfLanes(d, top[h]));
    const float inverse = largest < kTiny ? 0.0F : kMaxWeight / largest;
    const LaneVec factor = hn::Set(d, inverse);
    WordVec sum = hn::Zero(du);
    for (int t = 0; t < tokens; t += kLanes) {
      // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
      const LaneVec rounded = hn::MulAdd(hn::Load(d, scores + h * tokens + t), factor, hn::Set(d, kRounder));
      const WordVec w = hn::BitCast(du, rounded);
      uint8_t* const to = weights + (int64_t{t / kTokenBlock} * kHeads + h) * 32 + t % kTokenBlock;
      StoreLowBytes(hn::ShiftRight<8>(hn::Add(w, hn::Set(du, 128))), to);
      StoreLowBytes(w, to + kTokenBlock);
      sum = hn::Add(sum, w);
    }
    // What the additions left in the upper bits, modulo 2^32.
    const uint32_t excess = static_cast<uint32_t>(tokens / kLanes) * std::bit_cast<uint32_t>(kRounder);
    sum = hn::Sub(sum, hn::Set(du, excess));
    work.weight_step[h] = largest < kTiny ? 0.0F : largest / kMaxWeight;
    work.weight_sum[h] = static_cast<int32_t>(hn::GetLane(hn::SumOfLanes(du, sum)));
  }
}

/// acc += weights * values for kVectors vectors of channels of kHeads query heads, over the attended blocks of one page.
/// @param values rows of the head, advanced to the channels  @param ahead rows that are fetched meanwhile  @param acc [kHeads][head_dim], advanced to the channels
template <int kBits, int kHeads, int kVectors>
HWY_INLINE void AddValues(const HousePageLayout& l, const uint32_t* HWY_RESTRICT values, const uint32_t* ahead,
                          const uint16_t* masks, const DecodeWork& work, float* HWY_RESTRICT acc) {
  const LaneTag d;
  const IntTag di;
  const WordTag du;
  const int head_dim = l.head_dim;
  IntVec sum[2 * kHeads * kVectors];
  HWY_UNROLL(16)
  for (int i = 0; i < 2 * kHeads * kVectors; ++i) sum[i] = hn::Zero(di);
  for (int block = 0; block < l.blocks_per_page; ++block) {
    if (masks[block] == 0) continue;
    const uint32_t* const weights = work.weights + block * kHeads * 8;
    const int row = kBits == 4 ? 2 * block : kBits == 3 ? block + block / 2 : block;
    const uint32_t* const at = values + int64_t{row} * head_dim;
    WordVec low[kVectors];
    WordVec high[kVectors];
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      low[v] = high[v] = hn::LoadU(du, at + v * kLanes);
      hwy::Prefetch(ahead + int64_t{row} * head_dim + v * kLanes);
    }
    if constexpr (kBits == 3) {
      const uint32_t* const high_at = values + int64_t{block / 2 * 3 + 2} * head_dim;
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        high[v] = hn::LoadU(du, high_at + v * kLanes);
        hwy::Prefetch(ahead + (high_at - values) + v * kLanes);
        if (block % 2 != 0) high[v] = hn::ShiftRight<4>(high[v]);
      }
    }
    AddGroup<kBits, 0, 2 * kHeads, 4, kVectors>(low, high, weights + 0, sum);
    AddGroup<kBits, 1, 2 * kHeads, 4, kVectors>(low, high, weights + 1, sum);
    if constexpr (kBits == 4) {
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        low[v] = hn::LoadU(du, at + head_dim + v * kLanes);
        hwy::Prefetch(ahead + int64_t{row + 1} * head_dim + v * kLanes);
      }
      AddGroup<kBits, 0, 2 * kHeads, 4, kVectors>(low, high, weights + 2, sum);
      AddGroup<kBits, 1, 2 * kHeads, 4, kVectors>(low, high, weights + 3, sum);
    } else {
      AddGroup<kBits, 2, 2 * kHeads, 4, kVectors>(low, high, weights + 2, sum);
      AddGroup<kBits, 3, 2 * kHeads, 4, kVectors>(low, high, weights + 3, sum);
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    const LaneVec step = hn::Set(d, work.weight_step[h]);
    const IntVec offset = hn::Set(di, ((1 << kBits) - 1) * work.weight_sum[h]);
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      // Below 2^31 for pages of up to 1024 tokens: 2 * 15 * 32639 * tokens.
      const IntVec total =
          hn::Add(hn::ShiftLeft<9>(sum[2 * h * kVectors + v]), hn::ShiftLeft<1>(sum[(2 * h + 1) * kVectors + v]));
      float* const to = acc + h * head_dim + v * kLanes;
      hn::StoreU(hn::MulAdd(hn::ConvertTo(d, hn::Sub(total, offset)), step, hn::LoadU(d, to)), d, to);
    }
  }
}

template <int kBits, int kHeads>
HWY_NOINLINE void PageValues(const HouseDecodeParams& p, const DecodeWork& work, int page, int first,
                             const std::byte* next) {
  const HousePageLayout& l = p.layer->layout;
  const auto* const values = reinterpret_cast<const uint32_t*>(p.run.pages[page] + l.value_block_offset(p.kv_head, 0));
  const uint16_t* const masks = p.run.masks + int64_t{page} * l.blocks_per_page;
  float* const acc = p.state.acc + int64_t{first} * l.head_dim;
  const auto* const ahead = next == nullptr ? values : reinterpret_cast<const uint32_t*>(next + l.key_codes_bytes());
  if (next != nullptr) PrefetchBytes(next + l.key_codes_bytes() + l.value_codes_bytes(), 2 * l.scale_bytes());
  constexpr int kVectors = kLanes == 16 ? 2 : 1;
  int c = 0;
  for (; c + kVectors * kLanes <= l.head_dim; c += kVectors * kLanes) {
    AddValues<kBits, kHeads, kVectors>(l, values + c, ahead + c, masks, work, acc + c);
  }
  for (; c < l.head_dim; c += kLanes) AddValues<kBits, kHeads, 1>(l, values + c, ahead + c, masks, work, acc + c);
}

/// Whether any token of a page is attended.
bool AnyAttended(const HouseDecodeParams& p, int page) {
  const int per_page = p.layer->layout.blocks_per_page;
  uint32_t any = 0;
  for (int block = 0; block < per_page; ++block) any |= p.run.masks[int64_t{page} * per_page + block];
  return any != 0;
}

/// kHeads query heads from `first` on over one page.
template <int kHeads>
void Page(const HouseDecodeParams& p, const DecodeWork& work, int page, int first, const std::byte* next) {
  const HousePageLayout& l = p.layer->layout;
  if (p.shift.n_pairs > 0) ShiftScores<kHeads>(p, work, page, first);
  switch (l.key_bits) {
    case 2:
      PageScores<2, kHeads>(p, work, page, first, next);
      break;
    case 3:
      PageScores<3, kHeads>(p, work, page, first, next);
      break;
    default:
      PageScores<4, kHeads>(p, work, page, first, next);
      break;
  }
  PageWeights<kHeads>(p, work, page, first);
  switch (l.value_bits) {
    case 2:
      PageValues<2, kHeads>(p, work, page, first, next);
      break;
    case 3:
      PageValues<3, kHeads>(p, work, page, first, next);
      break;
    default:
      PageValues<4, kHeads>(p, work, page, first, next);
      break;
  }
}

/// Rounds the queries to 8-bit integers, one step per head, and lays them out for `heads` heads from `first` on.
void QuantizeQueries(const HouseDecodeParams& p, const DecodeWork& work, int first, int heads) {
  const int head_dim = p.layer->layout.head_dim;
  auto* const to = reinterpret_cast<int8_t*>(work.q + int64_t{first} * (head_dim / 4));
  for (int h = 0; h < heads; ++h) {
    const float* const q = p.q + int64_t{first + h} * head_dim;
    float top = 0;
    for (int c = 0; c < head_dim; ++c) top = std::max(top, std::fabs(q[c]));
    const float inverse = top < kTiny ? 0.0F : 127.0F / top;
    int32_t sum = 0;
    for (int c = 0; c < head_dim; ++c) {
      const auto integer = static_cast<int>(std::nearbyint(q[c] * inverse));
      to[(c / 4 * heads + h) * 4 + c % 4] = static_cast<int8_t>(integer);
      sum += integer;
    }
    work.q_step[first + h] = top < kTiny ? 0.0F : top / 127.0F;
    work.q_sum[first + h] = sum;
  }
}

/// Lays out the shift's a and b for `heads` heads from `first` on, zeros for the rest of a group of four.
void LayOutShift(const HouseDecodeParams& p, const DecodeWork& work, int first, int heads) {
  const ShiftTerm& s = p.shift;
  float* const to = work.shift + int64_t{first} * 2 * s.n_pairs;
  for (int i = 0; i < s.n_pairs; ++i) {
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      const int64_t from = int64_t{first + h} * s.n_pairs + i;
      to[2 * kHeadsAtOnce * i + h] = h < heads ? s.a[from] : 0.0F;
      to[2 * kHeadsAtOnce * i + kHeadsAtOnce + h] = h < heads ? s.b[from] : 0.0F;
    }
  }
}

void HouseDecode(const HouseDecodeParams& p) {
  static thread_local kernels::Scratch scratch;
  const HousePageLayout& l = p.layer->layout;
  const auto tokens = static_cast<size_t>(l.page_tokens());
  const size_t groups = (static_cast<size_t>(p.n_q) + kHeadsAtOnce - 1) / kHeadsAtOnce;
  const size_t pair_floats = kernels::whole_lines(size_t{2 * kHeadsAtOnce} * p.shift.n_pairs);
  const size_t heads = kernels::whole_lines(p.n_q);
  const size_t q_words = kernels::whole_lines(static_cast<size_t>(p.n_q) * l.head_dim / 4);
  float* at = scratch.floats(q_words + 2 * heads + (groups + 1) * pair_floats + kHeadsAtOnce * tokens +
                             kHeadsAtOnce * tokens / 2 + 48);
  const auto take = [&](size_t n) {
    float* const here = at;
    at += n;
    return here;
  };
  DecodeWork work;
  work.q = reinterpret_cast<uint32_t*>(take(q_words));
  work.q_step = take(heads);
  work.q_sum = reinterpret_cast<int32_t*>(take(heads));
  work.shift = take(groups * pair_floats);
  work.turned = take(pair_floats);
  work.shift_at_first = take(16);
  work.scores = take(kHeadsAtOnce * tokens);
  work.weights = reinterpret_cast<uint32_t*>(take(kHeadsAtOnce * tokens / 2));
  work.weight_step = take(16);
  work.weight_sum = reinterpret_cast<int32_t*>(take(16));

  for (int first = 0; first < p.n_q; first += kHeadsAtOnce) {
    const int heads_here = std::min(kHeadsAtOnce, p.n_q - first);
    QuantizeQueries(p, work, first, heads_here);
    LayOutShift(p, work, first, heads_here);
  }
  for (int page = 0; page < p.run.n_pages; ++page) {
    if (!AnyAttended(p, page)) continue;
    const std::byte* next = nullptr;
    if (page + 1 < p.run.n_pages && AnyAttended(p, page + 1))
      next = p.run.pages[page + 1] + l.key_block_offset(p.kv_head, 0);
    int first = 0;
    for (; first + kHeadsAtOnce <= p.n_q; first += kHeadsAtOnce, next = nullptr)
      Page<kHeadsAtOnce>(p, work, page, first, next);
    if (p.n_q - first == 3) Page<3>(p, work, page, first, next);
    if (p.n_q - first == 2) Page<2>(p, work, page, first, next);
    if (p.n_q - first == 1) Page<1>(p, work, page, first, next);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kv::house
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace rotunda::kv::house {

HWY_EXPORT(HouseDecode);

void house_decode(const HouseDecodeParams& params) { HWY_DYNAMIC_DISPATCH(HouseDecode)(params); }

}  // namespace rotunda::kv::house
#endif  // HWY_ONCE
