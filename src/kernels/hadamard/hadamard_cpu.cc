#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/hadamard/hadamard_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/attention/token_block.h"
#include "kernels/hadamard/hadamard.h"
#include "kernels/hadamard/paley.h"
#include "kernels/scratch.h"

#ifndef ROTUNDA_HADAMARD_ONCE
#define ROTUNDA_HADAMARD_ONCE
namespace rotunda::kernels {

inline constexpr int kMaxPaley = 28;

/// The small factor as floats, times `scale`: entry [from][to].
inline void paley_table(int m, bool inverse, float scale, float* table) {
  for (int from = 0; from < m; ++from) {
    for (int to = 0; to < m; ++to) {
      table[from * m + to] = scale * static_cast<float>(inverse ? paley_entry(m, to, from) : paley_entry(m, from, to));
    }
  }
}

}  // namespace rotunda::kernels
#endif  // ROTUNDA_HADAMARD_ONCE

HWY_BEFORE_NAMESPACE();
namespace rotunda::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::CappedTag<float, kTokenBlock>;
using V = hn::Vec<D>;

constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

HWY_INLINE void Butterfly(V& a, V& b) {
  const V sum = hn::Add(a, b);
  b = hn::Sub(a, b);
  a = sum;
}

template <int kRadix>
HWY_INLINE void Butterflies(V* x) {
  if constexpr (kRadix >= 2) {
    HWY_UNROLL(8)
    for (int i = 0; i < kRadix; i += 2) Butterfly(x[i], x[i + 1]);
  }
  if constexpr (kRadix >= 4) {
    HWY_UNROLL(8)
    for (int i = 0; i < kRadix; i += 4) {
      Butterfly(x[i], x[i + 2]);
      Butterfly(x[i + 1], x[i + 3]);
    }
  }
  if constexpr (kRadix >= 8) {
    HWY_UNROLL(4)
    for (int i = 0; i < 4; ++i) Butterfly(x[i], x[i + 4]);
  }
}

/// One pass of radix kRadix at distance `step` over n rows of 16 lanes, results times `scale`.
template <int kRadix>
HWY_NOINLINE void Pass(float* HWY_RESTRICT x, int n, int step, float scale) {
  const D d;
  const V factor = hn::Set(d, scale);
  for (int base = 0; base < n; base += step * kRadix) {
    for (int i = 0; i < step * kTokenBlock; i += kLanes) {
      float* const at = x + int64_t{base} * kTokenBlock + i;
      V v[kRadix];
      HWY_UNROLL(8)
      for (int r = 0; r < kRadix; ++r) v[r] = hn::Load(d, at + int64_t{r} * step * kTokenBlock);
      Butterflies<kRadix>(v);
      HWY_UNROLL(8)
      for (int r = 0; r < kRadix; ++r) hn::Store(hn::Mul(v[r], factor), d, at + int64_t{r} * step * kTokenBlock);
    }
  }
}

/// Unnormalized Walsh-Hadamard over pow2 rows of 16 lanes, times `scale`.
void Walsh(float* x, int pow2, float scale) {
  int step = 1;
  if (pow2 == 1) {
    if (scale != 1.0F) Pass<1>(x, 1, 1, scale);
    return;
  }
  while (step < pow2) {
    const int left = pow2 / step;
    // Radix 8 as long as it leaves something that fits; 16 = 4 * 4 needs no pass of radix 2.
    const int radix = left == 2 ? 2 : (left == 4 || left == 16) ? 4 : 8;
    const float factor = step * radix == pow2 ? scale : 1.0F;
    if (radix == 2) Pass<2>(x, pow2, step, factor);
    if (radix == 4) Pass<4>(x, pow2, step, factor);
    if (radix == 8) Pass<8>(x, pow2, step, factor);
    step *= radix;
  }
}

/// Multiplies the small factor in: rows i * pow2 + j over i, for every j.
void Paley(const float* HWY_RESTRICT table, int m, int pow2, float* HWY_RESTRICT x) {
  const D d;
  HWY_ALIGN float in[kMaxPaley * kTokenBlock];
  for (int j = 0; j < pow2; ++j) {
    for (int i = 0; i < m; ++i) std::memcpy(in + i * kTokenBlock, x + (int64_t{i} * pow2 + j) * kTokenBlock, sizeof(float) * kTokenBlock);
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      for (int to = 0; to < m; to += 4) {  // m is a multiple of 4
        V sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
        for (int from = 0; from < m; ++from) {
          const V v = hn::Load(d, in + from * kTokenBlock + lane);
          const float* const factor = table + from * m + to;
          for (int k = 0; k < 4; ++k) sum[k] = hn::MulAdd(v, hn::Set(d, factor[k]), sum[k]);
        }
        for (int k = 0; k < 4; ++k) hn::Store(sum[k], d, x + (int64_t{to + k} * pow2 + j) * kTokenBlock + lane);
      }
    }
  }
}

