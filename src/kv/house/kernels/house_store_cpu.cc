#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kv/house/kernels/house_store_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "base/half.h"
#include "kernels/attention/softmax-inl.h"
#include "kernels/scratch.h"
#include "kv/house/kernels/house_codec.h"

#ifndef ROTUNDA_HOUSE_STORE_ONCE
#define ROTUNDA_HOUSE_STORE_ONCE
namespace rotunda::kv::house {

/// One row to quantize: a key or a value of one token and head. Up to 16 of them lie side by side as lanes.
struct StoreLane {
  const float* y;
  int head;
  int token;  ///< within the block
  bool key;
};

/// Working memory of a batch of lanes; [16] arrays hold one number per lane.
struct StoreWork {
  float* y;         ///< [head_dim][16]
  float* residual;  ///< [head_dim][16] what feedback passes on from each channel; FeedBackRows: rows not yet coded
  float* fed;       ///< [head_dim][16] codes of one try of feedback
  float* chosen;    ///< [head_dim][16] codes of the best try so far
  uint32_t* q;      ///< [head_dim][16] the codes
  float* e;
  float* yc;
  float* cc;
  float* inverse;  ///< 0.5 / step
  float* s;        ///< yc / cc before feedback
  float* try_inverse;
  float* try_s;
  float* cost;
  float* least;  ///< cost of the best try so far
};

/// Up to so many tokens rows of several heads share a batch; from there on the tokens of one head fill the lanes well enough.
inline constexpr int kMaxTokensByRow = 3;

}  // namespace rotunda::kv::house
#endif  // ROTUNDA_HOUSE_STORE_ONCE

