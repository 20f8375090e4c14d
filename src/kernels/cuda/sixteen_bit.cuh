#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rotunda::kernels {

/// 16-bit floats by their names: rounding to nearest even, widening, bits.
template <typename T>
struct SixteenBit;
template <>
struct SixteenBit<__half> {
  static __device__ __forceinline__ __half round(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ uint32_t bits(__half x) { return __half_as_ushort(x); }
};
template <>
struct SixteenBit<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ uint32_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
};

/// The same for code that knows fp32 too.
template <typename T>
__device__ __forceinline__ float widen(T x) {
  return SixteenBit<T>::widen(x);
}
template <>
__device__ __forceinline__ float widen(float x) {
  return x;
}
template <typename T>
__device__ __forceinline__ T round_to(float x) {
  return SixteenBit<T>::round(x);
}
template <>
__device__ __forceinline__ float round_to(float x) {
  return x;
}

/// Four floats as T, the first in the lowest half.
template <typename T>
__device__ __forceinline__ uint2 four_of(float4 x) {
  using Convert = SixteenBit<T>;
  return make_uint2(Convert::bits(Convert::round(x.x)) | Convert::bits(Convert::round(x.y)) << 16,
                    Convert::bits(Convert::round(x.z)) | Convert::bits(Convert::round(x.w)) << 16);
}

/// Two floats as T side by side, the first in the low half, or what T leaves over of them.
template <typename T>
__device__ __forceinline__ uint32_t pack_two(float x, float y, bool rest) {
  using Convert = SixteenBit<T>;
  const T rounded_x = Convert::round(x);
  const T rounded_y = Convert::round(y);
  if (!rest) return Convert::bits(rounded_x) | Convert::bits(rounded_y) << 16;
  return Convert::bits(Convert::round(x - Convert::widen(rounded_x))) | Convert::bits(Convert::round(y - Convert::widen(rounded_y))) << 16;
}

/// Eight floats as T to where they are aligned together.
template <typename T>
__device__ __forceinline__ void write_eight(T* to, const float (&x)[8]) {
  if constexpr (sizeof(T) == 4) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *reinterpret_cast<uint4*>(to) = {pack_two<T>(x[0], x[1], false), pack_two<T>(x[2], x[3], false), pack_two<T>(x[4], x[5], false),
                                     pack_two<T>(x[6], x[7], false)};
  }
}

}  // namespace rotunda::kernels
