#include "kernels/simd_targets_dot.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kv/house/kernels/house_decode_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"

#include <algorithm>
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

/// Largest magnitudes below this count as zero: 1 / x stays finite.
inline constexpr float kTiny = 1e-30F;

/// What all pages of a call share, in the thread's scratch memory.
struct DecodeWork {
  uint32_t* q;          ///< of each group of heads: [head_dim / 4][heads] four 8-bit integers
  float* q_step;        ///< [n_q]
  int32_t* q_sum;       ///< [n_q] sum of the integers
  float* shift;         ///< [heads][2][n_pairs padded] a and b of the group, turned by the page's first position
  float* page_cos_sin;  ///< [2][n_pairs padded]
  float* scores;        ///< [heads][page_tokens] scores, then weights times value scales
  uint32_t* weights;    ///< [blocks_per_page][heads][2][4] upper, then lower bytes of 16 weights
  float* weight_step;   ///< [heads]
  int32_t* weight_sum;  ///< [heads]
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
using kernels::HWY_NAMESPACE::kDot4AnyByte;
using kernels::HWY_NAMESPACE::kLanes;
using kernels::HWY_NAMESPACE::LaneTag;
using kernels::HWY_NAMESPACE::LaneVec;
using kernels::HWY_NAMESPACE::SoftmaxStep;
using kernels::HWY_NAMESPACE::WordTag;
using kernels::HWY_NAMESPACE::WordVec;

HWY_INLINE WordVec Bytes(uint32_t byte) { return hn::Set(WordTag(), byte * 0x01010101u); }

/// Groups of four codes in a word.
template <int kBits>
constexpr int kGroups = kBits == 4 ? 2 : 4;

/// Whether group j stays where it is in its bytes, 2^(b j) times too large.
template <int kBits>
constexpr bool kInPlace = kDot4AnyByte&& kBits != 3;

/// Codes of group j as bytes. @param high 3 bits: the high bits, those of the word's first group at bit 0 of each byte
template <int kBits, int j, bool in_place>
HWY_INLINE WordVec Codes(WordVec low, WordVec high) {
  constexpr uint32_t kMask = kBits == 4 ? 15 : 3;
  constexpr int kShift = (kBits == 4 ? 4 : 2) * j;
  if constexpr (in_place) return hn::And(low, Bytes(kMask << kShift));
  const WordVec code = hn::And(hn::ShiftRight<kShift>(low), Bytes(kMask));
  if constexpr (kBits != 3) return code;
  WordVec top = high;
  if constexpr (j < 2) top = hn::ShiftLeft<2 - j>(high);
  if constexpr (j > 2) top = hn::ShiftRight<j - 2>(high);
  return hn::Or(code, hn::And(top, Bytes(4)));
}

HWY_INLINE void PrefetchBytes(const std::byte* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) hwy::Prefetch(at + i);
}

/// sum[h] + codes of one word of kLanes tokens times 16 or 8 channels of each head's query.
/// @param sum [kHeads][kGroups] or, not in place, [kHeads][2]  @param q of these channels
template <int kBits, int kHeads, int j>
HWY_INLINE void AddKeyGroup(WordVec low, WordVec high, const uint32_t* HWY_RESTRICT q, IntVec* sum) {
  constexpr bool kStay = kInPlace<kBits>;
  constexpr int kSums = kStay ? kGroups<kBits> : 2;
  const WordVec codes = Codes<kBits, j, kStay>(low, high);
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h)
    sum[h * kSums + j % kSums] = Dot4(sum[h * kSums + j % kSums], codes, q + j * kHeads + h);
}

template <int kBits, int kHeads>
HWY_INLINE void AddKeyWord(WordVec low, WordVec high, const uint32_t* HWY_RESTRICT q, IntVec* sum) {
  AddKeyGroup<kBits, kHeads, 0>(low, high, q, sum);
  AddKeyGroup<kBits, kHeads, 1>(low, high, q, sum);
  if constexpr (kGroups<kBits> == 4) {
    AddKeyGroup<kBits, kHeads, 2>(low, high, q, sum);
    AddKeyGroup<kBits, kHeads, 3>(low, high, q, sum);
  }
}

