// Sums of four products of 8-bit integers in each 32-bit lane, and what goes with them, per instruction set: included by *_cpu.cc files inside Highway's
// foreach_target loop. Highway 1.0.3 has no such operation.

#if defined(ROTUNDA_KERNELS_DOT4_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROTUNDA_KERNELS_DOT4_INL_H_
#undef ROTUNDA_KERNELS_DOT4_INL_H_
#else
#define ROTUNDA_KERNELS_DOT4_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels/attention/token_block.h"

HWY_BEFORE_NAMESPACE();
namespace rotunda::kernels {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using WordTag = hn::CappedTag<uint32_t, kTokenBlock>;  ///< four bytes a lane
using WordVec = hn::Vec<WordTag>;
using IntTag = hn::RebindToSigned<WordTag>;
using IntVec = hn::Vec<IntTag>;

/// sum + codes[4 i] * factors[4 i] + ... + codes[4 i + 3] * factors[4 i + 3] for each lane i.
/// @param codes unsigned bytes up to 127, so that the sum of two products fits 16 bits  @param factors signed bytes
HWY_INLINE IntVec Dot4(IntVec sum, WordVec codes, WordVec factors) {
#if HWY_TARGET == HWY_AVX3_DL
  // Not the intrinsic: Highway's list of what this target has does not name VNNI to the compiler.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "v"(factors.raw));
  return sum;
#elif HWY_TARGET == HWY_AVX3
  const __m512i pairs = _mm512_maddubs_epi16(codes.raw, factors.raw);
  return IntVec{_mm512_add_epi32(sum.raw, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif HWY_TARGET == HWY_AVX2
  const __m256i pairs = _mm256_maddubs_epi16(codes.raw, factors.raw);
  return IntVec{_mm256_add_epi32(sum.raw, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#elif HWY_TARGET == HWY_SSE4
  const __m128i pairs = _mm_maddubs_epi16(codes.raw, factors.raw);
  return IntVec{_mm_add_epi32(sum.raw, _mm_madd_epi16(pairs, _mm_set1_epi16(1)))};
#elif HWY_TARGET == HWY_NEON && HWY_ARCH_ARM_A64
  const int8x16_t a = vreinterpretq_s8_u32(codes.raw);
  const int8x16_t b = vreinterpretq_s8_u32(factors.raw);
#if defined(__ARM_FEATURE_DOTPROD)
  return IntVec(vdotq_s32(sum.raw, a, b));
#else
  const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
  return IntVec(vpadalq_s16(sum.raw, pairs));
#endif
#else
  const IntTag di;
  const WordTag du;
  const IntVec s = hn::BitCast(di, factors);
  const WordVec byte = hn::Set(du, 255);
  sum = hn::Add(sum, hn::Mul(hn::BitCast(di, hn::And(codes, byte)), hn::ShiftRight<24>(hn::ShiftLeft<24>(s))));
  sum = hn::Add(
      sum, hn::Mul(hn::BitCast(di, hn::And(hn::ShiftRight<8>(codes), byte)), hn::ShiftRight<24>(hn::ShiftLeft<16>(s))));
  sum = hn::Add(
      sum, hn::Mul(hn::BitCast(di, hn::And(hn::ShiftRight<16>(codes), byte)), hn::ShiftRight<24>(hn::ShiftLeft<8>(s))));
  return hn::Add(sum, hn::Mul(hn::BitCast(di, hn::ShiftRight<24>(codes)), hn::ShiftRight<24>(s)));
#endif
}

/// The same with one word of factors for all lanes.
HWY_INLINE IntVec Dot4(IntVec sum, WordVec codes, const uint32_t* factors) {
#if HWY_TARGET == HWY_AVX3_DL
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "m"(*factors));
  return sum;
#else
  return Dot4(sum, codes, hn::Set(WordTag(), *factors));
#endif
}

/// The lowest byte of each lane.
HWY_INLINE void StoreLowBytes(WordVec x, uint8_t* to) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  // One instruction; Highway 1.0.3's TruncateTo gives wrong bytes with AVX3_DL.
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x.raw));
#else
  const hn::Rebind<uint8_t, WordTag> d8;
  hn::StoreU(hn::TruncateTo(d8, x), d8, to);
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kernels
HWY_AFTER_NAMESPACE();

#endif