HWY_BEFORE_NAMESPACE();
namespace rotunda::kv::house {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::kLanes;
using kernels::HWY_NAMESPACE::LaneTag;
using kernels::HWY_NAMESPACE::LaneVec;
using WordTag = hn::RebindToUnsigned<LaneTag>;
using WordVec = hn::Vec<WordTag>;

// Every product here is rounded before it is added (Mul, then Add), but for what feedback passes on, which is fused: all instruction sets
// give the same bytes. Sums of c^2 are exact.

/// x - f u, rounded once.
HWY_INLINE LaneVec PassOn(LaneVec f, LaneVec u, LaneVec x) {
#if HWY_NATIVE_FMA
  return hn::NegMulAdd(f, u, x);
#else
  const LaneTag d;
  HWY_ALIGN float of_f[kLanes];
  HWY_ALIGN float of_u[kLanes];
  HWY_ALIGN float of_x[kLanes];
  hn::Store(f, d, of_f);
  hn::Store(u, d, of_u);
  hn::Store(x, d, of_x);
  for (size_t i = 0; i < kLanes; ++i) of_x[i] = std::fma(-of_f[i], of_u[i], of_x[i]);
  return hn::Load(d, of_x);
#endif
}

/// The code of y as a float. A NaN becomes 0: Max returns its second argument then.
template <int kBits>
HWY_INLINE LaneVec CodeOf(LaneVec y, LaneVec inverse) {
  const LaneTag d;
  const LaneVec z = hn::Add(hn::Mul(y, inverse), hn::Set(d, static_cast<float>(1 << (kBits - 1))));
  return hn::Min(hn::Max(hn::Floor(z), hn::Zero(d)), hn::Set(d, static_cast<float>((1 << kBits) - 1)));
}

/// 2 q - (2^b - 1), exact.
template <int kBits>
HWY_INLINE LaneVec ValueOf(LaneVec q) {
  const LaneTag d;
  return hn::MulSub(q, hn::Set(d, 2.0F), hn::Set(d, static_cast<float>((1 << kBits) - 1)));
}

/// Tries candidates kFirst .. kFirst + kCount - 1 and keeps the best so far in best, inverse, yc and cc.
template <int kBits, int kFirst, int kCount>
HWY_INLINE void TrySteps(const float* HWY_RESTRICT y, int head_dim, LaneVec r, LaneVec& best, LaneVec& inverse,
                         LaneVec& yc, LaneVec& cc) {
  const LaneTag d;
  LaneVec inv[kCount];
  LaneVec sum[kCount];
  LaneVec squares[kCount];
  HWY_UNROLL(8)
  for (int k = 0; k < kCount; ++k) {
    inv[k] = hn::Div(hn::Set(d, 0.5F), hn::Mul(hn::Set(d, step_candidate(step_search(kBits), kFirst + k)), r));
    sum[k] = squares[k] = hn::Zero(d);
  }
  for (int c = 0; c < head_dim; ++c) {
    const LaneVec x = hn::Load(d, y + c * kTokenBlock);
    HWY_UNROLL(8)
    for (int k = 0; k < kCount; ++k) {
      const LaneVec value = ValueOf<kBits>(CodeOf<kBits>(x, inv[k]));
      sum[k] = hn::Add(sum[k], hn::Mul(x, value));
      squares[k] = hn::MulAdd(value, value, squares[k]);
    }
  }
  HWY_UNROLL(8)
  for (int k = 0; k < kCount; ++k) {
    const LaneVec gain = hn::Div(hn::Mul(sum[k], sum[k]), squares[k]);
    const auto better = hn::Gt(gain, best);
    best = hn::IfThenElse(better, gain, best);
    inverse = hn::IfThenElse(better, inv[k], inverse);
    yc = hn::IfThenElse(better, sum[k], yc);
    cc = hn::IfThenElse(better, squares[k], cc);
  }
}

/// Steps 1 and 2 for kLanes lanes: energy, step, codes and sums. Lanes of no energy get inverse 0, so that all their codes are +1.
template <int kBits>
HWY_NOINLINE void ChooseStep(const StoreWork& work, int head_dim, int lane) {
  const LaneTag d;
  const hn::RebindToSigned<LaneTag> di;
  const WordTag du;
  const float* const y = work.y + lane;
  LaneVec e = hn::Zero(d);
  for (int c = 0; c < head_dim; ++c) {
    const LaneVec x = hn::Load(d, y + c * kTokenBlock);
    e = hn::Add(e, hn::Mul(x, x));
  }
  const LaneVec mean = hn::Div(e, hn::Set(d, static_cast<float>(head_dim)));
  const LaneVec r = hn::Sqrt(mean);
  LaneVec best = hn::Set(d, -1.0F);
  LaneVec inverse = hn::Zero(d);
  LaneVec yc = hn::Zero(d);
  LaneVec cc = hn::Set(d, 1.0F);
  constexpr int kCount = step_search(kBits).count;
  static_assert(kCount == 5 || kCount == 6);
  if constexpr (kLanes == 16) {
    TrySteps<kBits, 0, kCount>(y, head_dim, r, best, inverse, yc, cc);
  } else {  // 16 registers
    TrySteps<kBits, 0, 3>(y, head_dim, r, best, inverse, yc, cc);
    TrySteps<kBits, 3, kCount - 3>(y, head_dim, r, best, inverse, yc, cc);
  }
  inverse = hn::IfThenElse(hn::Eq(mean, hn::Zero(d)), hn::Zero(d), inverse);
  hn::Store(e, d, work.e + lane);
  hn::Store(yc, d, work.yc + lane);
  hn::Store(cc, d, work.cc + lane);
  hn::Store(inverse, d, work.inverse + lane);
  hn::Store(hn::Div(yc, cc), d, work.s + lane);
  for (int c = 0; c < head_dim; ++c) {
    const LaneVec q = CodeOf<kBits>(hn::Load(d, y + c * kTokenBlock), inverse);
    hn::Store(hn::BitCast(du, hn::ConvertTo(di, q)), du, work.q + c * kTokenBlock + lane);
  }
}

/// Makes try number `index` of step 3 ready for kLanes lanes: its step and its scale.
template <int kBits>
HWY_NOINLINE void PrepareTry(const StoreWork& work, int head_dim, int index, int lane) {
  const LaneTag d;
  const LaneVec inverse = hn::Mul(hn::Load(d, work.inverse + lane), hn::Set(d, kFeedbackTries[index]));
  LaneVec yc = hn::Zero(d);
  LaneVec cc = hn::Zero(d);
  for (int c = 0; c < head_dim; ++c) {
    const LaneVec x = hn::Load(d, work.y + c * kTokenBlock + lane);
    const LaneVec value = ValueOf<kBits>(CodeOf<kBits>(x, inverse));
    yc = hn::Add(yc, hn::Mul(x, value));
    cc = hn::MulAdd(value, value, cc);
  }
  hn::Store(inverse, d, work.try_inverse + lane);
  hn::Store(hn::Div(yc, cc), d, work.try_s + lane);
}

/// Keeps the codes of work.fed for the lanes in which they cost less than those of the tries before.
HWY_NOINLINE void KeepBetter(const StoreWork& work, int head_dim, int index, int lane) {
  const LaneTag d;
  const LaneVec cost = hn::Load(d, work.cost + lane);
  const LaneVec least = hn::Load(d, work.least + lane);
  // Whatever the first costs is kept: the memory of `least` may hold anything before.
  const auto better = index == 0 ? hn::Eq(hn::Zero(d), hn::Zero(d)) : hn::Lt(cost, least);
  hn::Store(hn::IfThenElse(better, cost, least), d, work.least + lane);
  for (int c = 0; c < head_dim; ++c) {
    float* const chosen = work.chosen + c * kTokenBlock + lane;
    hn::Store(hn::IfThenElse(better, hn::Load(d, work.fed + c * kTokenBlock + lane), hn::Load(d, chosen)), d, chosen);
  }
}

/// The codes of one try of step 3 for kLanes lanes of one head, into work.fed, and their cost.
/// In panels of channels that stay in registers: what earlier panels pass on is subtracted first, in the order of the format.
template <int kBits>
HWY_NOINLINE void FeedBack(const StoreWork& work, const float* HWY_RESTRICT feedback, int head_dim, int lane) {
  const LaneTag d;
  constexpr int kPanel = kLanes == 16 ? 16 : 8;
  const LaneVec inverse = hn::Load(d, work.try_inverse + lane);
  const LaneVec s = hn::Load(d, work.try_s + lane);
  LaneVec cost = hn::Zero(d);
  const float* const y = work.y + lane;
  float* const residual = work.residual + lane;
  float* const fed = work.fed + lane;
  for (int base = 0; base < head_dim; base += kPanel) {
    LaneVec x[kPanel];
    HWY_UNROLL(16)
    for (int k = 0; k < kPanel; ++k) x[k] = hn::Load(d, y + (base + k) * kTokenBlock);
    for (int i = 0; i < base; ++i) {
      const LaneVec f = hn::Load(d, residual + i * kTokenBlock);
      const float* const row = feedback + int64_t{i} * head_dim + base;
      HWY_UNROLL(16)
      for (int k = 0; k < kPanel; ++k) x[k] = PassOn(f, hn::Set(d, row[k]), x[k]);
    }
    HWY_UNROLL(16)
    for (int i = 0; i < kPanel; ++i) {
      const LaneVec q = CodeOf<kBits>(x[i], inverse);
      const LaneVec f = hn::Sub(x[i], hn::Mul(s, ValueOf<kBits>(q)));
      hn::Store(q, d, fed + (base + i) * kTokenBlock);
      hn::Store(f, d, residual + (base + i) * kTokenBlock);
      const float* const row = feedback + int64_t{base + i} * head_dim + base;
      cost = hn::Add(cost, hn::Mul(hn::Mul(f, f), hn::Set(d, row[i])));
      HWY_UNROLL(16)
      for (int k = i + 1; k < kPanel; ++k) x[k] = PassOn(f, hn::Set(d, row[k]), x[k]);
    }
  }
  hn::Store(cost, d, work.cost + lane);
}

/// The same for kRows rows of any heads and tokens, lanes `first` and on: channels take the lanes. For few tokens, which would leave
/// most lanes idle; each channel waits for the one before it, so that several rows at once cost little more than one.
template <int kBits, int kRows>
HWY_NOINLINE void FeedBackRows(const StoreWork& work, const StoreLane* rows, int first, const float* feedback,
                               int head_dim) {
  const LaneTag d;
  const hn::RebindToSigned<LaneTag> di;
  float* x[kRows];
  const float* table[kRows];
  LaneVec inverse[kRows];
  LaneVec s[kRows];
  LaneVec cost[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = work.residual + int64_t{r} * head_dim;
    std::copy(rows[first + r].y, rows[first + r].y + head_dim, x[r]);
    table[r] = feedback + int64_t{rows[first + r].head} * head_dim * head_dim;
    inverse[r] = hn::Set(d, work.try_inverse[first + r]);
    s[r] = hn::Set(d, work.try_s[first + r]);
    cost[r] = hn::Zero(d);
  }
  for (int base = 0; base < head_dim; base += kLanes) {
    float f[kLanes][kRows];
    LaneVec v[kRows];
    HWY_UNROLL(4)
    for (int r = 0; r < kRows; ++r) v[r] = hn::Load(d, x[r] + base);
    for (int i = 0; i < kLanes; ++i) {
      const auto lane = hn::IndicesFromVec(d, hn::Set(di, i));
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        const LaneVec y = hn::TableLookupLanes(v[r], lane);
        const LaneVec q = CodeOf<kBits>(y, inverse[r]);
        const LaneVec residual = hn::Sub(y, hn::Mul(s[r], ValueOf<kBits>(q)));
        work.fed[(base + i) * kTokenBlock + first + r] = hn::GetLane(q);
        f[i][r] = hn::GetLane(residual);
        const float* const row = table[r] + int64_t{base + i} * head_dim + base;
        cost[r] = hn::Add(cost[r], hn::Mul(hn::Mul(residual, residual), hn::Set(d, row[i])));
        // Lanes up to i are done with; what the table holds for them does not matter.
        v[r] = PassOn(residual, hn::LoadU(d, row), v[r]);
      }
    }
    for (int c = base + kLanes; c < head_dim; c += kLanes) {
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) v[r] = hn::Load(d, x[r] + c);
      for (int i = 0; i < kLanes; ++i) {
        HWY_UNROLL(4)
        for (int r = 0; r < kRows; ++r) {
          v[r] = PassOn(hn::Set(d, f[i][r]), hn::LoadU(d, table[r] + int64_t{base + i} * head_dim + c), v[r]);
        }
      }
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) hn::Store(v[r], d, x[r] + c);
    }
  }
  for (int r = 0; r < kRows; ++r) work.cost[first + r] = hn::GetLane(cost[r]);
}