/// Scores of one block: codes times query in integers, then one factor per token and head; the shift's part is in `scores` already.
/// @param words [key_words][16] @param scales [16] fp16  @param q [head_dim / 4][kHeads]  @param scores [kHeads] rows, `stride` apart
template <int kBits, int kHeads>
HWY_INLINE void BlockScores(const uint32_t* HWY_RESTRICT words, const hwy::float16_t* HWY_RESTRICT scales, int head_dim,
                            uint16_t mask, const uint32_t* HWY_RESTRICT q, const float* HWY_RESTRICT q_step,
                            const int32_t* HWY_RESTRICT q_sum, bool shifted, float* HWY_RESTRICT scores,
                            int64_t stride) {
  const LaneTag d;
  const IntTag di;
  const WordTag du;
  const hn::Rebind<hwy::float16_t, LaneTag> d16;
  constexpr bool kStay = kInPlace<kBits>;
  constexpr int kSums = kStay ? kGroups<kBits> : 2;
  constexpr int kPerWord = 4 * kGroups<kBits>;
  const LaneVec none = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
    IntVec sum[kHeads * kSums];
    HWY_UNROLL(16)
    for (int i = 0; i < kHeads * kSums; ++i) sum[i] = hn::Zero(di);
    const uint32_t* at = words + lane;
    const uint32_t* high_at = at + head_dim / 16 * kTokenBlock;
    const uint32_t* q_at = q;
    for (int c = 0; c < head_dim; c += kPerWord) {
      const WordVec low = hn::Load(du, at);
      WordVec high = low;
      if constexpr (kBits == 3) {
        high = hn::Load(du, high_at);
        if ((c & 16) != 0) {
          high = hn::ShiftRight<4>(high);
          high_at += kTokenBlock;
        }
      }
      AddKeyWord<kBits, kHeads>(low, high, q_at, sum);
      at += kTokenBlock;
      q_at += kGroups<kBits> * kHeads;
    }
    const LaneVec scale = hn::PromoteTo(d, hn::LoadU(d16, scales + lane));
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      IntVec total = sum[h * kSums];
      if constexpr (!kStay) {
        total = hn::Add(total, sum[h * kSums + 1]);
      } else if constexpr (kBits == 4) {
        total = hn::Add(total, hn::ShiftRight<4>(sum[h * kSums + 1]));
      } else {
        total = hn::Add(total, hn::ShiftRight<2>(sum[h * kSums + 1]));
        total = hn::Add(total, hn::ShiftRight<4>(sum[h * kSums + 2]));
        total = hn::Add(total, hn::ShiftRight<6>(sum[h * kSums + 3]));
      }
      const IntVec values = hn::Sub(hn::Add(total, total), hn::Set(di, ((1 << kBits) - 1) * q_sum[h]));
      float* const to = scores + h * stride + lane;
      LaneVec score = hn::Mul(hn::Mul(hn::ConvertTo(d, values), hn::Set(d, q_step[h])), scale);
      if (shifted) score = hn::Add(score, hn::Load(d, to));
      hn::Store(IfAttended(mask, lane, score, none), d, to);
    }
  }
}

