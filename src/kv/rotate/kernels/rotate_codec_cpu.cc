#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kv/rotate/kernels/rotate_codec_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/half.h"
#include "kernels/attention/softmax-inl.h"
#include "kernels/scratch.h"
#include "kv/rotate/kernels/rotate_codec.h"

#ifndef ROTUNDA_ROTATE_CODEC_ONCE
#define ROTUNDA_ROTATE_CODEC_ONCE
namespace rotunda::kv::rotate {

/// Floats of one group in the table of a block: 16 slopes, then 16 offsets.
inline constexpr int kTableRow = 2 * kTokenBlock;

/// What all blocks of a call share, in the thread's scratch memory.
struct DecodeWork {
  int32_t* table_at;  ///< [group_channels] where the table row of each key channel's group begins
  float* table;       ///< [n_quant_groups][2][16] slopes and offsets of the current block
  float* q;           ///< [half][2][n_q_padded] queries as given, times the rotation's scale where the transform leaves it out
  float* turned;      ///< the same, turned back by the page's first position
  float* keys;        ///< [group_channels] rows of the current block's keys
  float* scores;      ///< [n_q][page_tokens]
  float* weights;     ///< [4][page_tokens]
  int n_q_padded;
};

}  // namespace rotunda::kv::rotate
#endif  // ROTUNDA_ROTATE_CODEC_ONCE

HWY_BEFORE_NAMESPACE();
namespace rotunda::kv::rotate {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::IfAttended;
using kernels::HWY_NAMESPACE::kLanes;
using kernels::HWY_NAMESPACE::LaneTag;
using kernels::HWY_NAMESPACE::LaneVec;
using kernels::HWY_NAMESPACE::SoftmaxStep;
using WordTag = hn::RebindToUnsigned<LaneTag>;
using WordVec = hn::Vec<WordTag>;

constexpr uint32_t kOne = 0x3f800000u;  // 1.0F

// A code becomes a float without a conversion: its bits at the top of the mantissa of 1.0 give f = 1 + code / 2^bits, and
// x = s * code + lo is then slope * f + offset with slope = 2^bits * s and offset = lo - slope, one fused step.

/// @param at 16 scales, then zeros of the same group
template <int kBits>
HWY_INLINE void SlopeOffset(ZeroPoint zero, const std::byte* scale_at, const std::byte* zero_at, int lane, LaneVec& slope, LaneVec& offset) {
  const LaneTag d;
  const hn::Rebind<hwy::float16_t, LaneTag> d16;
  const LaneVec scale = hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(scale_at) + lane));
  slope = hn::Mul(scale, hn::Set(d, static_cast<float>(1 << kBits)));
  if (zero == ZeroPoint::kCode) {
    const hn::Rebind<int8_t, LaneTag> d8;
    const hn::RebindToSigned<LaneTag> d32;
    const LaneVec z = hn::ConvertTo(d, hn::PromoteTo(d32, hn::LoadU(d8, reinterpret_cast<const int8_t*>(zero_at) + lane)));
    offset = hn::Neg(hn::MulAdd(z, scale, slope));
  } else {
    offset = hn::Sub(hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(zero_at) + lane)), slope);
  }
}

/// Moves bit kFrom to bit kTo.
template <int kFrom, int kTo>
HWY_INLINE WordVec Move(WordVec v) {
  if constexpr (kFrom < kTo) {
    return hn::ShiftLeft<kTo - kFrom>(v);
  } else if constexpr (kFrom > kTo) {
    return hn::ShiftRight<kFrom - kTo>(v);
  } else {
    return v;
  }
}

/// Words that hold 8 channels of a block: bits from 0 on, `high` only for 3 bits.
template <int kBits, int kFirst>
struct Code8 {
  WordVec low;
  WordVec high;

  template <int kChannel>
  HWY_INLINE LaneVec At() const {
    const LaneTag d;
    const WordTag du;
    constexpr int kAt = kFirst + kChannel;
    if constexpr (kBits == 3) {
      const WordVec f = hn::OrAnd(hn::Set(du, kOne), Move<2 * kAt, 20>(low), hn::Set(du, 3u << 20));
      return hn::BitCast(d, hn::OrAnd(f, Move<kAt, 22>(high), hn::Set(du, 1u << 22)));
    } else {
      return hn::BitCast(d, hn::OrAnd(hn::Set(du, kOne), Move<kBits * kAt, 23 - kBits>(low), hn::Set(du, ((1u << kBits) - 1) << (23 - kBits))));
    }
  }
};

HWY_INLINE LaneVec Scaled(LaneVec f, const float* HWY_RESTRICT table, int32_t at) {
  const LaneTag d;
  return hn::MulAdd(f, hn::Load(d, table + at), hn::Load(d, table + at + kTokenBlock));
}

template <int kBits, int kFirst>
HWY_INLINE void Unpack8(WordVec low, WordVec high, const float* HWY_RESTRICT table, const int32_t* HWY_RESTRICT table_at, LaneVec* x) {
  const Code8<kBits, kFirst> code{low, high};
  x[0] = Scaled(code.template At<0>(), table, table_at[0]);
  x[1] = Scaled(code.template At<1>(), table, table_at[1]);
  x[2] = Scaled(code.template At<2>(), table, table_at[2]);
  x[3] = Scaled(code.template At<3>(), table, table_at[3]);
  x[4] = Scaled(code.template At<4>(), table, table_at[4]);
  x[5] = Scaled(code.template At<5>(), table, table_at[5]);
  x[6] = Scaled(code.template At<6>(), table, table_at[6]);
  x[7] = Scaled(code.template At<7>(), table, table_at[7]);
}

/// Unpacks the 16 channels from `channel` on (a multiple of 16) of a rotation group.
/// @param words of the block, advanced to the wanted lanes; the word of the next channels lies kTokenBlock further
template <int kBits>
HWY_INLINE void Unpack16(const uint32_t* HWY_RESTRICT words, int group_channels, int channel, const float* HWY_RESTRICT table,
                         const int32_t* HWY_RESTRICT table_at, LaneVec* first, LaneVec* second) {
  const WordTag du;
  const int32_t* const at = table_at + channel;
  if constexpr (kBits == 4) {
    const uint32_t* const word = words + channel / 8 * kTokenBlock;
    const WordVec a = hn::Load(du, word);
    const WordVec b = hn::Load(du, word + kTokenBlock);
    Unpack8<4, 0>(a, a, table, at, first);
    Unpack8<4, 0>(b, b, table, at + 8, second);
  } else {
    const WordVec low = hn::Load(du, words + channel / 16 * kTokenBlock);
    WordVec high = low;
    if constexpr (kBits == 3) {
      high = hn::Load(du, words + (group_channels / 16 + channel / 32) * kTokenBlock);
      if ((channel & 16) != 0) high = hn::ShiftRight<16>(high);
    }
    Unpack8<kBits, 0>(low, high, table, at, first);
    Unpack8<kBits, 8>(low, high, table, at + 8, second);
  }
}