/// The rest of step 3 for kLanes lanes: takes the codes of work.chosen, and their sums, for the lanes that have their bit in `lanes` and a
/// sum above 0.
template <int kBits>
HWY_NOINLINE void TakeFed(const StoreWork& work, int head_dim, uint16_t lanes, int lane) {
  const LaneTag d;
  const hn::RebindToSigned<LaneTag> di;
  const WordTag du;
  const float* const y = work.y + lane;
  const float* const fed = work.chosen + lane;
  LaneVec yc = hn::Zero(d);
  LaneVec cc = hn::Zero(d);
  for (int c = 0; c < head_dim; ++c) {
    const LaneVec value = ValueOf<kBits>(hn::Load(d, fed + c * kTokenBlock));
    yc = hn::Add(yc, hn::Mul(hn::Load(d, y + c * kTokenBlock), value));
    cc = hn::MulAdd(value, value, cc);
  }
  const LaneVec none = hn::Zero(d);
  const LaneVec mine = kernels::HWY_NAMESPACE::IfAttended(lanes, lane, hn::Set(d, 1.0F), none);
  const auto take = hn::And(hn::Gt(mine, none), hn::Gt(yc, none));
  hn::Store(hn::IfThenElse(take, yc, hn::Load(d, work.yc + lane)), d, work.yc + lane);
  hn::Store(hn::IfThenElse(take, cc, hn::Load(d, work.cc + lane)), d, work.cc + lane);
  const auto take_words = hn::RebindMask(du, take);
  for (int c = 0; c < head_dim; ++c) {
    uint32_t* const at = work.q + c * kTokenBlock + lane;
    const WordVec q = hn::BitCast(du, hn::ConvertTo(di, hn::Load(d, fed + c * kTokenBlock)));
    hn::Store(hn::IfThenElse(take_words, q, hn::Load(du, at)), du, at);
  }
}

