#include "kv/grouped/grouped_format.h"
#include "kv/kv_registry.h"

namespace rotunda::kv {

namespace grouped {

namespace {

// bits, group (0: the head), scale, bias of its exponent, zero points
constexpr GroupedSide integers(int bits) { return {bits, 0, ScaleType::kFp16, 0, true}; }
// The smallest step is the smallest fp32, so that every power of two up to 2^105 is kept exactly.
constexpr GroupedSide mantissas(int bits) { return {bits, 32, ScaleType::kE8m0, 149, false}; }

constexpr GroupedCodec kBlockFloat{.rule = Rule::kBlockFloat, .carry = true};

// The tables that the formats share.
constexpr LevelTable kE2m1Doubled = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
// Lloyd-Max levels of a unit Gaussian on a grid of integers: the fixed point of Lloyd's iteration, times the factor up to 63 / largest
// for which rounding the levels costs least squared error (0.0001 % at 2 bits, 0.04 % at 3, 0.2 % at 4).
constexpr LevelTable kLloydMax2 = {-60, -18, 18, 60};
constexpr LevelTable kLloydMax3 = {-62, -39, -22, -7, 7, 22, 39, 62};
constexpr LevelTable kLloydMax4 = {-61, -46, -36, -28, -21, -15, -9, -3, 3, 9, 15, 21, 28, 36, 46, 61};

constexpr GroupedSide gaussian(int bits) { return {bits, 0, ScaleType::kFp16, 0, false}; }
constexpr GroupedCodec lloyd_max(const LevelTable& levels, float unit) {
  return {.levels = Levels::kTable, .rule = Rule::kNorm, .table = levels, .unit = unit};
}

constexpr ExactOptions kOscarWindow{.recent = 64, .sinks = 0, .n_first = 4};
constexpr GroupedCodec kClipped{.clip = 0.96F};

const GroupedKind kKinds[] = {
    {.name = "int2",
     .summary = "round to nearest: asymmetric 2-bit integers per token and head",
     .side = integers(2),
     .codec = {},
     .group_option = "group"},
    {.name = "int3",
     .summary = "round to nearest: asymmetric 3-bit integers per token and head",
     .side = integers(3),
     .codec = {},
     .group_option = "group"},
    {.name = "int4",
     .summary = "round to nearest: asymmetric 4-bit integers per token and head",
     .side = integers(4),
     .codec = {},
     .group_option = "group"},
    {.name = "int8",
     .summary = "round to nearest: asymmetric 8-bit integers per token and head",
     .side = integers(8),
     .codec = {},
     .group_option = "group"},
    {.name = "quarot2",
     .summary = "QuaRot (arXiv:2404.00456): 2-bit integers after a Hadamard transform per head",
     .side = integers(2),
     .codec = {},
     .basis = Basis::kHadamard,
     .group_option = "group"},
    {.name = "quarot3",
     .summary = "QuaRot (arXiv:2404.00456): 3-bit integers after a Hadamard transform per head",
     .side = integers(3),
     .codec = {},
     .basis = Basis::kHadamard,
     .group_option = "group"},
    {.name = "quarot4",
     .summary = "QuaRot (arXiv:2404.00456): 4-bit integers after a Hadamard transform per head",
     .side = integers(4),
     .codec = {},
     .basis = Basis::kHadamard,
     .group_option = "group"},
    {.name = "bfp2",
     .summary = "block floating point (arXiv:2403.20137): 2-bit mantissas, sorted channels",
     .side = mantissas(2),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp3",
     .summary = "block floating point (arXiv:2403.20137): 3-bit mantissas, sorted channels",
     .side = mantissas(3),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp4",
     .summary = "block floating point (arXiv:2403.20137): 4-bit mantissas, sorted channels",
     .side = mantissas(4),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp5",
     .summary = "block floating point (arXiv:2403.20137): 5-bit mantissas, sorted channels",
     .side = mantissas(5),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp6",
     .summary = "block floating point (arXiv:2403.20137): 6-bit mantissas, sorted channels",
     .side = mantissas(6),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp7",
     .summary = "block floating point (arXiv:2403.20137): 7-bit mantissas, sorted channels",
     .side = mantissas(7),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp8",
     .summary = "block floating point (arXiv:2403.20137): 8-bit mantissas, sorted channels",
     .side = mantissas(8),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp12",
     .summary =
         "block floating point (arXiv:2403.20137): 4-bit mantissas, sorted channels, the name of bfp4 in the paper",
     .side = mantissas(4),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "bfp16",
     .summary =
         "block floating point (arXiv:2403.20137): 8-bit mantissas, sorted channels, the name of bfp8 in the paper",
     .side = mantissas(8),
     .codec = kBlockFloat,
     .basis = Basis::kSorted,
     .group_option = "block"},
    {.name = "turbo2",
     .summary = "TurboQuant-MSE (arXiv:2504.19874): random rotation, norm, 2-bit Lloyd-Max levels",
     .side = gaussian(2),
     .codec = lloyd_max(kLloydMax2, 0.02516990F),
     .basis = Basis::kRandomRotation},
    {.name = "turbo3",
     .summary = "TurboQuant-MSE (arXiv:2504.19874): random rotation, norm, 3-bit Lloyd-Max levels",
     .side = gaussian(3),
     .codec = lloyd_max(kLloydMax3, 0.03463803F),
     .basis = Basis::kRandomRotation},
    {.name = "turbo4",
     .summary = "TurboQuant-MSE (arXiv:2504.19874): random rotation, norm, 4-bit Lloyd-Max levels",
     .side = gaussian(4),
     .codec = lloyd_max(kLloydMax4, 0.04480287F),
     .basis = Basis::kRandomRotation},
    {.name = "q8_0",
     .summary = "GGML Q8_0: 8-bit integers, 32 to a scale",
     .side = {8, 32, ScaleType::kFp16, 0, false},
     .codec = {.rule = Rule::kLargestToTop}},
    {.name = "q4_0",
     .summary = "GGML Q4_0: 4-bit integers, 32 to a scale",
     .side = {4, 32, ScaleType::kFp16, 0, false},
     .codec = {.rule = Rule::kSignedLargest}},
    {.name = "fp8",
     .summary = "fp8 e4m3 with one fp16 scale per token and head",
     .side = {8, 0, ScaleType::kFp16, 0, false},
     .codec = {.levels = Levels::kE4m3, .rule = Rule::kLargestToTop}},
    {.name = "mxint8",
     .summary = "OCP MXINT8: 8-bit integers, 32 to a power of two",
     .side = {8, 32, ScaleType::kE8m0, 133, false},
     .codec = {.rule = Rule::kBlockFloat, .symmetric = true}},
    {.name = "mxfp8",
     .summary = "OCP MXFP8: e4m3, 32 to a power of two",
     .side = {8, 32, ScaleType::kE8m0, 127, false},
     .codec = {.levels = Levels::kE4m3, .rule = Rule::kMicroscaling}},
    {.name = "mxfp6",
     .summary = "OCP MXFP6: e2m3, 32 to a power of two",
     .side = {6, 32, ScaleType::kE8m0, 127, false},
     .codec = {.levels = Levels::kE2m3, .rule = Rule::kMicroscaling, .unit = 0.125F}},
    {.name = "mxfp4",
     .summary = "OCP MXFP4: e2m1, 32 to a power of two",
     .side = {4, 32, ScaleType::kE8m0, 127, false},
     .codec = {.levels = Levels::kTable, .rule = Rule::kMicroscaling, .table = kE2m1Doubled, .unit = 0.5F}},
    {.name = "nvfp4",
     .summary = "NVFP4: e2m1, 16 to an e4m3 scale",
     .side = {4, 16, ScaleType::kE4m3, 0, false},
     .codec = {.levels = Levels::kTable, .rule = Rule::kLargestToTop, .table = kE2m1Doubled, .unit = 0.5F}},
    {.name = "oscar2",
     .summary = "OSCAR (arXiv:2605.17757): 2-bit integers in attention-aware bases, by calibration",
     .side = integers(2),
     .codec = kClipped,
     .basis = Basis::kAttentionAware,
     .value_clip = 0.92F,
     .exact = kOscarWindow},
    {.name = "oscar3",
     .summary = "OSCAR (arXiv:2605.17757): 3-bit integers in attention-aware bases, by calibration",
     .side = integers(3),
     .codec = kClipped,
     .basis = Basis::kAttentionAware,
     .value_clip = 0.92F,
     .exact = kOscarWindow},
    {.name = "oscar4",
     .summary = "OSCAR (arXiv:2605.17757): 4-bit integers in attention-aware bases, by calibration",
     .side = integers(4),
     .codec = kClipped,
     .basis = Basis::kAttentionAware,
     .value_clip = 0.92F,
     .exact = kOscarWindow},
};

}  // namespace

const GroupedKind* find_kind(std::string_view name) {
  for (const GroupedKind& kind : kKinds)
    if (name == kind.name) return &kind;
  return nullptr;
}

}  // namespace grouped

void register_grouped(KvRegistry& registry) {
  for (const grouped::GroupedKind& kind : grouped::kKinds) registry.add(std::make_unique<grouped::GroupedFormat>(kind));
}

}  // namespace rotunda::kv
