#include "kernels/simd_targets_dot.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kv/grouped/kernels/grouped_decode_cpu.cc"
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
#include "kv/grouped/kernels/grouped_codec.h"

#ifndef ROTUNDA_GROUPED_DECODE_ONCE
#define ROTUNDA_GROUPED_DECODE_ONCE
namespace rotunda::kv::grouped {

/// Query heads that are worked on together.
inline constexpr int kHeadsAtOnce = 4;

/// What a weight times a scale becomes at most: 256 * 127 + 127, so that both bytes, the lower one signed, fit.
inline constexpr float kMaxWeight = 32639.0F;

/// Added to a number below 2^22, rounds it to an integer that stands in the lowest bits.
inline constexpr float kRounder = 12582912.0F;

/// Largest magnitudes below this count as zero: 1 / x stays finite.
inline constexpr float kTiny = 1e-30F;

/// What is added to levels of tables, so that they are unsigned bytes.
inline constexpr int kTableBias = 64;

/// Codes of 16 elements (a unit) become four words of unsigned bytes, for each lane. How, but for the planes:
enum class Map : uint8_t {
  kNone,   ///< the code
  kTable,  ///< table[code] + kTableBias
  kE2m3,   ///< the number times 8, + kTableBias
  kSplit,  ///< 8 bits: the lower nibble, and the upper one apart
};

/// What all pages of a call share, in the thread's scratch memory.
struct DecodeWork {
  uint32_t* q;         ///< [head_dim / 16][heads][4] 16 channels as 8-bit integers
  float* q_step;       ///< [key groups][heads]
  float* q_sum;        ///< [key groups][heads] sum of the integers
  float* key_scale;    ///< [key groups][page_tokens] scale times unit
  float* key_offset;   ///< [key groups][page_tokens] what a code's byte stands above its integer
  float* value_scale;  ///< as for keys
  float* value_offset;
  float* scores;           ///< [heads][page_tokens] scores, then softmax weights
  uint32_t* weights;       ///< [page_tokens / 16][2][heads][4] upper, then lower bytes of weights times value scales
  float* scaled;           ///< [page_tokens] weights times scales of one group
  float* weight_step;      ///< [heads]
  int32_t* weight_offset;  ///< [heads] what the offsets add to the sum
  uint32_t* bytes;         ///< unpacked codes, and behind them upper nibbles
};

}  // namespace rotunda::kv::grouped
#endif  // ROTUNDA_GROUPED_DECODE_ONCE

