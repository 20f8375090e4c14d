#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"

struct float2;
struct uint2;
struct uint4;

namespace rotunda::kernels {

/// What the pages' scores get back of a constant that was taken off the keys before RoPE: for every RoPE pair i in question and the
/// position n = 128 page + j of a token, a_i cos(n w_i) + b_i sin(n w_i) with a and b of the query. That is a product of the turns of j
/// and of a and b turned by the page, eight pairs a step, both as the tensor cores want them. Device memory.
struct PagedShift {
  int n_steps = 0;  ///< eight pairs each; 0: nothing was taken off
  /// [n_kv_heads][n_steps][page_tokens / 16][2][32 lanes] left operands: cos and sin of the pairs at 16 places of a page in fp16, then
  /// what fp16 leaves over of them. Rows g and g + 8 of operand 2 i + k are tokens 32 i + 4 g + 2 k and the next.
  const uint4* turns = nullptr;
  /// [batch][n_kv_heads][pages][n_steps][1 set of up to 4 query heads, or 2][32 lanes] right operands: of query head h, over its norm,
  /// a and b turned by the page in column 2 h in fp16, and what that leaves over in column 2 h + 1.
  const uint2* queries = nullptr;
  int pages = 0;                ///< of a sequence, at most
  const float* norm = nullptr;  ///< [batch][n_kv_heads * n_q]
};

/// What decode attention over keys that are packed before RoPE and rotated over groups of heads wants. Device memory.
struct PagedRotate {
  int n_quant_groups = 0;  ///< of all keys of a layer
  bool minimum = false;    ///< zero points are fp16 minima, else int8 codes
  const uint16_t* key_offsets = nullptr;  ///< [channels of all kv heads] where the scales of a channel's quantization group lie
  const uint4* token_table = nullptr;     ///< RoPE of the places within a page, as the codec wants it
  const float2* page_table = nullptr;     ///< [pages of the longest sequence][head_dim / 2] cos and sin at the page's first position
};

/// Decode attention on a GPU: one new token of each of `batch` sequences over all tokens that its sequence has in pages, and over
/// those that it has in 16 bits beside them, in one softmax. All pointers are to device memory.
///
/// Work is a flat list of units (a piece of a page of one kv head), cut into equal shares for all warps of the GPU whatever the
/// sequences' lengths; what a warp finds for its share of a (sequence, kv head) is merged with the others' by whoever finishes last
/// (flash-decoding's merge, without a second launch). Deterministic: parts are merged in the order of the units.
struct PagedDecode {
  int batch = 0;
  int n_kv_heads = 0;
  int n_q = 0;       ///< query heads per kv head, 1 to 8
  int head_dim = 0;  ///< 64, 128 or 256

  /// Queries after RoPE, times softmax scale and attention factor: [batch][n_kv_heads * n_q][head_dim] fp32, in the basis that
  /// keys have in pages, and in the one that they have in 16 bits.
  const float* q_pages = nullptr;
  const float* q_exact = nullptr;

  const std::byte* pool = nullptr;       ///< pages of page_bytes each
  int64_t page_bytes = 0;                ///< a multiple of 16 below 2^31
  const int32_t* block_table = nullptr;  ///< [batch][table_stride] numbers of pages in the pool
  int table_stride = 0;
  /// Of a sequence's tokens in pages those from first_token up to stored_len - 1 are attended that page_masks does not leave out. A
  /// sequence has tokens in pages or exact_blocks is not 0.
  const int32_t* stored_len = nullptr;   ///< [batch] tokens in pages
  const int32_t* first_token = nullptr;  ///< [batch] begin of a sliding window, at least 0; null: 0

  /// Where a sequence keeps what is not in pages: [batch] numbers of slots. Null: sequence s has slot s.
  const int32_t* slot = nullptr;
  /// Of slot i from mask_stride i on [pages of the sequence][page_tokens / 16]: bit t of an entry says that token t of that block is
  /// attended. Null: all are.
  const uint16_t* page_masks = nullptr;
  int64_t mask_stride = 0;  ///< in entries

  /// Tokens in 16 bits (fp16), blocks of 16 as in PlainPageLayout with blocks_per_page = exact_blocks: of slot i from
  /// exact + exact_stride i on. exact_blocks = 0: none.
  const std::byte* exact = nullptr;
  int64_t exact_stride = 0;  ///< in bytes
  int exact_blocks = 0;
  const uint16_t* exact_masks = nullptr;  ///< [batch][exact_blocks], made anew for each step; bits as in page_masks

  /// [batch + 1] units of the sequences before this one, of one kv head: see paged_decode_units.
  const int32_t* units_before = nullptr;

  PagedShift shift = {};  ///< for codecs that know of it

  std::byte* workspace = nullptr;  ///< paged_decode_workspace_bytes; zeroed once when it is allocated
  void* out = nullptr;             ///< [batch][n_kv_heads * n_q][head_dim] of out_type; values in the basis that they are stored in

  PagedRotate rotate = {};  ///< for codecs that know of it
  /// Units that a block of exact tokens makes, for codecs whose kv head stands for several: one after the other. units_before counts one.
  int exact_pieces = 1;
  ElementType out_type = ElementType::kFp32;
};

/// Units of one kv head of a sequence: pages in pieces of `unit_tokens`, from the piece that holds first_token on, then blocks of 16 exact
/// tokens. What lies before a sliding window is in no unit: it costs nothing.
inline constexpr int32_t paged_decode_units(int64_t stored_len, int unit_tokens, int exact_blocks,
                                            int64_t first_token = 0) {
  const int64_t pieces = (stored_len + unit_tokens - 1) / unit_tokens - first_token / unit_tokens;
  return static_cast<int32_t>(pieces > 0 ? pieces : 0) + exact_blocks;
}

/// How a kernel lies over a GPU. Who gives one has made the kernel ready on the device that was current, and only there.
struct PagedDecodeGrid {
  int blocks = 0;  ///< thread blocks
  int warps_per_block = 0;
  bool large = false;  ///< with the shared memory of datacentre GPUs
};

/// Bytes of PagedDecode::workspace: counters, then the parts' maxima and sums, then their outputs. Parts: see PartSlots.
inline int64_t paged_decode_workspace_bytes(const PagedDecodeGrid& grid, int batch, int n_kv_heads, int n_q, int head_dim) {
  const int64_t heads = n_q <= 4 ? 4 : n_q <= 8 ? 8 : 16;
  const int64_t parts = grid.blocks + 4 * int64_t{batch} * n_kv_heads;
  const int64_t counters = (int64_t{batch} * n_kv_heads * 4 + 255) / 256 * 256;
  return counters + parts * heads * (8 + int64_t{head_dim} * 4);
}

}  // namespace rotunda::kernels
