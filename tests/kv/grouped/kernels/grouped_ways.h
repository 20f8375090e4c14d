#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "kv/grouped/kernels/grouped_codec.h"

namespace rotunda::kv::grouped::testing {

inline constexpr LevelTable kE2m1Doubled = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
inline constexpr LevelTable kLevels2 = {-60, -18, 18, 60};
inline constexpr LevelTable kLevels3 = {-62, -39, -22, -7, 7, 22, 39, 62};
inline constexpr LevelTable kLevels4 = {-61, -46, -36, -28, -21, -15, -9, -3, 3, 9, 15, 21, 28, 36, 46, 61};

/// One way to code a side; `group` 0 is the head dimension.
struct Way {
  std::string name;
  GroupedSide side;
  GroupedCodec codec;
};

inline std::vector<Way> all_ways() {
  std::vector<Way> ways;
  for (const int bits : {2, 3, 4, 8})
    ways.push_back(
        {"int" + std::to_string(bits), {bits, 0, ScaleType::kFp16, 0, true}, {.clip = bits == 2 ? 0.9F : 1.0F}});
  for (int bits = 2; bits <= 8; ++bits) {
    ways.push_back({"bfp" + std::to_string(bits),
                    {bits, bits % 2 == 0 ? 16 : 0, ScaleType::kE8m0, 149, false},
                    {.rule = Rule::kBlockFloat, .symmetric = bits == 5, .carry = bits != 6}});
  }
  const LevelTable tables[] = {kLevels2, kLevels3, kLevels4};
  for (const int bits : {2, 3, 4}) {
    ways.push_back({"levels" + std::to_string(bits),
                    {bits, 0, ScaleType::kFp16, 0, false},
                    {.levels = Levels::kTable, .rule = Rule::kNorm, .table = tables[bits - 2], .unit = 0.03F}});
  }
  ways.push_back({"q8_0", {8, 16, ScaleType::kFp16, 0, false}, {.rule = Rule::kLargestToTop}});
  ways.push_back({"q4_0", {4, 16, ScaleType::kFp16, 0, false}, {.rule = Rule::kSignedLargest}});
  ways.push_back({"fp8", {8, 0, ScaleType::kFp16, 0, false}, {.levels = Levels::kE4m3, .rule = Rule::kLargestToTop}});
  ways.push_back({"mxint8", {8, 16, ScaleType::kE8m0, 133, false}, {.rule = Rule::kBlockFloat, .symmetric = true}});
  ways.push_back(
      {"mxfp8", {8, 16, ScaleType::kE8m0, 127, false}, {.levels = Levels::kE4m3, .rule = Rule::kMicroscaling}});
  ways.push_back({"mxfp6",
                  {6, 16, ScaleType::kE8m0, 127, false},
                  {.levels = Levels::kE2m3, .rule = Rule::kMicroscaling, .unit = 0.125F}});
  ways.push_back({"mxfp4",
                  {4, 0, ScaleType::kE8m0, 127, false},
                  {.levels = Levels::kTable, .rule = Rule::kMicroscaling, .table = kE2m1Doubled, .unit = 0.5F}});
  ways.push_back({"nvfp4",
                  {4, 16, ScaleType::kE4m3, 0, false},
                  {.levels = Levels::kTable, .rule = Rule::kLargestToTop, .table = kE2m1Doubled, .unit = 0.5F}});
  return ways;
}

inline const Way& way(const std::string& name) {
  static const std::vector<Way> ways = all_ways();
  return *std::find_if(ways.begin(), ways.end(), [&](const Way& w) { return w.name == name; });
}

inline GroupedSide sized(GroupedSide side, int head_dim) {
  if (side.group == 0) side.group = head_dim;
  return side;
}

inline GroupedLayer layer_of(const Way& key, const Way& value, int heads, int head_dim, int blocks = 2) {
  return {{sized(key.side, head_dim), sized(value.side, head_dim), heads, head_dim, blocks}, key.codec, value.codec};
}

/// @param body called with a layer whose keys and values are coded each in its own way
template <typename Body>
void for_each_way(int heads, int head_dim, const Body& body, int blocks = 2) {
  const std::vector<Way> ways = all_ways();
  for (size_t i = 0; i < ways.size(); ++i) {
    // fp8 is all floats or none.
    const bool floats = ways[i].codec.levels == Levels::kE4m3;
    const Way& value = floats ? ways[i] : ways[i + 1 < ways.size() ? i + 1 : 0];
    const bool fits = !floats && value.codec.levels != Levels::kE4m3;
    SCOPED_TRACE(ways[i].name + (fits ? " and " + value.name : ""));
    body(layer_of(ways[i], fits ? value : ways[i], heads, head_dim, blocks));
  }
}

inline std::vector<float> random_rows(int64_t count, unsigned seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = spread * normal(random);
  return x;
}

}  // namespace rotunda::kv::grouped::testing