HWY_INLINE void Butterfly(LaneVec& a, LaneVec& b) {
  const LaneVec sum = hn::Add(a, b);
  b = hn::Sub(a, b);
  a = sum;
}

template <int kRadix>
HWY_INLINE void Butterflies(LaneVec* x) {
  HWY_UNROLL(8)
  for (int i = 0; i < kRadix; i += 2) Butterfly(x[i], x[i + 1]);
  if constexpr (kRadix >= 4) {
    HWY_UNROLL(4)
    for (int i = 0; i < kRadix; i += 4) {
      Butterfly(x[i], x[i + 2]);
      Butterfly(x[i + 1], x[i + 3]);
    }
  }
  if constexpr (kRadix >= 8) {
    HWY_UNROLL(2)
    for (int i = 0; i < kRadix; i += 8) {
      Butterfly(x[i], x[i + 4]);
      Butterfly(x[i + 1], x[i + 5]);
      Butterfly(x[i + 2], x[i + 6]);
      Butterfly(x[i + 3], x[i + 7]);
    }
  }
  if constexpr (kRadix >= 16) {
    HWY_UNROLL(8)
    for (int i = 0; i < 8; ++i) Butterfly(x[i], x[i + 8]);
  }
}

/// Unpacks a block of a rotation group and transforms each run of kLow channels (half a head): all but the last pass.
/// @param next_words of the block to come, fetched meanwhile  @param keys [group_channels][kLanes]
template <int kBits, int kLow>
HWY_NOINLINE void UnpackAndTransform(const uint32_t* HWY_RESTRICT words, const uint32_t* next_words, int group_channels,
                                     const float* HWY_RESTRICT table, const int32_t* HWY_RESTRICT table_at, float* HWY_RESTRICT keys) {
  const LaneTag d;
  constexpr int kRest = kLow / 8;
  for (int base = 0; base < group_channels; base += kLow) {
    float* const run = keys + base * kLanes;
    for (int c = 0; c < kLow; c += 16) {
      // As many words as 16 channels take, a cache line each; the odd words of 3 bits are left to the processor.
      hwy::Prefetch(next_words + (base + c) / 16 * (kBits == 4 ? 2 : 1) * kTokenBlock);
      if constexpr (kBits == 4) hwy::Prefetch(next_words + ((base + c) / 16 * 2 + 1) * kTokenBlock);
      LaneVec x[16];
      Unpack16<kBits>(words, group_channels, base + c, table, table_at, x, x + 8);
      Butterflies<8>(x);
      Butterflies<8>(x + 8);
      HWY_UNROLL(16)
      for (int i = 0; i < 16; ++i) hn::Store(x[i], d, run + (c + i) * kLanes);
    }
    for (int i = 0; i < 8; ++i) {
      LaneVec x[kRest];
      HWY_UNROLL(16)
      for (int r = 0; r < kRest; ++r) x[r] = hn::Load(d, run + (r * 8 + i) * kLanes);
      Butterflies<kRest>(x);
      HWY_UNROLL(16)
      for (int r = 0; r < kRest; ++r) hn::Store(x[r], d, run + (r * 8 + i) * kLanes);
    }
  }
}

HWY_INLINE void Rope(LaneVec cos, LaneVec sin, LaneVec& a, LaneVec& b) {
  const LaneVec first = hn::NegMulAdd(b, sin, hn::Mul(a, cos));
  b = hn::MulAdd(a, sin, hn::Mul(b, cos));
  a = first;
}

HWY_INLINE void StoreScores(uint16_t mask, int lane, LaneVec score, float* to) {
  const LaneTag d;
  hn::Store(IfAttended(mask, lane, score, hn::Set(d, -std::numeric_limits<float>::infinity())), d, to);
}

/// The last pass of the transform, RoPE and the scores at once. The last pass runs over the half heads, so each of its butterflies
/// gives channels i and i + half of every head: the very pairs that RoPE turns.
/// @param keys [2 * kHeads][half][kLanes]  @param cos, sin, scores advanced to `lane`
template <int kHeads, int kQ>
HWY_NOINLINE void LastPassScores(const float* HWY_RESTRICT keys, int half, const float* HWY_RESTRICT cos, const float* HWY_RESTRICT sin,
                                 const float* HWY_RESTRICT q, int n_q_padded, uint16_t mask, int lane, float* HWY_RESTRICT scores,
                                 int64_t stride) {
  const LaneTag d;
  LaneVec sum[kHeads * kQ];
  HWY_UNROLL(16)
  for (int i = 0; i < kHeads * kQ; ++i) sum[i] = hn::Zero(d);
  for (int i = 0; i < half; ++i) {
    LaneVec x[2 * kHeads];
    HWY_UNROLL(8)
    for (int r = 0; r < 2 * kHeads; ++r) x[r] = hn::Load(d, keys + (r * half + i) * kLanes);
    Butterflies<2 * kHeads>(x);
    const LaneVec c = hn::LoadU(d, cos + i * kTokenBlock);
    const LaneVec s = hn::LoadU(d, sin + i * kTokenBlock);
    const float* const first = q + int64_t{i} * 2 * n_q_padded;
    const float* const second = first + n_q_padded;
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      Rope(c, s, x[2 * h], x[2 * h + 1]);
      HWY_UNROLL(4)
      for (int k = 0; k < kQ; ++k) {
        LaneVec& to = sum[h * kQ + k];
        to = hn::MulAdd(x[2 * h], hn::Set(d, first[h * kQ + k]), to);
        to = hn::MulAdd(x[2 * h + 1], hn::Set(d, second[h * kQ + k]), to);
      }
    }
  }
  HWY_UNROLL(16)
  for (int i = 0; i < kHeads * kQ; ++i) StoreScores(mask, lane, sum[i], scores + i * stride);
}

/// The last pass and RoPE, keys in place: where the query heads are too many for LastPassScores' registers.
template <int kHeads>
HWY_NOINLINE void LastPassRope(float* HWY_RESTRICT keys, int half, const float* HWY_RESTRICT cos, const float* HWY_RESTRICT sin) {
  const LaneTag d;
  for (int i = 0; i < half; ++i) {
    LaneVec x[2 * kHeads];
    HWY_UNROLL(8)
    for (int r = 0; r < 2 * kHeads; ++r) x[r] = hn::Load(d, keys + (r * half + i) * kLanes);
    Butterflies<2 * kHeads>(x);
    const LaneVec c = hn::LoadU(d, cos + i * kTokenBlock);
    const LaneVec s = hn::LoadU(d, sin + i * kTokenBlock);
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) Rope(c, s, x[2 * h], x[2 * h + 1]);
    HWY_UNROLL(8)
    for (int r = 0; r < 2 * kHeads; ++r) hn::Store(x[r], d, keys + (r * half + i) * kLanes);
  }
}