/// Writes the key words of the batch's key lanes.
template <int kBits>
void PackKeys(const HousePageLayout& l, const StoreWork& work, const StoreLane* rows, int n, int block,
              std::byte* page) {
  const WordTag du;
  const int head_dim = l.head_dim;
  HWY_ALIGN uint32_t words[kTokenBlock];
  const auto write = [&](int w) {
    for (int r = 0; r < n; ++r) {
      if (!rows[r].key) continue;
      std::memcpy(page + l.key_block_offset(rows[r].head, block) + (int64_t{w} * kTokenBlock + rows[r].token) * 4,
                  words + r, 4);
    }
  };
  constexpr int kLowBits = kBits == 4 ? 4 : 2;
  constexpr int kPerWord = 32 / kLowBits;
  int w = 0;
  for (int c = 0; c < head_dim; c += kPerWord, ++w) {
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      WordVec word = hn::Zero(du);
      for (int e = 0; e < kPerWord; ++e) {
        const WordVec q =
            hn::And(hn::Load(du, work.q + (c + e) * kTokenBlock + lane), hn::Set(du, (1u << kLowBits) - 1));
        word = hn::Or(word, hn::ShiftLeftSame(q, 8 * (e % 4) + kLowBits * (e / 4)));
      }
      hn::Store(word, du, words + lane);
    }
    write(w);
  }
  if constexpr (kBits == 3) {
    for (int c = 0; c < head_dim; c += 32, ++w) {
      for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
        WordVec word = hn::Zero(du);
        for (int e = 0; e < std::min(32, head_dim - c); ++e) {
          const WordVec q = hn::ShiftRight<2>(hn::Load(du, work.q + (c + e) * kTokenBlock + lane));
          word = hn::Or(word, hn::ShiftLeftSame(q, 8 * (e % 4) + e / 4));
        }
        hn::Store(word, du, words + lane);
      }
      write(w);
    }
  }
}