/// The shift's part of the scores of a page.
template <int kHeads>
HWY_NOINLINE void ShiftScores(const HouseDecodeParams& p, const DecodeWork& work, int page, int first) {
  const LaneTag d;
  const ShiftTerm& s = p.shift;
  const HousePageLayout& l = p.layer->layout;
  const int half = l.head_dim / 2;
  const auto padded = static_cast<int>(kernels::whole_lines(s.n_pairs));
  float* const cos = work.page_cos_sin;
  float* const sin = cos + padded;
  for (int i = 0; i < s.n_pairs; ++i) {
    cos[i] = s.page_cos[int64_t{page} * half + s.pairs[i]];
    sin[i] = s.page_sin[int64_t{page} * half + s.pairs[i]];
  }
  for (int h = 0; h < kHeads; ++h) {
    const float* const a = s.a + int64_t{first + h} * s.n_pairs;
    const float* const b = s.b + int64_t{first + h} * s.n_pairs;
    float* const turned_a = work.shift + int64_t{2 * h} * padded;
    float* const turned_b = turned_a + padded;
    for (int i = 0; i < s.n_pairs; ++i) {
      turned_a[i] = a[i] * cos[i] + b[i] * sin[i];
      turned_b[i] = b[i] * cos[i] - a[i] * sin[i];
    }
  }
  const int64_t tokens = l.page_tokens();
  for (int block = 0; block < l.blocks_per_page; ++block) {
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      LaneVec sum[2 * kHeads];
      for (int i = 0; i < 2 * kHeads; ++i) sum[i] = hn::Zero(d);
      for (int i = 0; i < s.n_pairs; ++i) {
        const int64_t at = (int64_t{block} * half + s.pairs[i]) * kTokenBlock + lane;
        const LaneVec c = hn::LoadU(d, s.token_cos + at);
        const LaneVec t = hn::LoadU(d, s.token_sin + at);
        HWY_UNROLL(4)
        for (int h = 0; h < kHeads; ++h) {
          sum[2 * h] = hn::MulAdd(c, hn::Set(d, work.shift[2 * h * padded + i]), sum[2 * h]);
          sum[2 * h + 1] = hn::MulAdd(t, hn::Set(d, work.shift[(2 * h + 1) * padded + i]), sum[2 * h + 1]);
        }
      }
      for (int h = 0; h < kHeads; ++h)
        hn::Store(hn::Add(sum[2 * h], sum[2 * h + 1]), d, work.scores + h * tokens + block * kTokenBlock + lane);
    }
  }
}

/// Scores of kHeads query heads from `first` on against one page into work.scores.
/// @param next bytes of the head in the page to come, fetched meanwhile, or null
template <int kBits, int kHeads>
HWY_NOINLINE void PageScores(const HouseDecodeParams& p, const DecodeWork& work, int page, int first,
                             const std::byte* next) {
  const LaneTag d;
  const HousePageLayout& l = p.layer->layout;
  const int64_t tokens = l.page_tokens();
  const std::byte* const bytes = p.run.pages[page];
  const uint16_t* const masks = p.run.masks + int64_t{page} * l.blocks_per_page;
  const auto* const scales = reinterpret_cast<const hwy::float16_t*>(bytes + l.key_scale_offset(p.kv_head));
  const int64_t block_bytes = int64_t{l.key_words()} * kTokenBlock * 4;
  for (int block = 0; block < l.blocks_per_page; ++block) {
    float* const to = work.scores + block * kTokenBlock;
    if (masks[block] == 0) {
      for (int h = 0; h < kHeads; ++h) {
        for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
          hn::Store(hn::Set(d, -std::numeric_limits<float>::infinity()), d, to + h * tokens + lane);
        }
      }
      continue;
    }
    if (next != nullptr) PrefetchBytes(next + block * block_bytes, block_bytes);
    BlockScores<kBits, kHeads>(reinterpret_cast<const uint32_t*>(bytes + l.key_block_offset(p.kv_head, block)),
                               scales + block * kTokenBlock, l.head_dim, masks[block],
                               work.q + int64_t{first} * (l.head_dim / 4), work.q_step + first, work.q_sum + first,
                               p.shift.n_pairs > 0, to, tokens);
  }
}