/// RoPE in place over token-lane keys [heads][2][half][16].
HWY_NOINLINE void RopeLanes(float* HWY_RESTRICT keys, int heads, int half, const float* HWY_RESTRICT cos, const float* HWY_RESTRICT sin) {
  const LaneTag d;
  for (int h = 0; h < heads; ++h) {
    float* const a = keys + int64_t{h} * 2 * half * kTokenBlock;
    float* const b = a + int64_t{half} * kTokenBlock;
    for (int i = 0; i < half * kTokenBlock; i += kLanes) {
      LaneVec x = hn::Load(d, a + i);
      LaneVec y = hn::Load(d, b + i);
      Rope(hn::LoadU(d, cos + i), hn::LoadU(d, sin + i), x, y);
      hn::Store(x, d, a + i);
      hn::Store(y, d, b + i);
    }
  }
}

/// Scores of kQ query heads against the finished keys of one head, channels `stride` floats apart.
template <int kQ>
HWY_INLINE void HeadScores(const float* HWY_RESTRICT keys, int channel_stride, int half, const float* HWY_RESTRICT q, int n_q_padded,
                           uint16_t mask, int lane, float* HWY_RESTRICT scores, int64_t stride) {
  const LaneTag d;
  LaneVec first[kQ];
  LaneVec second[kQ];
  for (int k = 0; k < kQ; ++k) first[k] = second[k] = hn::Zero(d);
  const float* const keys2 = keys + int64_t{half} * channel_stride;
  for (int i = 0; i < half; ++i) {
    const LaneVec a = hn::Load(d, keys + i * channel_stride);
    const LaneVec b = hn::Load(d, keys2 + i * channel_stride);
    const float* const q1 = q + int64_t{i} * 2 * n_q_padded;
    HWY_UNROLL(4)
    for (int k = 0; k < kQ; ++k) {
      first[k] = hn::MulAdd(a, hn::Set(d, q1[k]), first[k]);
      second[k] = hn::MulAdd(b, hn::Set(d, q1[n_q_padded + k]), second[k]);
    }
  }
  for (int k = 0; k < kQ; ++k) StoreScores(mask, lane, hn::Add(first[k], second[k]), scores + k * stride);
}

HWY_NOINLINE void AllScores(const RotateDecodeParams& p, const DecodeWork& work, const float* keys, int channel_stride, uint16_t mask,
                            int lane, float* scores, int64_t stride) {
  const int d = p.layer->layout.head_dim;
  for (int h = 0; h < p.layer->layout.heads_per_group; ++h) {
    const float* const head = keys + int64_t{h} * d * channel_stride;
    int done = 0;
    while (done < p.n_q_per_kv) {
      const int at = h * p.n_q_per_kv + done;
      const float* const q = work.turned + at;
      float* const to = scores + at * stride;
      const int left = p.n_q_per_kv - done;
      if (left >= 4) HeadScores<4>(head, channel_stride, d / 2, q, work.n_q_padded, mask, lane, to, stride);
      if (left == 3) HeadScores<3>(head, channel_stride, d / 2, q, work.n_q_padded, mask, lane, to, stride);
      if (left == 2) HeadScores<2>(head, channel_stride, d / 2, q, work.n_q_padded, mask, lane, to, stride);
      if (left == 1) HeadScores<1>(head, channel_stride, d / 2, q, work.n_q_padded, mask, lane, to, stride);
      done += std::min(left, 4);
    }
  }
}

template <int kBits>
HWY_INLINE void FillTable(const RotatePageLayout& l, const std::byte* page, int block, float* table) {
  const LaneTag d;
  const int groups = l.n_quant_groups();
  for (int g = 0; g < groups; ++g) {
    const int64_t at = (int64_t{block} * groups + g) * kTokenBlock;
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      LaneVec slope;
      LaneVec offset;
      SlopeOffset<kBits>(l.zero, page + l.key_scale_offset() + at * 2, page + l.key_zero_offset() + at * l.zero_bytes(), lane, slope, offset);
      hn::Store(slope, d, table + g * kTableRow + lane);
      hn::Store(offset, d, table + g * kTableRow + kTokenBlock + lane);
    }
  }
}

HWY_INLINE const uint32_t* BlockWords(const RotatePageLayout& l, const std::byte* page, int group, int block) {
  return reinterpret_cast<const uint32_t*>(page) + (int64_t{group} * l.blocks_per_page + block) * l.key_words() * kTokenBlock;
}

HWY_INLINE void PrefetchBytes(const std::byte* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) hwy::Prefetch(at + i);
}

/// Asks for the scales and zeros of a block, of keys or of values. Codes, scales and zeros lie in places of their own and pages
/// anywhere: the processor's own prefetcher begins anew with each of them.
HWY_INLINE void PrefetchScales(const RotatePageLayout& l, const std::byte* page, int64_t scales, int64_t zeros, int block) {
  const int64_t meta = int64_t{block} * l.n_quant_groups() * kTokenBlock;
  PrefetchBytes(page + scales + meta * 2, int64_t{l.n_quant_groups()} * kTokenBlock * 2);
  PrefetchBytes(page + zeros + meta * l.zero_bytes(), int64_t{l.n_quant_groups()} * kTokenBlock * l.zero_bytes());
}

/// Asks for a share of the first KiB of each head's values in a page, so that a page's blocks ask for all of it between them; the
/// processor finds the rest of the run by itself. In shares because a core waits once it has asked for some 16 lines.
HWY_INLINE void PrefetchValues(const RotatePageLayout& l, const std::byte* page, int group, int block) {
  const int64_t head_bytes = l.page_tokens() * l.value_row_bytes();
  const int64_t share = std::min<int64_t>(1024, head_bytes) / l.blocks_per_page;
  for (int h = 0; h < l.heads_per_group; ++h) {
    const int64_t head = int64_t{group} * l.heads_per_group + h;
    PrefetchBytes(page + l.value_codes_offset() + head * head_bytes + block * share, share);
  }
  PrefetchScales(l, page, l.value_scale_offset(), l.value_zero_offset(), block);
}

/// Whether the transform ends in a pass over half heads.
HWY_INLINE bool Fused(const RotateLayer& layer) {
  const RotatePageLayout& l = layer.layout;
  const bool head = l.head_dim == 64 || l.head_dim == 128 || l.head_dim == 256;
  const bool heads = l.heads_per_group == 1 || l.heads_per_group == 2 || l.heads_per_group == 4;
  return head && heads && layer.key_hadamard.m == 1 && layer.key_hadamard.blocks == 1;
}

/// Keys of a block: unpacked, rotated back, not yet with RoPE: [group_channels][16].
template <int kBits>
void UnpackKeys(const RotateLayer& layer, const uint32_t* words, const float* table, const int32_t* table_at, float* keys) {
  const LaneTag d;
  const int n = layer.layout.group_channels();
  for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
    for (int c = 0; c < n; c += 16) {
      LaneVec x[16];
      Unpack16<kBits>(words + lane, n, c, table + lane, table_at, x, x + 8);
      for (int i = 0; i < 16; ++i) hn::Store(x[i], d, keys + int64_t{c + i} * kTokenBlock + lane);
    }
  }
  kernels::hadamard_lanes(layer.key_hadamard, true, keys);
}