HWY_BEFORE_NAMESPACE();
namespace rotunda::kv::grouped {
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

/// Vectors of lanes that are worked on together: two blocks, or parts of one block.
constexpr int kVectors = kLanes == 1 ? 1 : 2;
constexpr int kWidth = kVectors * kLanes;

HWY_INLINE WordVec Bytes(uint32_t byte) { return hn::Set(WordTag(), byte * 0x01010101u); }

// ---- unpacking -----------------------------------------------------------------------------------------------------

/// Where the planes of a side begin for one vector of lanes. Words of a lane lie `stride` apart.
struct Planes {
  const uint32_t* of8;
  const uint32_t* of4;
  const uint32_t* of2;
  const uint32_t* of1;
  int64_t stride;
};

/// table[code] of 16 bytes, for each byte of each lane.
HWY_INLINE WordVec Lookup(const uint8_t* HWY_RESTRICT table, WordVec codes) {
#if HWY_TARGET == HWY_SCALAR
  const uint32_t word = hn::GetLane(codes);
  uint32_t found = 0;
  for (int i = 0; i < 32; i += 8) found |= uint32_t{table[word >> i & 15]} << i;
  return hn::Set(WordTag(), found);
#else
  const hn::Repartition<uint8_t, WordTag> d8;
  return hn::BitCast(WordTag(), hn::TableLookupBytes(hn::LoadDup128(d8, table), hn::BitCast(d8, codes)));
#endif
}

/// Bytes 16 and up of the magnitudes of fp6 e2m3, times 8; those below are their own magnitude.
HWY_ALIGN constexpr uint8_t kE2m3Upper[16] = {16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60};

HWY_INLINE WordVec E2m3Bytes(WordVec codes) {
  const WordVec low = hn::And(codes, Bytes(15));
  // 255 in the bytes whose bit is set; no carries between bytes.
  const auto spread = [](WordVec bit) { return hn::Sub(hn::ShiftLeft<8>(bit), bit); };
  const WordVec upper = spread(hn::And(hn::ShiftRight<4>(codes), Bytes(1)));
  const WordVec negative = spread(hn::And(hn::ShiftRight<5>(codes), Bytes(1)));
  const WordVec magnitude = hn::Or(hn::And(upper, Lookup(kE2m3Upper, low)), hn::AndNot(upper, low));
  // 64 + m, or 64 - m: every byte stays between 4 and 124.
  const WordVec plus = hn::Add(Bytes(kTableBias), magnitude);
  const WordVec minus = hn::Sub(Bytes(kTableBias), magnitude);
  return hn::Or(hn::And(negative, minus), hn::AndNot(negative, plus));
}

/// Unpacks units first_unit .. first_unit + n_units - 1 of one vector of lanes.
/// @param to, upper [4 n_units][kWidth] words, advanced to the vector
using Unpack = void (*)(const Planes& p, int first_unit, int n_units, const uint8_t* table, uint32_t* to,
                        uint32_t* upper);

template <int kBits, Map kMap>
HWY_NOINLINE void UnpackUnits(const Planes& p, int first_unit, int n_units, const uint8_t* HWY_RESTRICT table,
                              uint32_t* HWY_RESTRICT to, uint32_t* HWY_RESTRICT upper) {
  const WordTag du;
  for (int unit = first_unit; unit < first_unit + n_units; ++unit) {
    WordVec single = hn::Zero(du);
    WordVec pair = hn::Zero(du);
    if constexpr (has_plane(kBits, 1)) {
      single = hn::LoadU(du, p.of1 + unit / 2 * p.stride);
      if (unit % 2 != 0) single = hn::ShiftRight<4>(single);
    }
    if constexpr (has_plane(kBits, 2)) pair = hn::LoadU(du, p.of2 + unit * p.stride);
    WordVec nibbles = hn::Zero(du);
    HWY_UNROLL(4)
    for (int j = 0; j < 4; ++j) {
      WordVec code = hn::Zero(du);
      if constexpr (has_plane(kBits, 8)) {
        const WordVec word = hn::LoadU(du, p.of8 + (4 * unit + j) * p.stride);
        code = hn::And(word, Bytes(15));
        hn::Store(hn::And(hn::ShiftRight<4>(word), Bytes(15)), du, upper + j * kWidth);
      }
      if constexpr (has_plane(kBits, 4)) {
        nibbles = j % 2 == 0 ? hn::LoadU(du, p.of4 + (2 * unit + j / 2) * p.stride) : hn::ShiftRight<4>(nibbles);
        code = hn::And(nibbles, Bytes(15));
      }
      if constexpr (has_plane(kBits, 2)) {
        code = hn::Or(code, hn::ShiftLeft<plane_shift(kBits, 2)>(hn::And(pair, Bytes(3))));
        pair = hn::ShiftRight<2>(pair);
      }
      if constexpr (has_plane(kBits, 1)) {
        code = hn::Or(code, hn::ShiftLeft<plane_shift(kBits, 1)>(hn::And(single, Bytes(1))));
        single = hn::ShiftRight<1>(single);
      }
      if constexpr (kMap == Map::kTable) code = Lookup(table, code);
      if constexpr (kMap == Map::kE2m3) code = E2m3Bytes(code);
      hn::Store(code, du, to + j * kWidth);
    }
    to += 4 * kWidth;
    upper += 4 * kWidth;
  }
}

Unpack UnpackOf(const GroupedSide& side, const GroupedCodec& codec) {
  const bool table = codec.levels == Levels::kTable;
  switch (side.bits) {
    case 2:
      return table ? &UnpackUnits<2, Map::kTable> : &UnpackUnits<2, Map::kNone>;
    case 3:
      return table ? &UnpackUnits<3, Map::kTable> : &UnpackUnits<3, Map::kNone>;
    case 4:
      return table ? &UnpackUnits<4, Map::kTable> : &UnpackUnits<4, Map::kNone>;
    case 5:
      return &UnpackUnits<5, Map::kNone>;
    case 6:
      return codec.levels == Levels::kE2m3 ? &UnpackUnits<6, Map::kE2m3> : &UnpackUnits<6, Map::kNone>;
    case 7:
      return &UnpackUnits<7, Map::kNone>;
    default:
      return &UnpackUnits<8, Map::kSplit>;
  }
}

/// One side's codes of one page and head.
struct Codes {
  Codes(const GroupedLayer& layer, bool is_key, const std::byte* head_bytes)
      : side(is_key ? layer.layout.key : layer.layout.value),
        codec(is_key ? layer.key : layer.value),
        layout(layer.layout),
        key(is_key),
        bytes(head_bytes),
        unpack(UnpackOf(side, codec)) {
    const auto plane = [&](int width) {
      const int64_t offset = key ? layout.key_plane_offset(width) : layout.value_plane_offset(width);
      return reinterpret_cast<const uint32_t*>(bytes + offset);
    };
    first = {plane(8), plane(4), plane(2), plane(1), 0};
    for (int i = 0; i < 4; ++i) block_words[i] = int64_t{layout.key_words(kWidestPlane >> i)} * kTokenBlock;
    if (codec.levels != Levels::kTable) return;
    for (int code = 0; code < 1 << side.bits; ++code)
      table[code] = static_cast<uint8_t>(codec.table[code] + kTableBias);
  }

  /// Keys: lanes are tokens of a block.
  Planes KeyPlanes(int block, int lane) const {
    return {first.of8 + block * block_words[0] + lane, first.of4 + block * block_words[1] + lane,
            first.of2 + block * block_words[2] + lane, first.of1 + block * block_words[3] + lane, kTokenBlock};
  }
  /// Values: lanes are channels.
  Planes ValuePlanes(int channel) const {
    return {first.of8 + channel, first.of4 + channel, first.of2 + channel, first.of1 + channel, layout.head_dim};
  }

