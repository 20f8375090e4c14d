#pragma once

#include <cstdint>

#include "kernels/attention/paged_decode.h"

namespace rotunda::kv::rotate {

/// What rotate_decode_cuda is made for: 2 bits, rotation groups of four kv heads, four query heads each (fewer: queries of zeros beside
/// them), every head's values in one quantization group.
inline constexpr int kRotateHeadDim = 128;
inline constexpr int kRotateHeads = 4;
inline constexpr int kRotateQueries = 4;
/// Units of pages, for paged_decode_units.
inline constexpr int kRotateUnitTokens = 16;
/// Quantization groups of a layer's keys: for so many shared memory has room for a unit's scales, for so many four times, which spares
/// bank conflicts.
inline constexpr int kRotateMostGroups = 48;
inline constexpr int kRotateCopiedGroups = 16;

/// Bytes from the scales of one group to those of the next.
constexpr int rotate_scale_stride(int groups) { return groups <= kRotateCopiedGroups ? 256 : 64; }
/// PagedRotate::key_offsets of a channel in quantization group `group` of `groups`.
constexpr uint16_t rotate_key_offset(int group, int groups) { return static_cast<uint16_t>(group * rotate_scale_stride(groups)); }

/// What the skeleton gets: a rotation group as one kv head with all the query heads of its four.
inline kernels::PagedDecode rotate_of_groups(kernels::PagedDecode p) {
  p.n_kv_heads /= kRotateHeads;
  p.n_q *= kRotateHeads;
  p.exact_pieces = kRotateHeads;
  return p;
}

/// Where PagedRotate::token_table [128][16] uint4 has cos and sin of a place and RoPE pair: in fp16, index in 16-bit numbers, sin two
/// further than cos. Pair 16 t + 8 p + 4 x + u stands in piece 4 (2 x + u / 2) + t, word 2 (u % 2), half p.
constexpr int64_t rotate_turn_place(int place, int pair) {
  const int t = pair / 16;
  const int p = pair / 8 % 2;
  const int x = pair / 4 % 2;
  const int u = pair % 4;
  return (int64_t{place} * 16 + 4 * (2 * x + u / 2) + t) * 8 + u % 2 * 4 + p;
}

}  // namespace rotunda::kv::rotate