template <int kHeads>
HWY_INLINE bool FusedScores(int n_q_per_kv, const float* keys, int half, const float* cos, const float* sin, const float* q,
                            int n_q_padded, uint16_t mask, int lane, float* scores, int64_t stride) {
  // The sums of all query heads must fit the registers beside one butterfly.
  if constexpr (kLanes < 16 && kHeads > 1) return false;
  switch (n_q_per_kv) {
    case 1: LastPassScores<kHeads, 1>(keys, half, cos, sin, q, n_q_padded, mask, lane, scores, stride); return true;
    case 2: LastPassScores<kHeads, 2>(keys, half, cos, sin, q, n_q_padded, mask, lane, scores, stride); return true;
    case 3: LastPassScores<kHeads, 3>(keys, half, cos, sin, q, n_q_padded, mask, lane, scores, stride); return true;
    case 4: LastPassScores<kHeads, 4>(keys, half, cos, sin, q, n_q_padded, mask, lane, scores, stride); return true;
    default: return false;
  }
}

/// Scores of one block into work.scores.
/// @param next_words of the block after it, fetched meanwhile
template <int kBits>
void BlockScores(const RotateDecodeParams& p, const DecodeWork& work, bool fused, const std::byte* page, int block, uint16_t mask,
                 const uint32_t* next_words) {
  const RotateLayer& layer = *p.layer;
  const RotatePageLayout& l = layer.layout;
  const int half = l.head_dim / 2;
  const int n = l.group_channels();
  const int64_t stride = l.page_tokens();
  const uint32_t* const words = BlockWords(l, page, p.rotation_group, block);
  const float* const cos = p.token_cos + int64_t{block} * half * kTokenBlock;
  const float* const sin = p.token_sin + int64_t{block} * half * kTokenBlock;
  float* const scores = work.scores + int64_t{block} * kTokenBlock;
  FillTable<kBits>(l, page, block, work.table);
  if (!fused) {
    UnpackKeys<kBits>(layer, words, work.table, work.table_at, work.keys);
    RopeLanes(work.keys, l.heads_per_group, half, cos, sin);
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      AllScores(p, work, work.keys + lane, kTokenBlock, mask, lane, scores + lane, stride);
    }
    return;
  }
  for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
    const float* const table = work.table + lane;
    switch (l.head_dim) {
      case 64: UnpackAndTransform<kBits, 32>(words + lane, next_words, n, table, work.table_at, work.keys); break;
      case 128: UnpackAndTransform<kBits, 64>(words + lane, next_words, n, table, work.table_at, work.keys); break;
      default: UnpackAndTransform<kBits, 128>(words + lane, next_words, n, table, work.table_at, work.keys); break;
    }
    bool done = false;
    switch (l.heads_per_group) {
      case 1:
        done = FusedScores<1>(p.n_q_per_kv, work.keys, half, cos + lane, sin + lane, work.turned, work.n_q_padded, mask, lane, scores + lane, stride);
        if (!done) LastPassRope<1>(work.keys, half, cos + lane, sin + lane);
        break;
      case 2:
        done = FusedScores<2>(p.n_q_per_kv, work.keys, half, cos + lane, sin + lane, work.turned, work.n_q_padded, mask, lane, scores + lane, stride);
        if (!done) LastPassRope<2>(work.keys, half, cos + lane, sin + lane);
        break;
      default:
        done = FusedScores<4>(p.n_q_per_kv, work.keys, half, cos + lane, sin + lane, work.turned, work.n_q_padded, mask, lane, scores + lane, stride);
        if (!done) LastPassRope<4>(work.keys, half, cos + lane, sin + lane);
        break;
    }
    if (!done) AllScores(p, work, work.keys, kLanes, mask, lane, scores + lane, stride);
  }
}

/// v rotated right by the bits of each lane, 0 .. 31.
HWY_INLINE WordVec RotateLanes(WordVec v, WordVec right, WordVec left) {
#if HWY_TARGET == HWY_AVX3
  (void)left;
  return WordVec{_mm512_rorv_epi32(v.raw, right.raw)};
#else
  return hn::Or(hn::Shr(v, right), hn::Shl(v, left));
#endif
}

/// Turns the codes of 16 value channels into floats 1 + code / 2^bits, one channel per lane.
template <int kBits>
class ValueCodes {
 public:
  explicit HWY_INLINE ValueCodes(int lane) : lane_(lane) {
    const WordTag du;
    HWY_ALIGN uint32_t low[kTokenBlock];
    HWY_ALIGN uint32_t high[kTokenBlock];
    for (int j = 0; j < kTokenBlock; ++j) {
      low[j] = static_cast<uint32_t>((kBits == 4 ? 4 * (j / 2) : 2 * j) + 32 - (23 - kBits)) & 31u;
      high[j] = static_cast<uint32_t>(j + 32 - 22) & 31u;
    }
    const WordVec bits = hn::Set(du, 31);
    low_ = hn::Load(du, low + lane);
    low_left_ = hn::And(hn::Sub(hn::Zero(du), low_), bits);
    high_ = hn::Load(du, high + lane);
    high_left_ = hn::And(hn::Sub(hn::Zero(du), high_), bits);
  }

  /// @param row of one token and head  @param unit of 16 channels
  HWY_INLINE LaneVec At(const std::byte* row, int unit, int units) const {
    const LaneTag d;
    const WordTag du;
    const WordVec one = hn::Set(du, kOne);
    if constexpr (kBits == 4) {
      return hn::BitCast(d, hn::OrAnd(one, RotateLanes(Pair(row + unit * 8), low_, low_left_), hn::Set(du, 15u << 19)));
    } else {
      uint32_t word;
      std::memcpy(&word, row + unit * 4, 4);
      const WordVec low = RotateLanes(hn::Set(du, word), low_, low_left_);
      if constexpr (kBits == 2) return hn::BitCast(d, hn::OrAnd(one, low, hn::Set(du, 3u << 21)));
      uint16_t bits;
      std::memcpy(&bits, row + units * 4 + unit * 2, 2);
      const WordVec high = RotateLanes(hn::Set(du, bits), high_, high_left_);
      return hn::BitCast(d, hn::OrAnd(hn::OrAnd(one, low, hn::Set(du, 3u << 20)), high, hn::Set(du, 1u << 22)));
    }
  }

 private:
  /// Even lanes the first word, odd lanes the second.
  HWY_INLINE WordVec Pair(const std::byte* at) const {
    const WordTag du;
    if constexpr (kLanes == 1) {
      uint32_t word;
      std::memcpy(&word, at + lane_ % 2 * 4, 4);
      return hn::Set(du, word);
    } else {
      const hn::Repartition<uint64_t, WordTag> d64;
      uint64_t words;
      std::memcpy(&words, at, 8);
      return hn::BitCast(du, hn::Set(d64, words));
    }
  }

