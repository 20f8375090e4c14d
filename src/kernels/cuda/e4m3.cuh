#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rotunda::kernels {

/// e4m3 numbers as fp16, exact: the number over kUnit. Subnormals too; NaN (which no format of ours writes) only where kUnit is 1.
struct HalvesOfE4m3 {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  static constexpr float kUnit = 1.0F;

  /// @param low of the bytes 0 and 1 of the word, the first in the low half   @param high of 2 and 3
  static __device__ __forceinline__ void split(uint32_t word, uint32_t& low, uint32_t& high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
  }
#else
  // Exponent and mantissa in the place of fp16's, whose exponent is biased by 15 and not by 7.
  static constexpr float kUnit = 256.0F;

  static __device__ __forceinline__ void split(uint32_t word, uint32_t& low, uint32_t& high) {
    low = spread(__byte_perm(word, 0, 0x1404));
    high = spread(__byte_perm(word, 0, 0x3424));
  }

 private:
  /// @param bytes in the upper bytes of the halves
  static __device__ __forceinline__ uint32_t spread(uint32_t bytes) { return (bytes & 0x80008000U) | (bytes >> 1 & 0x3f803f80U); }
#endif
};

}  // namespace rotunda::kernels
