#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "base/half.h"
#include "base/host_device.h"
#include "kv/grouped/kernels/grouped_codec.h"
#include "kv/grouped/kernels/small_float.h"

// The formats in plain words: one group at a time, one scalar at a time, fp32 where it says so, fp64 elsewhere. Products of fp32
// numbers are exact in fp64. The CPU and GPUs run these very functions; compile with -ffp-contract=off, or -fmad=false.

namespace rotunda::kv::grouped {

/// What is stored beside the codes of a group.
struct GroupScale {
  uint16_t scale = 0;  ///< bits of the scale's type
  uint32_t zero = 0;   ///< a code; 0 where the format has none
};

/// The scale as a number, exact.
ROTUNDA_HOST_DEVICE inline float scale_value(const GroupedSide& side, uint16_t bits) {
  switch (side.scale) {
    case ScaleType::kFp16:
      return to_float(Half{bits});
    case ScaleType::kE8m0:
      return static_cast<float>(power_of_two(static_cast<int>(bits) - side.exponent_bias));
    case ScaleType::kE4m3:
      break;
  }
  return static_cast<float>(E4m3::decode(bits));
}

/// The integer that a code stands for, without zero point and unit; kE4m3: the number itself.
ROTUNDA_HOST_DEVICE inline double level(const GroupedSide& side, const GroupedCodec& codec, uint32_t code,
                                        uint32_t zero) {
  switch (codec.levels) {
    case Levels::kInteger:
      return static_cast<int>(code) - static_cast<int>(side.zeros ? zero : 1u << (side.bits - 1));
    case Levels::kTable:
      return codec.table[code];
    case Levels::kE2m3:
      return 8.0 * E2m3::decode(code);
    case Levels::kE4m3:
      break;
  }
  return E4m3::decode(code);
}

namespace detail {

ROTUNDA_HOST_DEVICE inline uint32_t clamped(double x, int bits) {
  return static_cast<uint32_t>(std::clamp(x, 0.0, static_cast<double>((1 << bits) - 1)));
}

/// fp16 bits of a scale, at least the smallest above 0, or nothing where it overflows.
ROTUNDA_HOST_DEVICE inline std::optional<uint16_t> fp16_scale(float scale) {
  const uint16_t bits = std::max<uint16_t>(to_half(scale).bits, 1);
  if (bits >= 0x7c00u) return {};
  return bits;
}

ROTUNDA_HOST_DEVICE inline std::optional<GroupScale> min_max(const GroupedSide& side, const GroupedCodec& codec,
                                                             const float* x, uint8_t* codes) {
  float high = 0.0F;  // zero is always among what can be decoded
  float low = 0.0F;
  for (int i = 0; i < side.group; ++i) {
    high = std::max(high, x[i]);
    low = std::min(low, x[i]);
  }
  high *= codec.clip;
  low *= codec.clip;
  const auto bits = fp16_scale((high - low) / static_cast<float>((1 << side.bits) - 1));
  if (!bits) return {};
  const float s = to_float(Half{*bits});
  const uint32_t zero = clamped(round_even(-low / s), side.bits);
  for (int i = 0; i < side.group; ++i) codes[i] = static_cast<uint8_t>(clamped(round_even(x[i] / s) + zero, side.bits));
  return GroupScale{*bits, zero};
}

/// Mantissas under step 2^exponent, and their squared error over that of the step.
ROTUNDA_HOST_DEVICE inline double mantissas(const GroupedSide& side, const GroupedCodec& codec, const float* x,
                                            int exponent, uint8_t* codes) {
  const double top = power_of_two(side.bits - 1);
  const double inverse = power_of_two(-exponent);
  double error = 0.0;
  for (int i = 0; i < side.group; ++i) {
    const double scaled = x[i] * inverse;  // exact
    const double m = std::clamp(round_even(scaled), codec.symmetric ? 1.0 - top : -top, top - 1.0);
    codes[i] = static_cast<uint8_t>(m + top);
    error += (scaled - m) * (scaled - m);
  }
  return error;
}

ROTUNDA_HOST_DEVICE inline std::optional<GroupScale> block_float(const GroupedSide& side, const GroupedCodec& codec,
                                                                 const float* x, float largest, uint8_t* codes) {
  if (largest == 0.0F) {
    for (int i = 0; i < side.group; ++i) codes[i] = static_cast<uint8_t>(1 << (side.bits - 1));
    return GroupScale{};
  }
  // 2^e > largest >= 2^(e - 1); the step is 2^(e - (m - 1)). Below the smallest step mantissas get shorter, as in subnormals.
  int exponent = std::max(exponent_of(largest) + 1 - (side.bits - 1), -side.exponent_bias);
  const double error = mantissas(side, codec, x, exponent, codes);
  const double top = power_of_two(side.bits - 1) - 1.0;
  const bool overflows = round_even(largest * power_of_two(-exponent)) > top;
  if (codec.carry && overflows) {
    // An error counts four times as much under the doubled step.
    if (4.0 * mantissas(side, codec, x, exponent + 1, codes) < error) {
      ++exponent;
    } else {
      mantissas(side, codec, x, exponent, codes);
    }
  }
  const int stored = exponent + side.exponent_bias;
  if (stored > 254) return {};
  return GroupScale{static_cast<uint16_t>(stored), 0};
}

/// The code whose level is nearest to x (in units of scale * unit); the lower of two as near.
ROTUNDA_HOST_DEVICE inline uint8_t nearest_level(const GroupedCodec& codec, int bits, double x) {
  uint32_t code = 0;
  for (uint32_t next = 1; next < 1u << bits; ++next)
    if (x > 0.5 * (codec.table[next - 1] + codec.table[next])) code = next;
  return static_cast<uint8_t>(code);
}

/// The code of x in the element format, x in units of the scale.
ROTUNDA_HOST_DEVICE inline uint8_t element_code(const GroupedCodec& codec, int bits, double x) {
  switch (codec.levels) {
    case Levels::kE2m3:
      return static_cast<uint8_t>(E2m3::encode(x));
    case Levels::kE4m3:
      return static_cast<uint8_t>(E4m3::encode(x));
    case Levels::kTable:
      return static_cast<uint8_t>(E2m1::encode(x));
    case Levels::kInteger:
      break;
  }
  // Half away from zero, as GGML rounds.
  const double top = power_of_two(bits - 1);
  return static_cast<uint8_t>(std::clamp(std::round(x), 1.0 - top, top - 1.0) + top);
}

/// The largest number of an element format.
ROTUNDA_HOST_DEVICE inline double element_top(const GroupedCodec& codec, int bits) {
  switch (codec.levels) {
    case Levels::kE2m3:
      return E2m3::max();
    case Levels::kE4m3:
      return E4m3::max();
    case Levels::kTable:
      return E2m1::max();
    case Levels::kInteger:
      break;
  }
  return power_of_two(bits - 1) - 1.0;
}

ROTUNDA_HOST_DEVICE inline std::optional<GroupScale> microscaling(const GroupedSide& side, const GroupedCodec& codec,
                                                                  const float* x, float largest, uint8_t* codes) {
  // The exponent of the largest element minus that of the largest number of the element format.
  const int bias = side.exponent_bias;
  const int wanted = largest == 0.0F ? -bias : exponent_of(largest) - exponent_of(element_top(codec, side.bits));
  const int exponent = std::clamp(wanted, -bias, 254 - bias);
  const double inverse = power_of_two(-exponent);
  for (int i = 0; i < side.group; ++i) codes[i] = element_code(codec, side.bits, x[i] * inverse);
  return GroupScale{static_cast<uint16_t>(exponent + bias), 0};
}

ROTUNDA_HOST_DEVICE inline std::optional<GroupScale> largest_to_top(const GroupedSide& side, const GroupedCodec& codec,
                                                                    const float* x, float largest, uint8_t* codes) {
  const double ratio = static_cast<double>(largest) / element_top(codec, side.bits);
  GroupScale stored;
  double divisor = 0.0;
  if (side.scale == ScaleType::kE4m3) {
    if (ratio > E4m3::max()) return {};
    stored.scale = static_cast<uint16_t>(E4m3::encode(ratio));
    divisor = E4m3::decode(stored.scale);
  } else {
    const auto bits = fp16_scale(static_cast<float>(ratio));
    if (!bits) return {};
    stored.scale = largest == 0.0F ? uint16_t{0} : *bits;
    // GGML divides by the scale as it was before fp16.
    divisor = codec.levels == Levels::kInteger ? ratio : static_cast<double>(to_float(Half{stored.scale}));
  }
  for (int i = 0; i < side.group; ++i)
    codes[i] = element_code(codec, side.bits, divisor == 0.0 ? 0.0 : static_cast<double>(x[i]) / divisor);
  return stored;
}

ROTUNDA_HOST_DEVICE inline std::optional<GroupScale> signed_largest(const GroupedSide& side, const float* x,
                                                                    uint8_t* codes) {
  float extreme = 0.0F;
  for (int i = 0; i < side.group; ++i)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  const double d = static_cast<double>(extreme) / -8.0;
  const uint16_t bits = to_half(static_cast<float>(d)).bits;
  if ((bits & 0x7fffu) >= 0x7c00u) return {};
  for (int i = 0; i < side.group; ++i)
    codes[i] = static_cast<uint8_t>(clamped(std::floor((d == 0.0 ? 0.0 : static_cast<double>(x[i]) / d) + 8.5), 4));
  return GroupScale{bits, 0};
}

/// The levels nearest to x over its root mean square; the scale is that, or what makes the decoded group as long as x.
ROTUNDA_HOST_DEVICE inline std::optional<GroupScale> norm(const GroupedSide& side, const GroupedCodec& codec,
                                                          const float* x, uint8_t* codes) {
  double energy = 0.0;
  for (int i = 0; i < side.group; ++i) energy += static_cast<double>(x[i]) * x[i];
  const double size = std::sqrt(energy / side.group);
  double coded = 0.0;
  for (int i = 0; i < side.group; ++i) {
    codes[i] = nearest_level(codec, side.bits, size == 0.0 ? 0.0 : x[i] / (size * codec.unit));
    coded += static_cast<double>(codec.table[codes[i]]) * codec.table[codes[i]];
  }
  const double scale = codec.keep_length ? std::sqrt(energy / coded) / codec.unit : size;
  const auto bits = fp16_scale(static_cast<float>(scale));
  if (!bits) return {};
  return GroupScale{energy == 0.0 ? uint16_t{0} : *bits, 0};
}

}  // namespace detail

/// Codes one group.
/// @param x [group]   @param codes [group]
/// @return nothing where an element is not finite, or the scale's type cannot hold the scale
ROTUNDA_HOST_DEVICE inline std::optional<GroupScale> quantize_group(const GroupedSide& side, const GroupedCodec& codec,
                                                                    const float* x, uint8_t* codes) {
  float largest = 0.0F;
  for (int i = 0; i < side.group; ++i) {
    if (!std::isfinite(x[i])) return {};
    largest = std::max(largest, std::fabs(x[i]));
  }
  switch (codec.rule) {
    case Rule::kMinMax:
      return detail::min_max(side, codec, x, codes);
    case Rule::kBlockFloat:
      return detail::block_float(side, codec, x, largest, codes);
    case Rule::kMicroscaling:
      return detail::microscaling(side, codec, x, largest, codes);
    case Rule::kLargestToTop:
      return detail::largest_to_top(side, codec, x, largest, codes);
    case Rule::kSignedLargest:
      return detail::signed_largest(side, x, codes);
    case Rule::kNorm:
      break;
  }
  return detail::norm(side, codec, x, codes);
}

}  // namespace rotunda::kv::grouped