HWY_INLINE void SetBits(uint32_t* at, uint32_t mask, uint32_t bits) { *at = (*at & ~mask) | bits; }

/// Where a token's bits lie in the words of its block's channels.
template <int kBits>
struct TokenBits {
  explicit TokenBits(const HousePageLayout& l, int head, int block, int token)
      : row(l.value_block_offset(head, block) + (kBits == 4 && token >= 8 ? int64_t{l.head_dim} * 4 : 0)),
        shift(8 * (token % 4) + (kBits == 4 ? 4 * (token % 8 / 4) : 2 * (token / 4))),
        high_shift(8 * (token % 4) + 4 * (block % 2) + token / 4) {}
  int64_t row;
  int shift;
  int high_shift;
};

constexpr uint32_t LowMask(int bits) { return bits == 4 ? 15u : 3u; }

/// Sets one token's bits in the value words of its head.
template <int kBits>
void PackValue(const HousePageLayout& l, const StoreWork& work, const StoreLane& row, int index, int block,
               std::byte* page) {
  const TokenBits<kBits> at(l, row.head, block, row.token);
  uint32_t* const low = reinterpret_cast<uint32_t*>(page + at.row);
  const uint32_t* const q = work.q + index;
  for (int c = 0; c < l.head_dim; ++c) {
    SetBits(low + c, LowMask(kBits) << at.shift, (q[c * kTokenBlock] & LowMask(kBits)) << at.shift);
  }
  if constexpr (kBits == 3) {
    uint32_t* const high = reinterpret_cast<uint32_t*>(page + l.value_high_offset(row.head, block));
    for (int c = 0; c < l.head_dim; ++c)
      SetBits(high + c, 1u << at.high_shift, (q[c * kTokenBlock] >> 2) << at.high_shift);
  }
}

/// Sums over lanes of (q >> kDown & mask) << shift[lane], which have no bit in common.
template <int kDown>
HWY_INLINE uint32_t Gather(const uint32_t* HWY_RESTRICT q, const uint32_t* HWY_RESTRICT mask,
                           const uint32_t* HWY_RESTRICT shift) {
  const WordTag du;
  WordVec sum = hn::Zero(du);
  for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
    const WordVec bits = hn::And(hn::ShiftRight<kDown>(hn::Load(du, q + lane)), hn::Load(du, mask + lane));
    sum = hn::Or(sum, hn::Shl(bits, hn::Load(du, shift + lane)));
  }
  return hn::GetLane(hn::SumOfLanes(du, sum));
}