  int lane_;
  WordVec low_;
  WordVec low_left_;
  WordVec high_;
  WordVec high_left_;
};

/// acc += weights * f for kUnits units of 16 channels of kQ query heads, over the page's attended blocks.
/// @param weights [kQ][page_tokens], 0 for tokens left out
template <int kBits, int kQ, int kUnits>
HWY_NOINLINE void AddValues(const RotatePageLayout& l, const std::byte* values, const uint16_t* masks, int unit, int lane,
                            const float* HWY_RESTRICT weights, float* HWY_RESTRICT acc) {
  const LaneTag d;
  const int units = l.head_dim / 16;
  const int64_t row_bytes = l.value_row_bytes();
  const int64_t tokens = l.page_tokens();
  const ValueCodes<kBits> codes(lane);
  LaneVec sum[kQ * kUnits];
  HWY_UNROLL(4)
  for (int k = 0; k < kQ; ++k) {
    HWY_UNROLL(4)
    for (int u = 0; u < kUnits; ++u) sum[k * kUnits + u] = hn::LoadU(d, acc + k * l.head_dim + (unit + u) * 16 + lane);
  }
  for (int block = 0; block < l.blocks_per_page; ++block) {
    if (masks[block] == 0) continue;
    const std::byte* row = values + int64_t{block} * kTokenBlock * row_bytes;
    const float* const weight_at = weights + block * kTokenBlock;
    for (int t = 0; t < kTokenBlock; ++t, row += row_bytes) {
      LaneVec weight[kQ];
      HWY_UNROLL(4)
      for (int k = 0; k < kQ; ++k) weight[k] = hn::Set(d, weight_at[k * tokens + t]);
      HWY_UNROLL(4)
      for (int u = 0; u < kUnits; ++u) {
        const LaneVec f = codes.At(row, unit + u, units);
        HWY_UNROLL(4)
        for (int k = 0; k < kQ; ++k) sum[k * kUnits + u] = hn::MulAdd(f, weight[k], sum[k * kUnits + u]);
      }
    }
  }
  HWY_UNROLL(4)
  for (int k = 0; k < kQ; ++k) {
    HWY_UNROLL(4)
    for (int u = 0; u < kUnits; ++u) hn::StoreU(sum[k * kUnits + u], d, acc + k * l.head_dim + (unit + u) * 16 + lane);
  }
}

/// The values of one page for kQ query heads of one kv head.
/// @param scores [kQ][page_tokens] softmax weights, 0 for tokens left out  @param scratch [kQ][page_tokens]
template <int kBits, int kQ>
void PageValues(const RotatePageLayout& l, const std::byte* page, const uint16_t* masks, int head, const float* HWY_RESTRICT scores,
                float* HWY_RESTRICT scratch, float* HWY_RESTRICT acc) {
  const LaneTag d;
  const int groups = l.n_quant_groups();
  const int64_t tokens = l.page_tokens();
  const std::byte* const values = page + l.value_codes_offset() + head * tokens * l.value_row_bytes();
  constexpr int kUnits = kLanes == 16 ? 4 : 1;
  int channel = 0;
  while (channel < l.head_dim) {
    // The channels of this head that share a group.
    const int group = (head * l.head_dim + channel) / l.group_size;
    const int end = std::min(l.head_dim, (group + 1) * l.group_size - head * l.head_dim);
    LaneVec constant[kQ];
    for (int k = 0; k < kQ; ++k) constant[k] = hn::Zero(d);
    for (int block = 0; block < l.blocks_per_page; ++block) {
      if (masks[block] == 0) continue;
      const int64_t at = (int64_t{block} * groups + group) * kTokenBlock;
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
        LaneVec slope;
        LaneVec offset;
        SlopeOffset<kBits>(l.zero, page + l.value_scale_offset() + at * 2, page + l.value_zero_offset() + at * l.zero_bytes(), lane, slope, offset);
        // The scales of tokens that were never stored may be anything, and 0 * NaN is not 0.
        slope = IfAttended(masks[block], lane, slope, hn::Zero(d));
        offset = IfAttended(masks[block], lane, offset, hn::Zero(d));
        for (int k = 0; k < kQ; ++k) {
          const int64_t token = k * tokens + block * kTokenBlock + lane;
          const LaneVec weight = hn::Load(d, scores + token);
          hn::Store(hn::Mul(weight, slope), d, scratch + token);
          constant[k] = hn::MulAdd(weight, offset, constant[k]);
        }
      }
    }
    for (int k = 0; k < kQ; ++k) {
      const LaneVec add = hn::Set(d, hn::GetLane(hn::SumOfLanes(d, constant[k])));
      float* const to = acc + k * l.head_dim;
      for (int c = channel; c < end; c += kLanes) hn::StoreU(hn::Add(hn::LoadU(d, to + c), add), d, to + c);
    }
    int unit = channel / 16;
    for (; unit + kUnits <= end / 16; unit += kUnits) {
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) AddValues<kBits, kQ, kUnits>(l, values, masks, unit, lane, scratch, acc);
    }
    for (; unit < end / 16; ++unit) {
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) AddValues<kBits, kQ, 1>(l, values, masks, unit, lane, scratch, acc);
    }
    channel = end;
  }
}

