#pragma once

// What the kernels use of CUDA C++, for the CPU; see warps.h.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "base/half.h"
#include "warps.h"

#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__

// ---- types -----------------------------------------------------------------------------------------------------------

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __float2half_rn(float x) { return {rotunda::to_half(x).bits}; }
inline float __half2float(__half x) { return rotunda::to_float(rotunda::Half{x.bits}); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {rotunda::to_bfloat16(x).bits}; }
inline float __bfloat162float(__nv_bfloat16 x) { return rotunda::to_float(rotunda::BFloat16{x.bits}); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim;

// ---- arithmetic ------------------------------------------------------------------------------------------------------

using std::max;
using std::min;

using std::isfinite;

// Compile with -ffp-contract=off: these are one rounding each.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fadd_rd(float x, float y) {
  const double sum = static_cast<double>(x) + y;
  const auto nearest = static_cast<float>(sum);
  return nearest > sum ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * i & 7)) & 255) << 8 * i;
  return result;
}

// ---- memory and threads ----------------------------------------------------------------------------------------------

template <typename T>
T __ldcg(const T* at) {
  return *at;
}
inline void __syncwarp() { rotunda::emulation::Block::current().exchange({}); }
inline void __syncthreads() {
  rotunda::emulation::Block::current().thread().at_barrier = true;
  rotunda::emulation::Block::current().yield();
}

template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof(T));
  const uint64_t other = rotunda::emulation::Block::current().exchange({word})[0][lane & 31];
  std::memcpy(&x, &other, sizeof(T));
  return x;
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T x, int mask) {
  return __shfl_sync(lanes, x, static_cast<int>(rotunda::emulation::Block::current().lane()) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto& words = rotunda::emulation::Block::current().exchange({x});
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(words[0][i]) << i;
  return result;
}

namespace rotunda::emulation {

/// Runs `body` as a kernel of n_blocks blocks, one after the other.
template <typename Body>
void launch(unsigned n_blocks, unsigned n_threads, const Body& body) {
  gridDim.x = n_blocks;
  for (blockIdx.x = 0; blockIdx.x < n_blocks; ++blockIdx.x) {
    Block block(n_threads, body);
    block.run([](unsigned index) { threadIdx.x = index; });
  }
}

}  // namespace rotunda::emulation
