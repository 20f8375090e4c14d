#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/token_block.h"

namespace rotunda::kernels {

/// Running softmax (online softmax, arXiv:1805.02867) of some query heads over the tokens seen so far. The result is acc / sum.
/// A state that has seen no token has max = -inf, sum = 0, acc = 0.
struct SoftmaxState {
  float* max;  ///< [n_q]
  float* sum;  ///< [n_q]
  float* acc;  ///< [n_q][head_dim]
};

/// A run of pages of one sequence. A page holds `blocks_per_page` blocks of kTokenBlock tokens.
struct PageRun {
  const std::byte* const* pages;  ///< [n_pages]
  /// [n_pages * blocks_per_page]: bit t of an entry says that token t of that block is attended; a block with mask 0 is
  /// neither read nor waited for. Tokens that do not exist yet, sinks kept elsewhere, tokens left of a sliding window: 0.
  const uint16_t* masks;
  int n_pages;
};

/// Element type of pages that hold keys and values as they are.
enum class ElementType : uint8_t { kFp32, kBf16, kFp16 };

inline constexpr int element_bytes(ElementType type) { return type == ElementType::kFp32 ? 4 : 2; }

/// A page of unquantized keys (after RoPE) and values, all kv heads of one layer:
///   keys   [n_kv_heads][blocks_per_page][head_dim][kTokenBlock]
///   values [n_kv_heads][blocks_per_page * kTokenBlock][head_dim]
struct PlainPageLayout {
  ElementType type = ElementType::kBf16;
  int n_kv_heads = 0;
  int head_dim = 0;  ///< a multiple of 16
  int blocks_per_page = 0;

  constexpr int64_t page_tokens() const { return int64_t{blocks_per_page} * kTokenBlock; }
  constexpr int64_t key_bytes() const { return page_tokens() * n_kv_heads * head_dim * element_bytes(type); }
  constexpr int64_t page_bytes() const { return 2 * key_bytes(); }
  /// Byte offset of key channel 0 of a block of a head; channel c follows at c * kTokenBlock elements.
  constexpr int64_t key_block_offset(int head, int block) const {
    return (int64_t{head} * blocks_per_page + block) * head_dim * kTokenBlock * element_bytes(type);
  }
  /// Byte offset of the value row of a token (counted within the page) of a head.
  constexpr int64_t value_row_offset(int head, int64_t token) const {
    return key_bytes() + (head * page_tokens() + token) * head_dim * element_bytes(type);
  }
};

/// Decode attention of the query heads of one kv head over unquantized pages; adds to `state`.
struct PlainDecodeParams {
  PlainPageLayout layout;
  PageRun run;
  int kv_head;
  int n_q;         ///< query heads of this kv head, any number >= 1
  const float* q;  ///< [n_q][head_dim] after RoPE, times the softmax scale
  SoftmaxState state;
};

/// Highway, dispatched at run time; fp32 accumulation. Result within rounding of decode_plain_ref.
void decode_plain(const PlainDecodeParams& params);

/// Merges `from` into `into`, both of n_q heads (flash-decoding's last step). A state without tokens changes nothing.
void merge_softmax(const SoftmaxState& into, const SoftmaxState& from, int n_q, int head_dim);

/// out[h][:] = acc / sum; a head that has seen no token gives zeros.
void finish_softmax(const SoftmaxState& state, int n_q, int head_dim, float* out);

/// Writes keys (token-lane) and values of consecutive tokens into pages: rows of fp32 in, elements of `layout.type` out,
/// rounded to nearest even.
/// @param key, value [n_tokens][n_kv_heads * head_dim] fp32, `row_stride` in elements
/// @param page the page that holds token index `first` (within the page) and the ones after it; first + n_tokens must not pass its end
/// @return false if any element is not finite, or overflows fp16
bool store_plain(const PlainPageLayout& layout, const float* key, const float* value, int64_t row_stride, int64_t first,
                 int64_t n_tokens, std::byte* page);

/// Reads one block back as fp32 for a tile of a matrix product.
/// @param key_out [head_dim][out_stride] with the block's tokens in columns 0 .. 15  @param value_out [16][head_dim]
void load_plain(const PlainPageLayout& layout, const std::byte* page, int head, int block, float* key_out, int64_t out_stride,
                float* value_out);

}  // namespace rotunda::kernels