template <int kBits>
void Decode(const RotateDecodeParams& p) {
  const LaneTag d;
  const RotateLayer& layer = *p.layer;
  const RotatePageLayout& l = layer.layout;
  const int head_dim = l.head_dim;
  const int half = head_dim / 2;
  const int n = l.group_channels();
  const int n_q = l.heads_per_group * p.n_q_per_kv;
  const int64_t tokens = l.page_tokens();
  const bool fused = Fused(layer);

  static thread_local kernels::Scratch scratch;
  DecodeWork work;
  work.n_q_padded = static_cast<int>(kernels::whole_lines(n_q));
  const size_t q_floats = size_t{2} * half * work.n_q_padded;
  const size_t table_floats = size_t{static_cast<size_t>(l.n_quant_groups())} * kTableRow;
  const size_t sizes[] = {kernels::whole_lines(n), table_floats, q_floats, q_floats, static_cast<size_t>(n) * kTokenBlock,
                          static_cast<size_t>(n_q * tokens), static_cast<size_t>(4 * tokens)};
  size_t total = 0;
  for (const size_t size : sizes) total += size;
  float* at = scratch.floats(total);
  work.table_at = reinterpret_cast<int32_t*>(at);
  work.table = at += sizes[0];
  work.q = at += sizes[1];
  work.turned = at += sizes[2];
  work.keys = at += sizes[3];
  work.scores = at += sizes[4];
  work.weights = at += sizes[5];

  for (int c = 0; c < n; ++c) work.table_at[c] = layer.key_group[p.rotation_group * n + c] * kTableRow;
  // The fused transform leaves its normalization to the queries.
  const float scale = fused ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(n))) : 1.0F;
  for (int i = 0; i < half; ++i) {
    float* const first = work.q + int64_t{i} * 2 * work.n_q_padded;
    float* const second = first + work.n_q_padded;
    for (int h = 0; h < work.n_q_padded; ++h) {
      first[h] = h < n_q ? scale * p.q[int64_t{h} * head_dim + i] : 0.0F;
      second[h] = h < n_q ? scale * p.q[int64_t{h} * head_dim + half + i] : 0.0F;
    }
  }

  const LaneVec none = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int index = 0; index < p.run.n_pages; ++index) {
    const uint16_t* const masks = p.run.masks + int64_t{index} * l.blocks_per_page;
    uint32_t any = 0;
    for (int block = 0; block < l.blocks_per_page; ++block) any |= masks[block];
    if (any == 0) continue;
    const std::byte* const page = p.run.pages[index];

    // Score of R_base R_j k and q: q is turned back by R_base once, k forward by R_j.
    for (int i = 0; i < half; ++i) {
      const LaneVec cos = hn::Set(d, p.page_cos[int64_t{index} * half + i]);
      const LaneVec sin = hn::Set(d, p.page_sin[int64_t{index} * half + i]);
      const int64_t row = int64_t{i} * 2 * work.n_q_padded;
      for (int h = 0; h < work.n_q_padded; h += kLanes) {
        const LaneVec a = hn::Load(d, work.q + row + h);
        const LaneVec b = hn::Load(d, work.q + row + work.n_q_padded + h);
        hn::Store(hn::MulAdd(b, sin, hn::Mul(a, cos)), d, work.turned + row + h);
        hn::Store(hn::NegMulAdd(a, sin, hn::Mul(b, cos)), d, work.turned + row + work.n_q_padded + h);
      }
    }
    for (int block = 0; block < l.blocks_per_page; ++block) {
      if (masks[block] != 0) {
        PrefetchValues(l, page, p.rotation_group, block);
        // The block after this one, in this page or the next, or once more this one.
        const bool last = block + 1 == l.blocks_per_page;
        const bool more = (!last || index + 1 < p.run.n_pages) && masks[block + 1] != 0;
        const std::byte* const next_page = more && last ? p.run.pages[index + 1] : page;
        const int next = !more ? block : last ? 0 : block + 1;
        PrefetchScales(l, next_page, l.key_scale_offset(), l.key_zero_offset(), next);
        BlockScores<kBits>(p, work, fused, page, block, masks[block], BlockWords(l, next_page, p.rotation_group, next));
        continue;
      }
      for (int h = 0; h < n_q; ++h) {
        float* const to = work.scores + h * tokens + block * kTokenBlock;
        for (int lane = 0; lane < kTokenBlock; lane += kLanes) hn::Store(none, d, to + lane);
      }
    }
    for (int h = 0; h < n_q; ++h) {
      SoftmaxStep(work.scores + h * tokens, static_cast<int>(tokens), p.state.max + h, p.state.sum + h, p.state.acc + int64_t{h} * head_dim,
                  head_dim);
    }
    for (int h = 0; h < l.heads_per_group; ++h) {
      const int head = p.rotation_group * l.heads_per_group + h;
      int done = 0;
      while (done < p.n_q_per_kv) {
        const int64_t first = int64_t{h} * p.n_q_per_kv + done;
        const float* const scores = work.scores + first * tokens;
        float* const acc = p.state.acc + first * head_dim;
        const int left = p.n_q_per_kv - done;
        if (left >= 4) PageValues<kBits, 4>(l, page, masks, head, scores, work.weights, acc);
        if (left == 3) PageValues<kBits, 3>(l, page, masks, head, scores, work.weights, acc);
        if (left == 2) PageValues<kBits, 2>(l, page, masks, head, scores, work.weights, acc);
        if (left == 1) PageValues<kBits, 1>(l, page, masks, head, scores, work.weights, acc);
        done += std::min(left, 4);
      }
    }
  }
}

void RotateDecode(const RotateDecodeParams& p) {
  switch (p.layer->layout.bits) {
    case 2: return Decode<2>(p);
    case 3: return Decode<3>(p);
    default: return Decode<4>(p);
  }
}

template <int kBits>
void Load(const RotateLoadParams& p) {
  const LaneTag d;
  const RotateLayer& layer = *p.layer;
  const RotatePageLayout& l = layer.layout;
  const int n = l.group_channels();
  const int head_dim = l.head_dim;
  const int half = head_dim / 2;
  static thread_local kernels::Scratch scratch;
  const size_t table_floats = static_cast<size_t>(l.n_quant_groups()) * kTableRow;
  float* at = scratch.floats(kernels::whole_lines(n) + table_floats + static_cast<size_t>(n) * kTokenBlock);
  auto* const table_at = reinterpret_cast<int32_t*>(at);
  float* const table = at + kernels::whole_lines(n);
  float* const keys = table + table_floats;
  for (int c = 0; c < n; ++c) table_at[c] = layer.key_group[p.rotation_group * n + c] * kTableRow;
  FillTable<kBits>(l, p.page, p.block, table);
  UnpackKeys<kBits>(layer, BlockWords(l, p.page, p.rotation_group, p.block), table, table_at, keys);
  for (int h = 0; h < l.heads_per_group; ++h) {
    for (int i = 0; i < half; ++i) {
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
        LaneVec a = hn::Load(d, keys + (int64_t{h} * head_dim + i) * kTokenBlock + lane);
        LaneVec b = hn::Load(d, keys + (int64_t{h} * head_dim + half + i) * kTokenBlock + lane);
        Rope(hn::LoadU(d, p.cos + i * kTokenBlock + lane), hn::LoadU(d, p.sin + i * kTokenBlock + lane), a, b);
        hn::StoreU(a, d, p.key_out + (int64_t{h} * head_dim + i) * p.out_stride + lane);
        hn::StoreU(b, d, p.key_out + (int64_t{h} * head_dim + half + i) * p.out_stride + lane);
      }
    }
    const int head = p.rotation_group * l.heads_per_group + h;
    const std::byte* const rows =
        p.page + l.value_codes_offset() + (head * l.page_tokens() + int64_t{p.block} * kTokenBlock) * l.value_row_bytes();
    float* const out = p.value_out + h * p.value_head_stride;
    for (int unit = 0; unit < head_dim / 16; ++unit) {
      const int64_t meta = (int64_t{p.block} * l.n_quant_groups() + (head * head_dim + unit * 16) / l.group_size) * kTokenBlock;
      HWY_ALIGN float slopes[kTokenBlock];
      HWY_ALIGN float offsets[kTokenBlock];
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
        LaneVec slope;
        LaneVec offset;
        SlopeOffset<kBits>(l.zero, p.page + l.value_scale_offset() + meta * 2, p.page + l.value_zero_offset() + meta * l.zero_bytes(), lane,
                           slope, offset);
        hn::Store(slope, d, slopes + lane);
        hn::Store(offset, d, offsets + lane);
      }
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
        const ValueCodes<kBits> codes(lane);
        for (int t = 0; t < kTokenBlock; ++t) {
          const LaneVec f = codes.At(rows + int64_t{t} * l.value_row_bytes(), unit, head_dim / 16);
          hn::StoreU(hn::MulAdd(f, hn::Set(d, slopes[t]), hn::Set(d, offsets[t])), d, out + int64_t{t} * head_dim + unit * 16 + lane);
        }
      }
    }
  }
}