  const GroupedSide& side;
  const GroupedCodec& codec;
  const GroupedPageLayout& layout;
  bool key;
  const std::byte* bytes;  ///< of the head
  Unpack unpack;
  Planes first;            ///< of the head
  int64_t block_words[4];  ///< of a block of keys, by plane
  HWY_ALIGN uint8_t table[16] = {};
};

// ---- scales and zero points ----------------------------------------------------------------------------------------

/// A byte of fp8 e4m3 per lane as a float, exact.
HWY_INLINE LaneVec FromE4m3(WordVec code) {
  const LaneTag d;
  const IntTag di;
  const WordTag du;
  const WordVec magnitude = hn::And(code, hn::Set(du, 127));
  const LaneVec normal = hn::BitCast(d, hn::Add(hn::ShiftLeft<20>(magnitude), hn::Set(du, 120u << 23)));
  const LaneVec subnormal = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, magnitude)), hn::Set(d, 0x1p-9F));
  const LaneVec value = hn::IfThenElse(hn::Lt(normal, hn::Set(d, 0x1p-6F)), subnormal, normal);
  const WordVec sign = hn::ShiftLeft<24>(hn::And(code, hn::Set(du, 128)));
  return hn::BitCast(d, hn::Or(hn::BitCast(du, value), sign));
}

/// Bytes as lanes.
HWY_INLINE WordVec LoadBytes(const uint8_t* from) {
  const hn::Rebind<uint8_t, WordTag> d8;
  return hn::PromoteTo(WordTag(), hn::LoadU(d8, from));
}

/// Scales of `n` tokens (a multiple of kLanes) of one group, times the codec's unit.
void LoadScales(const Codes& c, int group, int64_t first, int n, float* HWY_RESTRICT to) {
  const LaneTag d;
  const WordTag du;
  const hn::Rebind<hwy::float16_t, LaneTag> d16;
  const int64_t tokens = c.layout.page_tokens();
  const std::byte* const from =
      c.bytes + c.layout.scale_offset(c.key) + (group * tokens + first) * c.side.scale_bytes();
  const LaneVec unit = hn::Set(d, c.codec.unit);
  const auto* const bytes = reinterpret_cast<const uint8_t*>(from);
  if (c.side.scale == ScaleType::kFp16) {
    const auto* const halves = reinterpret_cast<const hwy::float16_t*>(from);
    for (int t = 0; t < n; t += kLanes)
      hn::Store(hn::Mul(hn::PromoteTo(d, hn::LoadU(d16, halves + t)), unit), d, to + t);
  } else if (c.side.scale == ScaleType::kE4m3) {
    for (int t = 0; t < n; t += kLanes) hn::Store(hn::Mul(FromE4m3(LoadBytes(bytes + t)), unit), d, to + t);
  } else {
    // 2^(E - bias): below 2^-126 the exponent field is 0 and one bit of the mantissa is set.
    const int bias = c.side.exponent_bias;
    for (int t = 0; t < n; t += kLanes) {
      const WordVec e = LoadBytes(bytes + t);
      const WordVec normal = hn::ShiftLeft<23>(hn::Sub(e, hn::Set(du, static_cast<uint32_t>(bias - 127))));
      const WordVec shift = hn::Min(hn::Add(e, hn::Set(du, static_cast<uint32_t>(149 - bias))), hn::Set(du, 31));
      const WordVec subnormal = hn::Shl(hn::Set(du, 1), shift);
      const auto is_normal = hn::Gt(e, hn::Set(du, static_cast<uint32_t>(bias - 127)));
      const LaneVec scale = hn::BitCast(d, hn::IfThenElse(is_normal, normal, subnormal));
      hn::Store(hn::Mul(scale, unit), d, to + t);
    }
  }
}

/// What the bytes that UnpackUnits makes (both nibbles together) stand above their integers, for `n` tokens of one group.
void LoadOffsets(const Codes& c, int group, int64_t first, int n, float* HWY_RESTRICT to) {
  const GroupedSide& side = c.side;
  if (!side.zeros) {
    const int offset = c.codec.levels == Levels::kInteger ? 1 << (side.bits - 1) : kTableBias;
    std::fill_n(to, n, static_cast<float>(offset));
    return;
  }
  const std::byte* plane = c.bytes + c.layout.zero_offset(c.key) + group * c.layout.zero_group_bytes(side);
  std::fill_n(to, n, 0.0F);
  const LaneTag d;
  const IntTag di;
  const WordTag du;
  for (int width = kWidestPlane; width > 0; width /= 2) {
    if (!has_plane(side.bits, width)) continue;
    const auto* const words = reinterpret_cast<const uint32_t*>(plane);
    const WordVec mask = hn::Set(du, (1u << width) - 1);
    const LaneVec factor = hn::Set(d, static_cast<float>(1 << plane_shift(side.bits, width)));
    const int log2_per_word = width == 8 ? 2 : width == 4 ? 3 : width == 2 ? 4 : 5;
    const WordVec width_log2 = hn::Set(du, static_cast<uint32_t>(5 - log2_per_word));
    for (int t = 0; t < n; t += kLanes) {
      // Each lane takes its word and shifts its own bits down.
      const WordVec token = hn::Iota(du, static_cast<uint32_t>(first) + static_cast<uint32_t>(t));
      const IntVec index = hn::BitCast(di, hn::ShiftRightSame(token, log2_per_word));
      const WordVec in_word = hn::And(token, hn::Set(du, (1u << log2_per_word) - 1));
      const WordVec bits = hn::And(hn::Shr(hn::GatherIndex(du, words, index), hn::Shl(in_word, width_log2)), mask);
      const LaneVec part = hn::ConvertTo(d, hn::BitCast(di, bits));
      hn::Store(hn::MulAdd(part, factor, hn::Load(d, to + t)), d, to + t);
    }
    plane += c.layout.page_tokens() * width / 8;
  }
}