/// Weights times value scales as integers of two bytes, relative to the largest of the page.
template <int kHeads>
HWY_NOINLINE void QuantizeWeights(const HouseDecodeParams& p, const DecodeWork& work, int page) {
  const LaneTag d;
  const IntTag di;
  const hn::Rebind<int8_t, LaneTag> d8;
  const hn::Rebind<hwy::float16_t, LaneTag> d16;
  const HousePageLayout& l = p.layer->layout;
  const auto tokens = static_cast<int>(l.page_tokens());
  const uint16_t* const masks = p.run.masks + int64_t{page} * l.blocks_per_page;
  const auto* const scales =
      reinterpret_cast<const hwy::float16_t*>(p.run.pages[page] + l.value_scale_offset(p.kv_head));
  LaneVec top[kHeads];
  for (int h = 0; h < kHeads; ++h) top[h] = hn::Zero(d);
  for (int t = 0; t < tokens; t += kLanes) {
    // The scales of tokens left out may be anything, and 0 * NaN is not 0.
    const LaneVec scale =
        IfAttended(masks[t / kTokenBlock], t % kTokenBlock, hn::PromoteTo(d, hn::LoadU(d16, scales + t)), hn::Zero(d));
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      const LaneVec weight = hn::Mul(hn::Load(d, work.scores + h * tokens + t), scale);
      hn::Store(weight, d, work.scores + h * tokens + t);
      top[h] = hn::Max(top[h], weight);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    const float largest = hn::GetLane(hn::MaxOfLanes(d, top[h]));
    const float inverse = largest < kTiny ? 0.0F : kMaxWeight / largest;
    const LaneVec factor = hn::Set(d, inverse);
    IntVec sum = hn::Zero(di);
    for (int t = 0; t < tokens; t += kLanes) {
      const IntVec w = hn::NearestInt(hn::Mul(hn::Load(d, work.scores + h * tokens + t), factor));
      const IntVec upper = hn::ShiftRight<8>(hn::Add(w, hn::Set(di, 128)));
      auto* const to =
          reinterpret_cast<int8_t*>(work.weights + (int64_t{t / kTokenBlock} * kHeads + h) * 8) + t % kTokenBlock;
      hn::StoreU(hn::DemoteTo(d8, upper), d8, to);
      hn::StoreU(hn::DemoteTo(d8, hn::Sub(w, hn::ShiftLeft<8>(upper))), d8, to + kTokenBlock);
      sum = hn::Add(sum, w);
    }
    work.weight_step[h] = largest < kTiny ? 0.0F : largest / kMaxWeight;
    work.weight_sum[h] = hn::GetLane(hn::SumOfLanes(di, sum));
  }
}

/// Adds group j of kVectors value words to the sums of all heads.
/// @param weights of the block and the word: [kHeads][2][4]  @param sum [kHeads][2][kVectors]
template <int kBits, int kHeads, int kVectors, int j>
HWY_INLINE void AddValueGroup(const WordVec* low, const WordVec* high, const uint32_t* HWY_RESTRICT weights,
                              IntVec* sum) {
  const WordTag du;
  WordVec codes[kVectors];
  HWY_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) codes[v] = Codes<kBits, j, false>(low[v], high[v]);
  HWY_UNROLL(8)
  for (int i = 0; i < 2 * kHeads; ++i) {
    if constexpr (kVectors == 1) {
      sum[i] = Dot4(sum[i], codes[0], weights + 4 * i + j);
    } else {
      const WordVec weight = hn::Set(du, weights[4 * i + j]);
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) sum[i * kVectors + v] = Dot4(sum[i * kVectors + v], codes[v], weight);
    }
  }
}