void RotateLoad(const RotateLoadParams& p) {
  switch (p.layer->layout.bits) {
    case 2: return Load<2>(p);
    case 3: return Load<3>(p);
    default: return Load<4>(p);
  }
}

// ---- store -----------------------------------------------------------------------------------------------------------------------

/// What quantizes the members of one group: code = round(clamp((x - minus) / by, -plus, max_code - plus)) + plus.
struct GroupCode {
  float minus;
  float by;
  float plus;
};

/// Scale and zero point of one group of one token from its extremes; writes them. @return false if fp16 cannot hold them
HWY_INLINE bool GroupScale(const RotatePageLayout& l, float clip, float top, float bottom, std::byte* scale_at, std::byte* zero_at,
                           GroupCode& code) {
  const auto finite = [](uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; };
  const bool by_code = l.zero == ZeroPoint::kCode;
  uint16_t scale = 0;
  uint16_t minimum = 0;
  float zero = 0;
  bool good = true;
  if (top == bottom) {
    // Dividing by infinity sends every member to the one code wanted.
    (by_code ? scale : minimum) = to_half(top).bits;
    good = finite(scale) && finite(minimum);
    code = {to_float(Half{minimum}), std::numeric_limits<float>::infinity(), by_code ? 1.0F : 0.0F};
  } else {
    const float hi = clip * top;
    const float lo = clip * bottom;
    scale = to_half((hi - lo) / static_cast<float>((1 << l.bits) - 1)).bits;
    if (scale == 0) scale = 1;
    if (by_code) {
      zero = std::nearbyint(-lo / to_float(Half{scale}));
      if (std::fabs(zero) > 127.0F) {
        scale = std::max(scale, to_half(std::fabs(lo) / 127.0F).bits);
        zero = std::nearbyint(-lo / to_float(Half{scale}));
        if (std::fabs(zero) > 127.0F && finite(scale)) {
          ++scale;
          zero = std::nearbyint(-lo / to_float(Half{scale}));
        }
      }
      good = finite(scale);
      if (!good) zero = 0;
    } else {
      minimum = to_half(lo).bits;
      good = finite(scale) && finite(minimum);
    }
    code = {to_float(Half{minimum}), to_float(Half{scale}), zero};
  }
  std::memcpy(scale_at, &scale, 2);
  if (by_code) {
    const auto z = static_cast<int8_t>(zero);
    std::memcpy(zero_at, &z, 1);
  } else {
    std::memcpy(zero_at, &minimum, 2);
  }
  return good;
}

HWY_INLINE WordVec QuantizeLanes(LaneVec x, LaneVec minus, LaneVec by, LaneVec plus, LaneVec max_code) {
  const WordTag du;
  const hn::RebindToSigned<LaneTag> di;
  const LaneVec level = hn::Div(hn::Sub(x, minus), by);
  const LaneVec clamped = hn::Min(hn::Max(level, hn::Neg(plus)), hn::Sub(max_code, plus));
  (void)di;
  return hn::BitCast(du, hn::Add(hn::NearestInt(clamped), hn::NearestInt(plus)));
}

/// Where the code of channel j of 16 goes in a key's or value's words: shift, and for 4 bits which of the two words.
struct PackTables {
  HWY_ALIGN uint32_t shift[kTokenBlock];
  HWY_ALIGN uint32_t high_shift[kTokenBlock];
  HWY_ALIGN uint32_t first[kTokenBlock];  ///< all ones where the code goes to the first word
};

template <int kBits>
PackTables MakePackTables(bool key) {
  PackTables t{};
  for (uint32_t j = 0; j < kTokenBlock; ++j) {
    t.shift[j] = kBits != 4 ? 2 * j : key ? 4 * (j % 8) : 4 * (j / 2);
    t.high_shift[j] = j;
    t.first[j] = (kBits != 4 || (key ? j < 8 : j % 2 == 0)) ? ~0u : 0u;
  }
  return t;
}

/// The words of 16 codes: `low` (and `second` for 4 bits), `high` the 16 high bits for 3.
template <int kBits>
struct Packer {
  WordVec low;
  WordVec other;

  HWY_INLINE Packer() : low(hn::Zero(WordTag())), other(hn::Zero(WordTag())) {}

  HWY_INLINE void Add(const PackTables& tables, int lane, WordVec code) {
    const WordTag du;
    if constexpr (kBits == 3) {
      low = hn::Or(low, hn::Shl(hn::And(code, hn::Set(du, 3u)), hn::Load(du, tables.shift + lane)));
      other = hn::Or(other, hn::Shl(hn::ShiftRight<2>(code), hn::Load(du, tables.high_shift + lane)));
    } else {
      const WordVec moved = hn::Shl(code, hn::Load(du, tables.shift + lane));
      if constexpr (kBits == 2) {
        low = hn::Or(low, moved);
      } else {
        const WordVec first = hn::Load(du, tables.first + lane);
        low = hn::Or(low, hn::And(moved, first));
        other = hn::Or(other, hn::AndNot(first, moved));
      }
    }
  }

  /// The lanes hold different bits, so that their sum is their union.
  static HWY_INLINE uint32_t Union(WordVec v) {
    const WordTag du;
    return hn::GetLane(hn::SumOfLanes(du, v));
  }
};