/// The same for a batch whose lanes are tokens of one head, a whole word at a time.
template <int kBits>
void PackValues(const HousePageLayout& l, const StoreWork& work, const StoreLane* rows, int n, int block,
                std::byte* page) {
  constexpr int kRows = kBits == 2 ? 1 : 2;  // 4 bits: both rows of the block; 3 bits: low bits, then high bits
  HWY_ALIGN uint32_t masks[kRows][kTokenBlock] = {};
  HWY_ALIGN uint32_t shifts[kRows][kTokenBlock] = {};
  uint32_t touched[kRows] = {};
  for (int r = 0; r < n; ++r) {
    const TokenBits<kBits> at(l, rows[r].head, block, rows[r].token);
    const int k = kBits == 4 ? rows[r].token / 8 : 0;
    masks[k][r] = LowMask(kBits);
    shifts[k][r] = at.shift;
    touched[k] |= LowMask(kBits) << at.shift;
    if constexpr (kBits == 3) {
      masks[1][r] = 1;
      shifts[1][r] = at.high_shift;
      touched[1] |= 1u << at.high_shift;
    }
  }
  for (int k = 0; k < kRows; ++k) {
    const int64_t offset = kBits == 3 && k == 1
                               ? l.value_high_offset(rows[0].head, block)
                               : l.value_block_offset(rows[0].head, block) + int64_t{k} * l.head_dim * 4;
    uint32_t* const words = reinterpret_cast<uint32_t*>(page + offset);
    for (int c = 0; c < l.head_dim; ++c) {
      const uint32_t* const q = work.q + c * kTokenBlock;
      SetBits(words + c, touched[k],
              kBits == 3 && k == 1 ? Gather<2>(q, masks[k], shifts[k]) : Gather<0>(q, masks[k], shifts[k]));
    }
  }
}

HWY_INLINE bool Fits(float scale) { return (to_half(scale).bits & 0x7fffu) < 0x7c00u; }

/// Step 3 for the key lanes of a batch, which come first.
template <int kBits>
void FeedBackBatch(const HouseStoreParams& p, const StoreWork& work, const StoreLane* rows, int n) {
  const int head_dim = p.layer->layout.head_dim;
  const float* const feedback = p.layer->feedback;
  int n_keys = 0;
  while (n_keys < n && rows[n_keys].key) ++n_keys;
  for (int index = 0; index < static_cast<int>(std::size(kFeedbackTries)); ++index) {
    for (int lane = 0; lane < n_keys; lane += kLanes) PrepareTry<kBits>(work, head_dim, index, lane);
    if (p.n_tokens <= kMaxTokensByRow) {
      int r = 0;
      for (; r + 4 <= n_keys; r += 4) FeedBackRows<kBits, 4>(work, rows, r, feedback, head_dim);
      for (; r < n_keys; ++r) FeedBackRows<kBits, 1>(work, rows, r, feedback, head_dim);
    } else {  // all of one head
      for (int lane = 0; lane < n_keys; lane += kLanes) {
        FeedBack<kBits>(work, feedback + int64_t{rows[0].head} * head_dim * head_dim, head_dim, lane);
      }
    }
    for (int lane = 0; lane < n_keys; lane += kLanes) KeepBetter(work, head_dim, index, lane);
  }
  const auto lanes = static_cast<uint16_t>((1u << n_keys) - 1);
  for (int lane = 0; lane < n_keys; lane += kLanes) TakeFed<kBits>(work, head_dim, lanes, lane);
}

/// Quantizes and stores a batch. Lanes of one head and kind lie side by side.
template <int kBits>
bool StoreBatch(const HouseStoreParams& p, const StoreWork& work, const StoreLane* rows, int n) {
  const HouseLayer& layer = *p.layer;
  const HousePageLayout& l = layer.layout;
  const int head_dim = l.head_dim;
  const int used = (n + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < used; ++r) {
    for (int c = 0; c < head_dim; ++c) work.y[c * kTokenBlock + r] = r < n ? rows[r].y[c] : 0.0F;
  }
  for (int lane = 0; lane < used; lane += kLanes) ChooseStep<kBits>(work, head_dim, lane);
  for (int r = 0; r < n; ++r) {
    if (!(work.e[r] < HUGE_VALF) || !Fits(work.s[r])) return false;
  }
  if (layer.feedback != nullptr) FeedBackBatch<kBits>(p, work, rows, n);
  bool one_head = true;
  bool any_key = false;
  for (int r = 0; r < n; ++r) {
    one_head &= rows[r].head == rows[0].head && !rows[r].key;
    any_key |= rows[r].key;
    const float mean = work.e[r] / static_cast<float>(head_dim);
    uint16_t bits = 0;
    if (mean != 0.0F) {
      const float scale = layer.scale == ScaleRule::kUnbiased ? work.e[r] / work.yc[r] : work.yc[r] / work.cc[r];
      if (!Fits(scale)) return false;
      bits = std::max<uint16_t>(to_half(scale).bits, 1);
    }
    const int64_t scales = rows[r].key ? l.key_scale_offset(rows[r].head) : l.value_scale_offset(rows[r].head);
    std::memcpy(p.page + scales + (int64_t{p.block} * kTokenBlock + rows[r].token) * 2, &bits, 2);
  }
  if (any_key) PackKeys<kBits>(l, work, rows, n, p.block, p.page);
  if (one_head && n > 2) {
    PackValues<kBits>(l, work, rows, n, p.block, p.page);
  } else {
    for (int r = 0; r < n; ++r) {
      if (!rows[r].key) PackValue<kBits>(l, work, rows[r], r, p.block, p.page);
    }
  }
  return true;
}