// ---- integer levels ------------------------------------------------------------------------------------------------

/// sum[r][v] += bytes times factors over units of 16 elements.
/// @param bytes [4 n_units][kWidth]  @param factors [n_units][kRows][4]  @param sum [kRows][kUsed]
template <int kRows, int kUsed>
HWY_INLINE void DotUnits(const uint32_t* HWY_RESTRICT bytes, const uint32_t* HWY_RESTRICT factors, int n_units,
                         IntVec* sum) {
  const WordTag du;
  for (int unit = 0; unit < n_units; ++unit) {
    HWY_UNROLL(4)
    for (int j = 0; j < 4; ++j) {
      WordVec codes[kUsed];
      HWY_UNROLL(2)
      for (int v = 0; v < kUsed; ++v) codes[v] = hn::Load(du, bytes + j * kWidth + v * kLanes);
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        const WordVec factor = hn::Set(du, factors[4 * r + j]);
        HWY_UNROLL(2)
        for (int v = 0; v < kUsed; ++v) sum[r * kUsed + v] = Dot4(sum[r * kUsed + v], codes[v], factor);
      }
    }
    bytes += 4 * kWidth;
    factors += 4 * kRows;
  }
}

/// Fetches shares begin .. end - 1 of `total` of `bytes` of the page to come, so that they are there by then; a few lines at a time,
/// because a core waits once it has asked for too many. @param next may be null
HWY_INLINE void FetchAhead(const std::byte* next, int64_t bytes, int begin, int end, int total) {
  if (next == nullptr) return;
  for (int64_t at = bytes * begin / total / 64 * 64; at < bytes * end / total; at += 64) hwy::Prefetch(next + at);
}

/// The sums over unpacked codes of any width: upper nibbles count 16 times.
template <int kRows, int kUsed>
HWY_INLINE void SumUnits(bool split, const DecodeWork& work, const uint32_t* upper, const uint32_t* factors,
                         int n_units, IntVec* sum) {
  const IntTag di;
  HWY_UNROLL(16)
  for (int i = 0; i < kRows * kUsed; ++i) sum[i] = hn::Zero(di);
  if (split) {
    DotUnits<kRows, kUsed>(upper, factors, n_units, sum);
    HWY_UNROLL(16)
    for (int i = 0; i < kRows * kUsed; ++i) sum[i] = hn::ShiftLeft<4>(sum[i]);
  }
  DotUnits<kRows, kUsed>(work.bytes, factors, n_units, sum);
}

/// Scores of one page into work.scores, tokens left out -inf.
/// @param next the head in the page to come, or null; its first half is fetched meanwhile
template <int kHeads>
HWY_NOINLINE void PageScores(const Codes& keys, const DecodeWork& work, const uint16_t* masks, const std::byte* next) {
  const LaneTag d;
  const GroupedPageLayout& l = keys.layout;
  const auto tokens = static_cast<int>(l.page_tokens());
  const int n_units = keys.side.group / 16;
  const bool split = keys.side.bits == 8;
  uint32_t* const upper = work.bytes + 4 * n_units * kWidth;
  const LaneVec none = hn::Set(d, -std::numeric_limits<float>::infinity());
  const int64_t half = l.head_bytes() / 2;
  for (int t = 0; t < tokens; t += kWidth) {
    FetchAhead(next, half, t, t + kWidth, tokens);
    LaneVec score[kHeads * kVectors];
    HWY_UNROLL(8)
    for (int i = 0; i < kHeads * kVectors; ++i) score[i] = hn::Zero(d);
    for (int group = 0; group < l.groups(keys.side); ++group) {
      HWY_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) {
        const int token = t + v * kLanes;
        keys.unpack(keys.KeyPlanes(token / kTokenBlock, token % kTokenBlock), group * n_units, n_units, keys.table,
                    work.bytes + v * kLanes, upper + v * kLanes);
      }
      IntVec sum[kHeads * kVectors];
      SumUnits<kHeads, kVectors>(split, work, upper, work.q + int64_t{group} * n_units * kHeads * 4, n_units, sum);
      HWY_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) {
        const LaneVec scale = hn::Load(d, work.key_scale + group * tokens + t + v * kLanes);
        const LaneVec offset = hn::Load(d, work.key_offset + group * tokens + t + v * kLanes);
        HWY_UNROLL(4)
        for (int h = 0; h < kHeads; ++h) {
          const LaneVec step = hn::Mul(scale, hn::Set(d, work.q_step[group * kHeads + h]));
          const LaneVec total = hn::NegMulAdd(offset, hn::Set(d, work.q_sum[group * kHeads + h]),
                                              hn::ConvertTo(d, sum[h * kVectors + v]));
          score[h * kVectors + v] = hn::MulAdd(total, step, score[h * kVectors + v]);
        }
      }
    }
    HWY_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      const int token = t + v * kLanes;
      HWY_UNROLL(4)
      for (int h = 0; h < kHeads; ++h) {
        hn::Store(IfAttended(masks[token / kTokenBlock], token % kTokenBlock, score[h * kVectors + v], none), d,
                  work.scores + h * tokens + token);
      }
    }
  }
}

