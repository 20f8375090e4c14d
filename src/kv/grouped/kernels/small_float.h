#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/host_device.h"

namespace rotunda::kv::grouped {

// Arithmetic that a CPU and a GPU have in common to the last bit: no function of a library but those that IEEE 754 defines.

/// 2^exponent, from -1022 to 1023.
constexpr double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}
/// The largest e with 2^e <= |x|. `x` is normal, as every fp32 number but 0 is in fp64.
constexpr int exponent_of(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x) >> 52 & 0x7ff) - 1023; }
/// The nearest integer, ties to even, of |x| < 2^51: std::nearbyint without the call.
constexpr double round_even(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

/// A float of a few bits without infinities: sign, exponent, mantissa; exponent field 0 holds subnormals.
/// @tparam kMinExponent of normal numbers   @tparam kLargest code of the largest number
template <int kBits, int kMantissaBits, int kMinExponent, uint32_t kLargest>
struct SmallFloat {
  static constexpr double decode(uint32_t code) {
    const uint32_t magnitude = code & ((1u << (kBits - 1)) - 1);
    const uint32_t mantissa = magnitude & ((1u << kMantissaBits) - 1);
    const auto field = static_cast<int>(magnitude >> kMantissaBits);
    const double steps = field == 0 ? mantissa : mantissa + (1u << kMantissaBits);
    const double value = steps * power_of_two((field > 0 ? field - 1 : 0) + kMinExponent - kMantissaBits);
    return (code >> (kBits - 1) & 1) != 0 ? -value : value;
  }

  static constexpr double max() { return decode(kLargest); }

  /// Nearest code, ties to the even mantissa, saturating. `x` is finite.
  ROTUNDA_HOST_DEVICE static uint32_t encode(double x) {
    const uint32_t sign = std::signbit(x) ? 1u << (kBits - 1) : 0u;
    const double magnitude = std::min(std::fabs(x), max());
    if (magnitude == 0.0) return sign;
    const int exponent = std::max(exponent_of(magnitude), kMinExponent);
    // Mantissa and exponent field are neighbours: what rounds up to the next power of two carries into the exponent.
    const auto steps = static_cast<uint32_t>(round_even(magnitude * power_of_two(kMantissaBits - exponent)));
    return sign | (steps + (static_cast<uint32_t>(exponent - kMinExponent) << kMantissaBits));
  }
};

using E2m1 = SmallFloat<4, 1, 0, 0x7>;    ///< up to 6
using E2m3 = SmallFloat<6, 3, 0, 0x1f>;   ///< up to 7.5
using E4m3 = SmallFloat<8, 3, -6, 0x7e>;  ///< up to 448; the code above it would be NaN

}  // namespace rotunda::kv::grouped