bool StoreRows(const HouseStoreParams& p, int bits, const StoreWork& work, const StoreLane* rows, int n) {
  switch (bits) {
    case 2:
      return StoreBatch<2>(p, work, rows, n);
    case 3:
      return StoreBatch<3>(p, work, rows, n);
    default:
      return StoreBatch<4>(p, work, rows, n);
  }
}

bool HouseStore(const HouseStoreParams& p) {
  static thread_local kernels::Scratch scratch;
  const HousePageLayout& l = p.layer->layout;
  const int64_t lanes = int64_t{l.head_dim} * kTokenBlock;
  float* const at = scratch.floats(5 * lanes + 9 * kTokenBlock);
  float* const each = at + 5 * lanes;
  const StoreWork work{at,
                       at + lanes,
                       at + 2 * lanes,
                       at + 3 * lanes,
                       reinterpret_cast<uint32_t*>(at + 4 * lanes),
                       each,
                       each + kTokenBlock,
                       each + 2 * kTokenBlock,
                       each + 3 * kTokenBlock,
                       each + 4 * kTokenBlock,
                       each + 5 * kTokenBlock,
                       each + 6 * kTokenBlock,
                       each + 7 * kTokenBlock,
                       each + 8 * kTokenBlock};
  // A row fills a lane. Several tokens: one head and kind after the other. Few tokens: rows of several heads, and where the bits
  // allow it keys and values, share a batch, or most lanes would be idle.
  const int heads_per_batch = p.n_tokens <= kMaxTokensByRow ? kTokenBlock / p.n_tokens : 1;
  StoreLane rows[kTokenBlock];
  int n = 0;
  for (const bool key : {true, false}) {
    const int bits = key ? l.key_bits : l.value_bits;
    for (int head = 0; head < l.n_kv_heads; ++head) {
      for (int t = 0; t < p.n_tokens; ++t) {
        rows[n++] = {(key ? p.key : p.value) + t * p.row_stride + int64_t{head} * l.head_dim, head, p.first + t, key};
      }
      const bool last_head = head + 1 == l.n_kv_heads;
      const bool mix = key && heads_per_batch > 1 && l.key_bits == l.value_bits;
      const bool full = n + p.n_tokens > std::min(kTokenBlock, heads_per_batch * p.n_tokens);
      if (full || (last_head && !mix)) {
        if (!StoreRows(p, bits, work, rows, n)) return false;
        n = 0;
      }
    }
  }
  return true;
}

/// kBits-bit codes of a word in lanes, from byte i and field j; high bits come in with `high` and their bit.
template <int kBits>
HWY_INLINE LaneVec Unpacked(WordVec low, int shift, WordVec high, int high_bit) {
  const LaneTag d;
  const hn::RebindToSigned<LaneTag> di;
  const WordTag du;
  WordVec q = hn::And(hn::ShiftRightSame(low, shift), hn::Set(du, LowMask(kBits)));
  if constexpr (kBits == 3) {
    q = hn::Or(q, hn::ShiftLeft<2>(hn::And(hn::ShiftRightSame(high, high_bit), hn::Set(du, 1))));
  }
  return ValueOf<kBits>(hn::ConvertTo(d, hn::BitCast(di, q)));
}