/// Softmax weights times the value scales of one group as integers of two bytes, relative to the largest of the page.
template <int kHeads>
HWY_NOINLINE void GroupWeights(const Codes& values, const DecodeWork& work, const uint16_t* masks, int group) {
  const LaneTag d;
  const IntTag di;
  const WordTag du;
  const auto tokens = static_cast<int>(values.layout.page_tokens());
  const float* const scales = work.value_scale + int64_t{group} * tokens;
  const float* const offsets = work.value_offset + int64_t{group} * tokens;
  const bool zeros = values.side.zeros;
  auto* const bytes = reinterpret_cast<uint8_t*>(work.weights);
  for (int h = 0; h < kHeads; ++h) {
    LaneVec top = hn::Zero(d);
    for (int t = 0; t < tokens; t += kLanes) {
      // The scales of tokens left out may be anything, and 0 * NaN is not 0.
      const LaneVec scaled =
          IfAttended(masks[t / kTokenBlock], t % kTokenBlock,
                     hn::Mul(hn::Load(d, work.scores + h * tokens + t), hn::Load(d, scales + t)), hn::Zero(d));
      top = hn::Max(top, hn::Abs(scaled));
      hn::Store(scaled, d, work.scaled + t);
    }
    const float largest = hn::GetLane(hn::MaxOfLanes(d, top));
    const LaneVec factor = hn::Set(d, largest < kTiny ? 0.0F : kMaxWeight / largest);
    IntVec sum = hn::Zero(di);
    for (int t = 0; t < tokens; t += kLanes) {
      // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
      const LaneVec rounded = hn::MulAdd(hn::Load(d, work.scaled + t), factor, hn::Set(d, kRounder));
      const WordVec w = hn::BitCast(du, rounded);
      uint8_t* const to = bytes + (int64_t{t / kTokenBlock} * 2 * kHeads + h) * kTokenBlock + t % kTokenBlock;
      StoreLowBytes(hn::ShiftRight<8>(hn::Add(w, hn::Set(du, 128))), to);
      StoreLowBytes(w, to + kHeads * kTokenBlock);
      const IntVec integer = hn::ConvertTo(di, hn::Sub(rounded, hn::Set(d, kRounder)));
      sum = hn::Add(sum, zeros ? hn::Mul(integer, hn::ConvertTo(di, hn::Load(d, offsets + t))) : integer);
    }
    work.weight_step[h] = largest < kTiny ? 0.0F : largest / kMaxWeight;
    // Below 2^31 for pages of up to 256 tokens: 32639 * 255 * 256.
    work.weight_offset[h] = hn::GetLane(hn::SumOfLanes(di, sum)) * (zeros ? 1 : static_cast<int32_t>(offsets[0]));
  }
}

/// acc += weights times values for kUsed vectors of channels.
/// @param acc [kHeads][head_dim], advanced to the channels
template <int kHeads, int kUsed>
HWY_INLINE void AddValues(const Codes& values, const DecodeWork& work, int channel, int n_heads,
                          float* HWY_RESTRICT acc) {
  const LaneTag d;
  const IntTag di;
  const int head_dim = values.layout.head_dim;
  const int n_units = values.layout.blocks_per_page;
  uint32_t* const upper = work.bytes + 4 * n_units * kWidth;
  HWY_UNROLL(2)
  for (int v = 0; v < kUsed; ++v) {
    values.unpack(values.ValuePlanes(channel + v * kLanes), 0, n_units, values.table, work.bytes + v * kLanes,
                  upper + v * kLanes);
  }
  IntVec sum[2 * kHeads * kUsed];
  SumUnits<2 * kHeads, kUsed>(values.side.bits == 8, work, upper, work.weights, n_units, sum);
  for (int h = 0; h < n_heads; ++h) {
    const LaneVec step = hn::Set(d, work.weight_step[h]);
    const IntVec offset = hn::Set(di, work.weight_offset[h]);
    HWY_UNROLL(2)
    for (int v = 0; v < kUsed; ++v) {
      const IntVec total = hn::Add(hn::ShiftLeft<8>(sum[h * kUsed + v]), sum[(kHeads + h) * kUsed + v]);
      float* const to = acc + int64_t{h} * head_dim + v * kLanes;
      hn::StoreU(hn::MulAdd(hn::ConvertTo(d, hn::Sub(total, offset)), step, hn::LoadU(d, to)), d, to);
    }
  }
}