template <int kBits>
bool StoreToken(const RotateStoreParams& p, int index, float* scratch) {
  const LaneTag d;
  const RotateLayer& layer = *p.layer;
  const RotatePageLayout& l = layer.layout;
  const int groups = l.n_quant_groups();
  const int channels = l.kv_channels();
  const int lane_in_block = p.first + index;
  const int64_t meta = int64_t{p.block} * groups * kTokenBlock + lane_in_block;
  const float* const key = p.key + index * p.row_stride;
  const float* const value = p.value + index * p.row_stride;
  const LaneVec max_code = hn::Set(d, static_cast<float>((1 << kBits) - 1));

  LaneVec check = hn::Zero(d);
  for (int c = 0; c < channels; c += kLanes) {
    check = hn::MulAdd(hn::LoadU(d, key + c), hn::Zero(d), check);
    check = hn::MulAdd(hn::LoadU(d, value + c), hn::Zero(d), check);
  }
  bool good = hn::AllTrue(d, hn::Eq(check, hn::Zero(d)));  // NaN and infinity times 0 are NaN
  if (!good) return false;

  // Keys: the members of a group lie anywhere. Four sets of extremes, so that neighbours in one group do not wait for each other.
  constexpr int kSets = 4;
  float* const top = scratch;
  float* const bottom = top + kSets * groups;
  float* const minus = bottom + kSets * groups;
  float* const by = minus + groups;
  float* const plus = by + groups;
  std::fill_n(top, kSets * groups, -std::numeric_limits<float>::infinity());
  std::fill_n(bottom, kSets * groups, std::numeric_limits<float>::infinity());
  for (int c = 0; c < channels; c += kSets) {
    for (int set = 0; set < kSets; ++set) {
      const int at = layer.key_group[c + set] * kSets + set;
      const float x = key[c + set];
      top[at] = x > top[at] ? x : top[at];
      bottom[at] = x < bottom[at] ? x : bottom[at];
    }
  }
  for (int g = 0; g < groups; ++g) {
    float hi = top[g * kSets];
    float lo = bottom[g * kSets];
    for (int set = 1; set < kSets; ++set) {
      hi = std::max(hi, top[g * kSets + set]);
      lo = std::min(lo, bottom[g * kSets + set]);
    }
    GroupCode code;
    const int64_t at = meta + int64_t{g} * kTokenBlock;
    good &= GroupScale(l, layer.key_clip, hi, lo, p.page + l.key_scale_offset() + at * 2, p.page + l.key_zero_offset() + at * l.zero_bytes(), code);
    minus[g] = code.minus;
    by[g] = code.by;
    plus[g] = code.plus;
  }
  const hn::RebindToSigned<LaneTag> di;
  const hn::Rebind<uint16_t, LaneTag> d16;
  const PackTables key_tables = MakePackTables<kBits>(true);
  const int n = l.group_channels();
  for (int group = 0; group < l.n_rotation_groups(); ++group) {
    uint32_t* const words =
        reinterpret_cast<uint32_t*>(p.page) + (int64_t{group} * l.blocks_per_page + p.block) * l.key_words() * kTokenBlock + lane_in_block;
    uint32_t high = 0;
    for (int c = 0; c < n; c += 16) {
      Packer<kBits> packer;
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
        const int at = group * n + c + lane;
        const auto of = hn::BitCast(di, hn::PromoteTo(WordTag(), hn::LoadU(d16, layer.key_group + at)));
        const LaneVec m = l.zero == ZeroPoint::kMinimum ? hn::GatherIndex(d, minus, of) : hn::Zero(d);
        const LaneVec z = l.zero == ZeroPoint::kCode ? hn::GatherIndex(d, plus, of) : hn::Zero(d);
        packer.Add(key_tables, lane, QuantizeLanes(hn::LoadU(d, key + at), m, hn::GatherIndex(d, by, of), z, max_code));
      }
      if constexpr (kBits == 4) {
        words[c / 8 * kTokenBlock] = packer.Union(packer.low);
        words[(c / 8 + 1) * kTokenBlock] = packer.Union(packer.other);
      } else {
        words[c / 16 * kTokenBlock] = packer.Union(packer.low);
        if constexpr (kBits == 3) {
          high = c % 32 == 0 ? packer.Union(packer.other) : high | packer.Union(packer.other) << 16;
          words[(n / 16 + c / 32) * kTokenBlock] = high;
        }
      }
    }
  }

  // Values: groups are runs of channels.
  const PackTables value_tables = MakePackTables<kBits>(false);
  const int64_t token = int64_t{p.block} * kTokenBlock + lane_in_block;
  for (int g = 0; g < groups; ++g) {
    const float* const x = value + g * l.group_size;
    LaneVec hi = hn::LoadU(d, x);
    LaneVec lo = hi;
    for (int c = kLanes; c < l.group_size; c += kLanes) {
      hi = hn::Max(hi, hn::LoadU(d, x + c));
      lo = hn::Min(lo, hn::LoadU(d, x + c));
    }
    GroupCode code;
    const int64_t at = meta + int64_t{g} * kTokenBlock;
    good &= GroupScale(l, layer.value_clip, hn::GetLane(hn::MaxOfLanes(d, hi)), hn::GetLane(hn::MinOfLanes(d, lo)),
                       p.page + l.value_scale_offset() + at * 2, p.page + l.value_zero_offset() + at * l.zero_bytes(), code);
    const LaneVec m = hn::Set(d, code.minus);
    const LaneVec b = hn::Set(d, code.by);
    const LaneVec z = hn::Set(d, code.plus);
    for (int c = 0; c < l.group_size; c += 16) {
      Packer<kBits> packer;
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
        packer.Add(value_tables, lane, QuantizeLanes(hn::LoadU(d, x + c + lane), m, b, z, max_code));
      }
      const int channel = g * l.group_size + c;
      const int unit = channel % l.head_dim / 16;
      std::byte* const row = p.page + l.value_codes_offset() + (channel / l.head_dim * l.page_tokens() + token) * l.value_row_bytes();
      const uint32_t low = packer.Union(packer.low);
      if constexpr (kBits == 4) {
        const uint32_t second = packer.Union(packer.other);
        std::memcpy(row + unit * 8, &low, 4);
        std::memcpy(row + unit * 8 + 4, &second, 4);
      } else {
        std::memcpy(row + unit * 4, &low, 4);
        if constexpr (kBits == 3) {
          const auto bits = static_cast<uint16_t>(packer.Union(packer.other));
          std::memcpy(row + l.head_dim / 16 * 4 + unit * 2, &bits, 2);
        }
      }
    }
  }
  return good;
}

bool RotateStore(const RotateStoreParams& p) {
  static thread_local kernels::Scratch scratch;
  float* const work = scratch.floats(static_cast<size_t>(p.layer->layout.n_quant_groups()) * 11);
  for (int i = 0; i < p.n_tokens; ++i) {
    bool good = false;
    switch (p.layer->layout.bits) {
      case 2: good = StoreToken<2>(p, i, work); break;
      case 3: good = StoreToken<3>(p, i, work); break;
      default: good = StoreToken<4>(p, i, work); break;
    }
    if (!good) return false;
  }
  return true;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kv::rotate
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace rotunda::kv::rotate {

HWY_EXPORT(RotateStore);
HWY_EXPORT(RotateDecode);
HWY_EXPORT(RotateLoad);

bool rotate_store(const RotateStoreParams& params) { return HWY_DYNAMIC_DISPATCH(RotateStore)(params); }
void rotate_decode(const RotateDecodeParams& params) { HWY_DYNAMIC_DISPATCH(RotateDecode)(params); }
void rotate_load(const RotateLoadParams& params) { HWY_DYNAMIC_DISPATCH(RotateLoad)(params); }

}  // namespace rotunda::kv::rotate
#endif  // HWY_ONCE
