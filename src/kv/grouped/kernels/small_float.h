#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace rotunda::kv::grouped {

/// A float of a few bits without infinities: sign, exponent, mantissa; exponent field 0 holds subnormals.
struct SmallFloat {
  int mantissa_bits;
  int min_exponent;  ///< of normal numbers
  double max;

  /// Nearest code, ties to the even mantissa, saturating. `x` is finite.
  uint32_t encode(double x, int bits) const {
    const uint32_t sign = std::signbit(x) ? 1u << (bits - 1) : 0u;
    const double magnitude = std::min(std::fabs(x), max);
    if (magnitude == 0.0) return sign;
    const int exponent = std::max(std::ilogb(magnitude), min_exponent);
    const double ulp = std::ldexp(1.0, exponent - mantissa_bits);
    // Mantissa and exponent field are neighbours: what rounds up to the next power of two carries into the exponent.
    const auto steps = static_cast<uint32_t>(std::nearbyint(magnitude / ulp));
    return sign | (steps + (static_cast<uint32_t>(exponent - min_exponent) << mantissa_bits));
  }

  double decode(uint32_t code, int bits) const {
    const uint32_t magnitude = code & ((1u << (bits - 1)) - 1);
    const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
    const auto field = static_cast<int>(magnitude >> mantissa_bits);
    const double steps = field == 0 ? mantissa : mantissa + (1u << mantissa_bits);
    const double value = std::ldexp(steps, std::max(field - 1, 0) + min_exponent - mantissa_bits);
    return (code >> (bits - 1) & 1) != 0 ? -value : value;
  }
};

inline constexpr SmallFloat kE2m1{1, 0, 6.0};
inline constexpr SmallFloat kE2m3{3, 0, 7.5};
inline constexpr SmallFloat kE4m3{3, -6, 448.0};

}  // namespace rotunda::kv::grouped