/// @param next as for PageScores; its second half is fetched
template <int kHeads>
HWY_NOINLINE void PageValues(const Codes& values, const DecodeWork& work, const uint16_t* masks, int n_heads,
                             float* acc, const std::byte* next) {
  const GroupedPageLayout& l = values.layout;
  const int size = values.side.group;
  const int64_t half = l.head_bytes() / 2;
  const std::byte* const second_half = next == nullptr ? nullptr : next + half;
  for (int group = 0; group < l.groups(values.side); ++group) {
    GroupWeights<kHeads>(values, work, masks, group);
    int c = group * size;
    const int end = c + size;
    while (c < end) {
      const int step = c + kWidth <= end ? kWidth : kLanes;
      FetchAhead(second_half, half, c, c + step, l.head_dim);
      if (step == kWidth) {
        AddValues<kHeads, kVectors>(values, work, c, n_heads, acc + c);
      } else {
        AddValues<kHeads, 1>(values, work, c, n_heads, acc + c);
      }
      c += step;
    }
  }
}

// ---- fp8 -----------------------------------------------------------------------------------------------------------

/// The same scores where elements are floats. @param q [n_heads][head_dim]
void FloatPageScores(const Codes& keys, const DecodeWork& work, const uint16_t* masks, int n_heads, const float* q) {
  const LaneTag d;
  const WordTag du;
  const GroupedPageLayout& l = keys.layout;
  const auto tokens = static_cast<int>(l.page_tokens());
  const LaneVec none = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int t = 0; t < tokens; t += kLanes) {
    const Planes planes = keys.KeyPlanes(t / kTokenBlock, t % kTokenBlock);
    LaneVec score[kHeadsAtOnce];
    HWY_UNROLL(4)
    for (int h = 0; h < kHeadsAtOnce; ++h) score[h] = hn::Zero(d);
    for (int c = 0; c < l.head_dim; c += 4) {
      WordVec word = hn::LoadU(du, planes.of8 + c / 4 * planes.stride);
      const LaneVec scale = hn::Load(d, work.key_scale + c / keys.side.group * tokens + t);
      for (int i = 0; i < 4; ++i, word = hn::ShiftRight<8>(word)) {
        const LaneVec key = hn::Mul(scale, FromE4m3(word));
        HWY_UNROLL(4)
        for (int h = 0; h < kHeadsAtOnce; ++h) {
          const int row = std::min(h, n_heads - 1);
          score[h] = hn::MulAdd(key, hn::Set(d, q[int64_t{row} * l.head_dim + c + i]), score[h]);
        }
      }
    }
    for (int h = 0; h < n_heads; ++h)
      hn::Store(IfAttended(masks[t / kTokenBlock], t % kTokenBlock, score[h], none), d, work.scores + h * tokens + t);
  }
}

void FloatPageValues(const Codes& values, const DecodeWork& work, const uint16_t* masks, int n_heads, float* acc) {
  const LaneTag d;
  const WordTag du;
  const GroupedPageLayout& l = values.layout;
  const auto tokens = static_cast<int>(l.page_tokens());
  for (int c = 0; c < l.head_dim; c += kLanes) {
    const uint32_t* const words = values.ValuePlanes(c).of8;
    const float* const scales = work.value_scale + int64_t{c / values.side.group} * tokens;
    LaneVec sum[kHeadsAtOnce];
    HWY_UNROLL(4)
    for (int h = 0; h < kHeadsAtOnce; ++h) sum[h] = hn::Zero(d);
    for (int t = 0; t < tokens; ++t) {
      if ((masks[t / kTokenBlock] >> t % kTokenBlock & 1) == 0) continue;
      const WordVec word = hn::LoadU(du, words + int64_t{t / 4} * l.head_dim);
      const LaneVec value = hn::Mul(hn::Set(d, scales[t]), FromE4m3(hn::ShiftRightSame(word, 8 * (t % 4))));
      HWY_UNROLL(4)
      for (int h = 0; h < kHeadsAtOnce; ++h)
        sum[h] = hn::MulAdd(value, hn::Set(d, work.scores[std::min(h, n_heads - 1) * tokens + t]), sum[h]);
    }
    for (int h = 0; h < n_heads; ++h) {
      float* const to = acc + int64_t{h} * l.head_dim + c;
      hn::StoreU(hn::Add(hn::LoadU(d, to), sum[h]), d, to);
    }
  }
}

// ---- pages ---------------------------------------------------------------------------------------------------------

/// Rounds the queries of n_heads heads to 8-bit integers, one step per head and group of keys; further rows, up to `heads`, are zeros:
/// their scores are 0, which no softmax ever sees.
void QuantizeQueries(const GroupedPageLayout& l, const float* q, int n_heads, int heads, const DecodeWork& work) {
  const int size = l.key.group;
  auto* const bytes = reinterpret_cast<int8_t*>(work.q);
  for (int group = 0; group < l.groups(l.key); ++group) {
    for (int h = 0; h < heads; ++h) {
      const float* const from = q + int64_t{std::min(h, n_heads - 1)} * l.head_dim + group * size;
      float top = 0.0F;
      if (h < n_heads) {
        for (int c = 0; c < size; ++c) top = std::max(top, std::fabs(from[c]));
      }
      const float inverse = top < kTiny ? 0.0F : 127.0F / top;
      int32_t sum = 0;
      for (int c = 0; c < size; ++c) {
        const auto integer = static_cast<int>(std::nearbyint(from[c] * inverse));
        const int channel = group * size + c;
        bytes[(channel / 16 * heads + h) * 16 + channel % 16] = static_cast<int8_t>(integer);
        sum += integer;
      }
      work.q_step[group * heads + h] = top < kTiny ? 0.0F : top / 127.0F;
      work.q_sum[group * heads + h] = static_cast<float>(sum);
    }
  }
}

