#include "base/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace rotunda {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

// The compiler's own conversions are the reference: neither shares code with base/half.h.
uint16_t reference_half(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
float reference_float(uint16_t half) { return static_cast<float>(std::bit_cast<_Float16>(half)); }

// Of the two bfloat16 around x, the nearer one by exact arithmetic in double; ties go to the even one. The one above
// the largest stands for 2^128.
uint16_t reference_bfloat16(float x) {
  const uint16_t towards_zero = static_cast<uint16_t>(bits_of(x) >> 16);
  const auto value = [](uint32_t magnitude) {
    return magnitude == 0x7f80 ? 0x1p128 : static_cast<double>(std::bit_cast<float>(magnitude << 16));
  };
  const uint32_t below = towards_zero & 0x7fffu;
  const double down = std::abs(static_cast<double>(x)) - value(below);
  const double up = value(below + 1) - std::abs(static_cast<double>(x));
  const bool rounds_up = up < down || (up == down && (below & 1) != 0);
  return static_cast<uint16_t>(towards_zero + (rounds_up ? 1 : 0));
}

struct Row {
  float value;
  uint16_t half;
  uint16_t bfloat16;
};

// Worked out by hand from IEEE 754: sign, exponent, fraction.
TEST(Half, Table) {
  const Row rows[] = {
      {0.0f, 0x0000, 0x0000},
      {-0.0f, 0x8000, 0x8000},
      {1.0f, 0x3c00, 0x3f80},
      {-2.0f, 0xc000, 0xc000},
      {0.5f, 0x3800, 0x3f00},
      {1.0f / 3.0f, 0x3555, 0x3eab},
      {65504.0f, 0x7bff, 0x4780},
      {65519.996f, 0x7bff, 0x4780},
      {65520.0f, 0x7c00, 0x4780},  // halfway to 2^16: the tie goes to the even one, infinity
      {0x1p-14f, 0x0400, 0x3880},  // smallest normal half
      {0x1p-24f, 0x0001, 0x3380},  // smallest subnormal half
      {0x1p-25f, 0x0000, 0x3300},  // halfway to it: the tie goes to zero
      {0x1.8p-25f, 0x0001, 0x3340},
      {0x1.ff8p-15f, 0x03ff, 0x3880},  // largest subnormal half
      {0x1.ffcp-15f, 0x0400, 0x3880},  // halfway between it and the smallest normal one
      {3.0e38f, 0x7c00, 0x7f62},
      {std::numeric_limits<float>::max(), 0x7c00, 0x7f80},
      {std::numeric_limits<float>::denorm_min(), 0x0000, 0x0000},
      {kInf, 0x7c00, 0x7f80},
      {-kInf, 0xfc00, 0xff80},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(to_half(row.value).bits, row.half) << row.value;
    EXPECT_EQ(to_bfloat16(row.value).bits, row.bfloat16) << row.value;
  }
}

TEST(Half, EveryHalfToFloatAndBack) {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const Half half{static_cast<uint16_t>(i)};
    const float value = to_float(half);
    if (std::isnan(reference_float(half.bits))) {
      ASSERT_TRUE(std::isnan(value)) << i;
      ASSERT_TRUE(std::isnan(to_float(to_half(value)))) << i;
      ASSERT_EQ(to_half(value).bits & 0x8000, half.bits & 0x8000) << i;
    } else {
      ASSERT_EQ(bits_of(value), bits_of(reference_float(half.bits))) << i;
      ASSERT_EQ(to_half(value).bits, half.bits) << i;
    }
  }
}

TEST(Half, EveryBoundaryBetweenHalves) {
  for (uint32_t i = 0; i < 0x7c00; ++i) {
    const float low = to_float(Half{static_cast<uint16_t>(i)});
    const float high = i + 1 == 0x7c00 ? 65536.0f : to_float(Half{static_cast<uint16_t>(i + 1)});
    const float middle = (low + high) / 2;  // exact: a float has 13 more bits
    for (const float x : {low, std::nextafter(low, kInf), std::nextafter(middle, 0.0f), middle,
                          std::nextafter(middle, kInf), std::nextafter(high, 0.0f)}) {
      ASSERT_EQ(to_half(x).bits, reference_half(x)) << x;
      ASSERT_EQ(to_half(-x).bits, reference_half(-x)) << -x;
    }
  }
}

TEST(Half, RandomFloatsEqualTheCompilersRounding) {
  std::mt19937 random(1);
  for (int i = 0; i < 2'000'000; ++i) {
    // Half of them in and around the range of a half, the rest any bits.
    uint32_t bits = static_cast<uint32_t>(random());
    if (i % 2 == 0) bits = (bits & 0x807fffffu) | (100 + bits % 45) << 23;
    const float x = std::bit_cast<float>(bits);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(to_float(to_half(x)))) << bits;
    } else {
      ASSERT_EQ(to_half(x).bits, reference_half(x)) << bits;
    }
  }
}

TEST(Half, NansStayNans) {
  // The payload may be only in bits that the conversion drops.
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0x7fc00000u, 0x7f801000u}) {
    const float nan = std::bit_cast<float>(bits);
    EXPECT_TRUE(std::isnan(to_float(to_half(nan)))) << bits;
    EXPECT_TRUE(std::isnan(to_float(to_bfloat16(nan)))) << bits;
    EXPECT_EQ(std::signbit(to_float(to_half(nan))), std::signbit(nan)) << bits;
    EXPECT_EQ(std::signbit(to_float(to_bfloat16(nan))), std::signbit(nan)) << bits;
  }
  EXPECT_TRUE(std::isnan(to_float(kNan)));
}

TEST(BFloat16, EveryBFloat16ToFloatAndBack) {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const BFloat16 x{static_cast<uint16_t>(i)};
    float value;
    const uint32_t expected = i << 16;
    std::memcpy(&value, &expected, sizeof(value));
    ASSERT_EQ(bits_of(to_float(x)), expected);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(to_float(to_bfloat16(value)))) << i;
    } else {
      ASSERT_EQ(to_bfloat16(value).bits, x.bits) << i;
    }
  }
}

TEST(BFloat16, RoundsToNearestEven) {
  for (uint32_t i = 0; i < 0x7f80; ++i) {  // around every boundary
    for (const uint32_t low : {0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float x = std::bit_cast<float>(i << 16 | low);
      ASSERT_EQ(to_bfloat16(x).bits, reference_bfloat16(x)) << x;
      ASSERT_EQ(to_bfloat16(-x).bits, reference_bfloat16(-x)) << -x;
    }
  }
  std::mt19937 random(2);
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (!std::isfinite(x)) continue;
    ASSERT_EQ(to_bfloat16(x).bits, reference_bfloat16(x)) << x;
  }
}

}  // namespace
}  // namespace rotunda