/// acc += weights * values for kVectors vectors of channels of kHeads query heads, over the attended blocks of one page.
/// @param values rows of the head, advanced to the channels  @param acc [kHeads][head_dim], advanced to the channels
template <int kBits, int kHeads, int kVectors>
HWY_INLINE void AddValues(const HousePageLayout& l, const uint32_t* HWY_RESTRICT values, const uint16_t* masks,
                          const DecodeWork& work, float* HWY_RESTRICT acc) {
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
    for (int v = 0; v < kVectors; ++v) low[v] = high[v] = hn::LoadU(du, at + v * kLanes);
    if constexpr (kBits == 3) {
      const uint32_t* const high_at = values + int64_t{block / 2 * 3 + 2} * head_dim;
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        high[v] = hn::LoadU(du, high_at + v * kLanes);
        if (block % 2 != 0) high[v] = hn::ShiftRight<4>(high[v]);
      }
    }
    AddValueGroup<kBits, kHeads, kVectors, 0>(low, high, weights, sum);
    AddValueGroup<kBits, kHeads, kVectors, 1>(low, high, weights, sum);
    if constexpr (kBits == 4) {
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) low[v] = hn::LoadU(du, at + head_dim + v * kLanes);
      AddValueGroup<kBits, kHeads, kVectors, 0>(low, high, weights + 2, sum);
      AddValueGroup<kBits, kHeads, kVectors, 1>(low, high, weights + 2, sum);
    } else {
      AddValueGroup<kBits, kHeads, kVectors, 2>(low, high, weights, sum);
      AddValueGroup<kBits, kHeads, kVectors, 3>(low, high, weights, sum);
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
  // Values and scales of the head in the page to come, a share with each step.
  const int64_t rest = l.head_bytes() - l.key_codes_bytes();
  constexpr int kVectors = kLanes == 16 ? 2 : 1;
  for (int c = 0; c < l.head_dim;) {
    const int wide = c + kVectors * kLanes <= l.head_dim ? kVectors * kLanes : kLanes;
    if (next != nullptr) {
      const int64_t from = rest * c / l.head_dim / 64 * 64;
      PrefetchBytes(next + l.key_codes_bytes() + from, rest * (c + wide) / l.head_dim - from);
    }
    if (wide == kVectors * kLanes) {
      AddValues<kBits, kHeads, kVectors>(l, values + c, masks, work, acc + c);
    } else {
      AddValues<kBits, kHeads, 1>(l, values + c, masks, work, acc + c);
    }
    c += wide;
  }
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
  const auto tokens = static_cast<int>(l.page_tokens());
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
  for (int h = 0; h < kHeads; ++h) {
    SoftmaxStep(work.scores + int64_t{h} * tokens, tokens, p.state.max + first + h, p.state.sum + first + h,
                p.state.acc + int64_t{first + h} * l.head_dim, l.head_dim);
  }
  QuantizeWeights<kHeads>(p, work, page);
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

void HouseDecode(const HouseDecodeParams& p) {
  static thread_local kernels::Scratch scratch;
  const HousePageLayout& l = p.layer->layout;
  const auto tokens = static_cast<size_t>(l.page_tokens());
  const size_t pairs = kernels::whole_lines(p.shift.n_pairs);
  const size_t heads = kernels::whole_lines(p.n_q);
  const size_t q_words = kernels::whole_lines(static_cast<size_t>(p.n_q) * l.head_dim / 4);
  float* at = scratch.floats(q_words + 2 * heads + (2 * kHeadsAtOnce + 2) * pairs + kHeadsAtOnce * tokens +
                             kHeadsAtOnce * tokens / 2 + 32);
  const auto take = [&](size_t n) {
    float* const here = at;
    at += n;
    return here;
  };
  DecodeWork work;
  work.q = reinterpret_cast<uint32_t*>(take(q_words));
  work.q_step = take(heads);
  work.q_sum = reinterpret_cast<int32_t*>(take(heads));
  work.shift = take(2 * kHeadsAtOnce * pairs);
  work.page_cos_sin = take(2 * pairs);
  work.scores = take(kHeadsAtOnce * tokens);
  work.weights = reinterpret_cast<uint32_t*>(take(kHeadsAtOnce * tokens / 2));
  work.weight_step = take(16);
  work.weight_sum = reinterpret_cast<int32_t*>(take(16));

  for (int first = 0; first < p.n_q; first += kHeadsAtOnce)
    QuantizeQueries(p, work, first, std::min(kHeadsAtOnce, p.n_q - first));
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