HWY_INLINE void SoftmaxPage(const GroupedDecodeParams& p, const DecodeWork& work, int first, int n_heads) {
  const GroupedPageLayout& l = p.layer->layout;
  const auto tokens = static_cast<int>(l.page_tokens());
  for (int h = 0; h < n_heads; ++h) {
    kernels::HWY_NAMESPACE::SoftmaxStep(work.scores + h * tokens, tokens, p.state.max + first + h,
                                        p.state.sum + first + h, p.state.acc + int64_t{first + h} * l.head_dim,
                                        l.head_dim);
  }
}

template <int kHeads>
void IntegerPage(const GroupedDecodeParams& p, const Codes& keys, const Codes& values, const DecodeWork& work,
                 const uint16_t* masks, int first, int n_heads, const std::byte* next) {
  PageScores<kHeads>(keys, work, masks, next);
  SoftmaxPage(p, work, first, n_heads);
  PageValues<kHeads>(values, work, masks, n_heads, p.state.acc + int64_t{first} * p.layer->layout.head_dim, next);
}

/// kHeads for which code exists: 1, 2 or 4; a third head comes with a row of zeros.
int RowsFor(int n_heads) { return n_heads == 3 ? 4 : n_heads; }

void DecodeHeads(const GroupedDecodeParams& p, const DecodeWork& work, int first, int n_heads) {
  const GroupedPageLayout& l = p.layer->layout;
  const float* const q = p.q + int64_t{first} * l.head_dim;
  const bool floats = p.layer->key.levels == Levels::kE4m3;
  const int rows = RowsFor(n_heads);
  const auto tokens = static_cast<int>(l.page_tokens());
  if (!floats) QuantizeQueries(l, q, n_heads, rows, work);
  const auto masks_of = [&](int page) { return p.run.masks + int64_t{page} * l.blocks_per_page; };
  const auto attended = [&](int page) {
    return std::any_of(masks_of(page), masks_of(page) + l.blocks_per_page, [](uint16_t mask) { return mask != 0; });
  };
  for (int page = 0; page < p.run.n_pages; ++page) {
    if (!attended(page)) continue;
    const uint16_t* const masks = masks_of(page);
    const std::byte* const bytes = p.run.pages[page] + p.kv_head * l.head_bytes();
    const std::byte* const next =
        page + 1 < p.run.n_pages && attended(page + 1) ? p.run.pages[page + 1] + p.kv_head * l.head_bytes() : nullptr;
    const Codes keys(*p.layer, true, bytes);
    const Codes values(*p.layer, false, bytes);
    for (int group = 0; group < l.groups(l.key); ++group) {
      LoadScales(keys, group, 0, tokens, work.key_scale + int64_t{group} * tokens);
      if (!floats) LoadOffsets(keys, group, 0, tokens, work.key_offset + int64_t{group} * tokens);
    }
    for (int group = 0; group < l.groups(l.value); ++group) {
      LoadScales(values, group, 0, tokens, work.value_scale + int64_t{group} * tokens);
      if (!floats) LoadOffsets(values, group, 0, tokens, work.value_offset + int64_t{group} * tokens);
    }
    if (floats) {
      FloatPageScores(keys, work, masks, n_heads, q);
      SoftmaxPage(p, work, first, n_heads);
      FloatPageValues(values, work, masks, n_heads, p.state.acc + int64_t{first} * l.head_dim);
    } else if (rows == 4) {
      IntegerPage<4>(p, keys, values, work, masks, first, n_heads, next);
    } else if (rows == 2) {
      IntegerPage<2>(p, keys, values, work, masks, first, n_heads, next);
    } else {
      IntegerPage<1>(p, keys, values, work, masks, first, n_heads, next);
    }
  }
}

