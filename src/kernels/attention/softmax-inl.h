// One step of the online softmax, per instruction set: included by *_cpu.cc files inside Highway's foreach_target loop.

#if defined(ROTUNDA_KERNELS_ATTENTION_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROTUNDA_KERNELS_ATTENTION_SOFTMAX_INL_H_
#undef ROTUNDA_KERNELS_ATTENTION_SOFTMAX_INL_H_
#else
#define ROTUNDA_KERNELS_ATTENTION_SOFTMAX_INL_H_
#endif

#include <cmath>
#include <limits>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/attention/token_block.h"

HWY_BEFORE_NAMESPACE();
namespace rotunda::kernels {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using LaneTag = hn::CappedTag<float, kTokenBlock>;
using LaneVec = hn::Vec<LaneTag>;

/// Lanes of a vector, 1, 4, 8 or 16: a block of tokens is kTokenBlock / kLanes vectors.
constexpr int kLanes = static_cast<int>(hn::MaxLanes(LaneTag()));

/// 1 << t for the lanes of a block, to test the bits of a mask.
HWY_ALIGN constexpr uint32_t kLaneBits[kTokenBlock] = {1u << 0, 1u << 1, 1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
                                                       1u << 8, 1u << 9, 1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15};

/// x where the lane's token (lane + i of the block) has its bit in `mask`, else `other`.
HWY_INLINE LaneVec IfAttended(uint16_t mask, int lane, LaneVec x, LaneVec other) {
  const LaneTag d;
  const hn::RebindToUnsigned<LaneTag> du;
  const auto attended = hn::TestBit(hn::Set(du, mask), hn::Load(du, kLaneBits + lane));
  return hn::IfThenElse(hn::MaskFromVec(hn::BitCast(d, hn::VecFromMask(du, attended))), x, other);
}

/// Takes scores of one head into its running softmax: turns them into weights exp(score - new maximum) and brings sum and
/// acc to the new maximum. Tokens left out have score -inf and get weight 0; at least one score is finite.
/// @param scores [n], 64-byte aligned, n a multiple of kTokenBlock
HWY_INLINE void SoftmaxStep(float* HWY_RESTRICT scores, int n, float* max, float* sum, float* HWY_RESTRICT acc, int head_dim) {
  const LaneTag d;
  LaneVec top = hn::Load(d, scores);
  for (int i = kLanes; i < n; i += kLanes) top = hn::Max(top, hn::Load(d, scores + i));
  const float old_max = *max;
  const float new_max = HWY_MAX(old_max, hn::GetLane(hn::MaxOfLanes(d, top)));
  const LaneVec minus = hn::Set(d, new_max);
  LaneVec total = hn::Zero(d);
  for (int i = 0; i < n; i += kLanes) {
    const LaneVec weight = hn::Exp(d, hn::Sub(hn::Load(d, scores + i), minus));
    hn::Store(weight, d, scores + i);
    total = hn::Add(total, weight);
  }
  float kept = *sum;
  if (old_max != new_max) {
    const float keep = std::exp(old_max - new_max);  // 0 for a state that has seen nothing
    kept *= keep;
    const LaneVec factor = hn::Set(d, keep);
    for (int c = 0; c < head_dim; c += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, acc + c), factor), d, acc + c);
    *max = new_max;
  }
  *sum = kept + hn::GetLane(hn::SumOfLanes(d, total));
}

}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kernels
HWY_AFTER_NAMESPACE();

#endif