void Lanes(const HadamardPlan& plan, const float* table, float* x) {
  const int size = plan.m * plan.pow2;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  for (int block = 0; block < plan.blocks; ++block) {
    float* const at = x + int64_t{block} * size * kTokenBlock;
    if (plan.m == 1) {
      Walsh(at, plan.pow2, scale);
    } else {
      for (int i = 0; i < plan.m; ++i) Walsh(at + int64_t{i} * plan.pow2 * kTokenBlock, plan.pow2, 1.0F);
      Paley(table, plan.m, plan.pow2, at);
    }
  }
}

void HadamardLanes(const HadamardPlan& plan, bool inverse, float* x) {
  float table[kMaxPaley * kMaxPaley];
  if (plan.m > 1) paley_table(plan.m, inverse, static_cast<float>(1.0 / std::sqrt(static_cast<double>(plan.m) * plan.pow2)), table);
  Lanes(plan, table, x);
}

#if HWY_TARGET == HWY_SCALAR
void Walsh16(float* x, int64_t n) {
  for (int64_t base = 0; base < n; base += 16) {
    for (int step = 1; step < 16; step *= 2) {
      for (int i = 0; i < 16; ++i) {
        if ((i & step) != 0) continue;
        const float a = x[base + i];
        const float b = x[base + i + step];
        x[base + i] = a + b;
        x[base + i + step] = a - b;
      }
    }
  }
}
#else
/// Unnormalized Walsh-Hadamard of size 16 over every 16 neighbouring elements; n a multiple of 16.
void Walsh16(float* x, int64_t n) {
  const D d;
  HWY_ALIGN static constexpr float kSigns[4][16] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                                    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                                    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                                    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
  const V sign1 = hn::Load(d, kSigns[0]);
  const V sign2 = hn::Load(d, kSigns[1]);
  [[maybe_unused]] const V sign4 = hn::Load(d, kSigns[2]);
  [[maybe_unused]] const V sign8 = hn::Load(d, kSigns[3]);
  for (int64_t base = 0; base < n; base += 16) {
    V v[16 / kLanes];
    for (int k = 0; k < 16 / kLanes; ++k) {
      V a = hn::LoadU(d, x + base + k * kLanes);
      a = hn::MulAdd(a, sign1, hn::Shuffle2301(a));
      a = hn::MulAdd(a, sign2, hn::Shuffle1032(a));
      if constexpr (kLanes >= 8) {
        a = hn::MulAdd(a, sign4, hn::SwapAdjacentBlocks(a));
      }
      if constexpr (kLanes == 16) {
        a = hn::MulAdd(a, sign8, hn::ConcatLowerUpper(d, a, a));
      }
      v[k] = a;
    }
    if constexpr (kLanes == 8) Butterflies<2>(v);
    if constexpr (kLanes == 4) Butterflies<4>(v);
    for (int k = 0; k < 16 / kLanes; ++k) hn::StoreU(v[k], d, x + base + k * kLanes);
  }
}
#endif

void HadamardRows(const HadamardPlan& plan, bool inverse, float* x, int64_t n_rows, int64_t row_stride) {
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(plan.m) * plan.pow2));
  float table[kMaxPaley * kMaxPaley];
  if (plan.m > 1) paley_table(plan.m, inverse, scale, table);
  static thread_local Scratch scratch;
  const int64_t n = plan.n;
  if (plan.pow2 >= 16) {
    // A row of n is n / 16 rows of 16 lanes: W_16 goes over the lanes, the rest over the rows.
    const int size = plan.m * plan.pow2;
    const int pow2 = plan.pow2 / 16;
    float* const line = scratch.floats(n);
    for (int64_t row = 0; row < n_rows; ++row) {
      float* const to = x + row * row_stride;
      std::memcpy(line, to, sizeof(float) * n);
      Walsh16(line, n);
      for (int block = 0; block < plan.blocks; ++block) {
        float* const at = line + int64_t{block} * size;
        if (plan.m == 1) {
          Walsh(at, pow2, scale);
          continue;
        }
        for (int i = 0; i < plan.m; ++i) Walsh(at + int64_t{i} * plan.pow2, pow2, 1.0F);
        Paley(table, plan.m, pow2, at);
      }
      std::memcpy(to, line, sizeof(float) * n);
    }
    return;
  }
  float* const lanes = scratch.floats(n * kTokenBlock);
  for (int64_t first = 0; first < n_rows; first += kTokenBlock) {
    const int64_t count = std::min<int64_t>(kTokenBlock, n_rows - first);
    std::fill_n(lanes, n * kTokenBlock, 0.0F);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < n; ++i) lanes[i * kTokenBlock + r] = x[(first + r) * row_stride + i];
    }
    Lanes(plan, table, lanes);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < n; ++i) x[(first + r) * row_stride + i] = lanes[i * kTokenBlock + r];
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace rotunda::kernels {

HWY_EXPORT(HadamardLanes);
HWY_EXPORT(HadamardRows);

void hadamard_lanes(const HadamardPlan& plan, bool inverse, float* x) { HWY_DYNAMIC_DISPATCH(HadamardLanes)(plan, inverse, x); }

void hadamard_rows(const HadamardPlan& plan, bool inverse, float* x, int64_t n_rows, int64_t row_stride) {
  HWY_DYNAMIC_DISPATCH(HadamardRows)(plan, inverse, x, n_rows, row_stride);
}

}  // namespace rotunda::kernels
#endif  // HWY_ONCE