void GroupedDecode(const GroupedDecodeParams& p) {
  static thread_local kernels::Scratch scratch;
  const GroupedPageLayout& l = p.layer->layout;
  const auto tokens = static_cast<size_t>(l.page_tokens());
  const auto key_groups = static_cast<size_t>(l.groups(l.key));
  const auto value_groups = static_cast<size_t>(l.groups(l.value));
  const size_t heads = kernels::whole_lines(kHeadsAtOnce);
  const size_t key_heads = kernels::whole_lines(key_groups * kHeadsAtOnce);
  const size_t q_words = kernels::whole_lines(static_cast<size_t>(kHeadsAtOnce) * l.head_dim / 4);
  // Units of a group of keys, or of a page of values; lower and upper nibbles.
  const size_t units = std::max<size_t>(l.key.group / 16, l.blocks_per_page);
  const size_t byte_words = kernels::whole_lines(2 * units * 4 * kWidth);
  float* at = scratch.floats(q_words + 2 * key_heads + 2 * (key_groups + value_groups) * tokens +
                             (2 * kHeadsAtOnce + 1) * tokens + 2 * heads + byte_words);
  const auto take = [&](size_t n) {
    float* const here = at;
    at += n;
    return here;
  };
  DecodeWork work;
  work.q = reinterpret_cast<uint32_t*>(take(q_words));
  work.q_step = take(key_heads);
  work.q_sum = take(key_heads);
  work.key_scale = take(key_groups * tokens);
  work.key_offset = take(key_groups * tokens);
  work.value_scale = take(value_groups * tokens);
  work.value_offset = take(value_groups * tokens);
  work.scores = take(kHeadsAtOnce * tokens);
  work.weights = reinterpret_cast<uint32_t*>(take(kHeadsAtOnce * tokens));
  work.scaled = take(tokens);
  work.weight_step = take(heads);
  work.weight_offset = reinterpret_cast<int32_t*>(take(heads));
  work.bytes = reinterpret_cast<uint32_t*>(take(byte_words));
  for (int first = 0; first < p.n_q; first += kHeadsAtOnce)
    DecodeHeads(p, work, first, std::min(kHeadsAtOnce, p.n_q - first));
}

// ---- loading -------------------------------------------------------------------------------------------------------

/// Elements of one vector of lanes over their scale, from unpacked bytes: `word` and `upper` hold four elements.
HWY_INLINE LaneVec Element(const Codes& c, WordVec word, WordVec upper, int i, LaneVec offset) {
  const LaneTag d;
  const IntTag di;
  const WordTag du;
  WordVec byte = hn::And(hn::ShiftRightSame(word, 8 * i), hn::Set(du, 255));
  if (c.side.bits == 8)
    byte = hn::Or(byte, hn::ShiftLeft<4>(hn::And(hn::ShiftRightSame(upper, 8 * i), hn::Set(du, 255))));
  if (c.codec.levels == Levels::kE4m3) return FromE4m3(byte);
  return hn::Sub(hn::ConvertTo(d, hn::BitCast(di, byte)), offset);
}

void GroupedLoad(const GroupedLoadParams& p) {
  static thread_local kernels::Scratch scratch;
  const LaneTag d;
  const WordTag du;
  const GroupedPageLayout& l = p.layer->layout;
  const std::byte* const bytes = p.page + p.kv_head * l.head_bytes();
  const int64_t first = int64_t{p.block} * kTokenBlock;
  const Codes keys(*p.layer, true, bytes);
  const Codes values(*p.layer, false, bytes);
  const int n_units = l.key.group / 16;
  float* const scale = scratch.floats(2 * kTokenBlock + static_cast<size_t>(2 * std::max(n_units, 1)) * 4 * kWidth);
  float* const offset = scale + kTokenBlock;
  auto* const words = reinterpret_cast<uint32_t*>(offset + kTokenBlock);
  uint32_t* const upper = words + std::max(n_units, 1) * 4 * kWidth;
  for (int group = 0; group < l.groups(l.key); ++group) {
    LoadScales(keys, group, first, kTokenBlock, scale);
    LoadOffsets(keys, group, first, kTokenBlock, offset);
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      keys.unpack(keys.KeyPlanes(p.block, lane), group * n_units, n_units, keys.table, words, upper);
      for (int c = 0; c < l.key.group; ++c) {
        const int at = c / 4 * kWidth;
        const LaneVec x =
            Element(keys, hn::Load(du, words + at), hn::Load(du, upper + at), c % 4, hn::Load(d, offset + lane));
        hn::Store(hn::Mul(x, hn::Load(d, scale + lane)), d, p.key_out + (group * l.key.group + c) * kTokenBlock + lane);
      }
    }
  }
  for (int group = 0; group < l.groups(l.value); ++group) {
    LoadScales(values, group, first, kTokenBlock, scale);
    LoadOffsets(values, group, first, kTokenBlock, offset);
    for (int c = group * l.value.group; c < (group + 1) * l.value.group; c += kLanes) {
      values.unpack(values.ValuePlanes(c), p.block, 1, values.table, words, upper);
      for (int t = 0; t < kTokenBlock; ++t) {
        const int at = t / 4 * kWidth;
        const LaneVec x =
            Element(values, hn::Load(du, words + at), hn::Load(du, upper + at), t % 4, hn::Set(d, offset[t]));
        hn::StoreU(hn::Mul(x, hn::Set(d, scale[t])), d, p.value_out + int64_t{t} * l.head_dim + c);
      }
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kv::grouped
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace rotunda::kv::grouped {

HWY_EXPORT(GroupedDecode);
HWY_EXPORT(GroupedLoad);

void grouped_decode(const GroupedDecodeParams& params) { HWY_DYNAMIC_DISPATCH(GroupedDecode)(params); }

void grouped_load(const GroupedLoadParams& params) { HWY_DYNAMIC_DISPATCH(GroupedLoad)(params); }

}  // namespace rotunda::kv::grouped
#endif  // HWY_ONCE