template <int kBits>
void LoadKeys(const HouseLoadParams& p, float* HWY_RESTRICT keys) {
  const LaneTag d;
  const WordTag du;
  const hn::Rebind<hwy::float16_t, LaneTag> d16;
  const HousePageLayout& l = p.layer->layout;
  constexpr int kPerWord = kBits == 4 ? 8 : 16;
  const auto* const words = reinterpret_cast<const uint32_t*>(p.page + l.key_block_offset(p.kv_head, p.block));
  const auto* const scales =
      reinterpret_cast<const hwy::float16_t*>(p.page + l.key_scale_offset(p.kv_head)) + p.block * kTokenBlock;
  for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
    const LaneVec scale = hn::PromoteTo(d, hn::LoadU(d16, scales + lane));
    for (int c = 0; c < l.head_dim; ++c) {
      const WordVec low = hn::Load(du, words + c / kPerWord * kTokenBlock + lane);
      const WordVec high = kBits == 3 ? hn::Load(du, words + (l.head_dim / 16 + c / 32) * kTokenBlock + lane) : low;
      const int shift = 8 * (c % 4) + (kBits == 4 ? 4 : 2) * (c % kPerWord / 4);
      const LaneVec value = Unpacked<kBits>(low, shift, high, 8 * (c % 4) + c % 32 / 4);
      hn::Store(hn::Mul(scale, value), d, keys + c * kTokenBlock + lane);
    }
  }
}

template <int kBits>
void LoadValues(const HouseLoadParams& p) {
  const LaneTag d;
  const WordTag du;
  const HousePageLayout& l = p.layer->layout;
  const auto* const high_row = reinterpret_cast<const uint32_t*>(p.page + l.value_high_offset(p.kv_head, p.block));
  for (int t = 0; t < kTokenBlock; ++t) {
    const TokenBits<kBits> at(l, p.kv_head, p.block, t);
    const auto* const row = reinterpret_cast<const uint32_t*>(p.page + at.row);
    uint16_t bits;
    std::memcpy(&bits, p.page + l.value_scale_offset(p.kv_head) + (int64_t{p.block} * kTokenBlock + t) * 2, 2);
    const LaneVec scale = hn::Set(d, to_float(Half{bits}));
    for (int c = 0; c < l.head_dim; c += kLanes) {
      const WordVec low = hn::LoadU(du, row + c);
      const WordVec high = kBits == 3 ? hn::LoadU(du, high_row + c) : low;
      hn::StoreU(hn::Mul(scale, Unpacked<kBits>(low, at.shift, high, at.high_shift)), d,
                 p.value_out + int64_t{t} * l.head_dim + c);
    }
  }
}

void HouseLoad(const HouseLoadParams& p) {
  static thread_local kernels::Scratch scratch;
  const LaneTag d;
  const HousePageLayout& l = p.layer->layout;
  const int half = l.head_dim / 2;
  float* const keys = scratch.floats(int64_t{l.head_dim} * kTokenBlock);
  switch (l.key_bits) {
    case 2:
      LoadKeys<2>(p, keys);
      break;
    case 3:
      LoadKeys<3>(p, keys);
      break;
    default:
      LoadKeys<4>(p, keys);
      break;
  }
  kernels::hadamard_lanes(p.layer->hadamard, true, keys);
  const float* const shift = p.layer->shift == nullptr ? nullptr : p.layer->shift + int64_t{p.kv_head} * l.head_dim;
  for (int i = 0; i < half; ++i) {
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      LaneVec a = hn::Load(d, keys + i * kTokenBlock + lane);
      LaneVec b = hn::Load(d, keys + (half + i) * kTokenBlock + lane);
      if (shift != nullptr) {
        const LaneVec cos = hn::LoadU(d, p.cos + i * kTokenBlock + lane);
        const LaneVec sin = hn::LoadU(d, p.sin + i * kTokenBlock + lane);
        const LaneVec first = hn::Set(d, shift[i]);
        const LaneVec second = hn::Set(d, shift[half + i]);
        a = hn::Add(a, hn::NegMulAdd(second, sin, hn::Mul(first, cos)));
        b = hn::Add(b, hn::MulAdd(first, sin, hn::Mul(second, cos)));
      }
      hn::StoreU(a, d, p.key_out + i * p.out_stride + lane);
      hn::StoreU(b, d, p.key_out + (half + i) * p.out_stride + lane);
    }
  }
  switch (l.value_bits) {
    case 2:
      LoadValues<2>(p);
      break;
    case 3:
      LoadValues<3>(p);
      break;
    default:
      LoadValues<4>(p);
      break;
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kv::house
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace rotunda::kv::house {

HWY_EXPORT(HouseStore);
HWY_EXPORT(HouseLoad);

bool house_store(const HouseStoreParams& params) { return HWY_DYNAMIC_DISPATCH(HouseStore)(params); }

void house_load(const HouseLoadParams& params) { HWY_DYNAMIC_DISPATCH(HouseLoad)(params); }

}  // namespace rotunda::kv::house
#endif  // HWY_ONCE
