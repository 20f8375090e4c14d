#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kv/grouped/kernels/grouped_page.h"

namespace rotunda::kv::grouped {

/// What a code stands for. All but kE4m3 are small integers, so that scores and outputs are sums of integer products.
enum class Levels : uint8_t {
  kInteger,  ///< code - zero point, or code - 2^(b - 1) where the format has none
  kTable,    ///< table[code], up to 4 bits
  kE2m3,     ///< fp6 of OCP: sign, 2 bits of exponent, 3 of mantissa; times 8
  kE4m3,     ///< fp8 of OCP: sign, 4 bits of exponent, 3 of mantissa
};

/// How codes and scale follow from a group's elements; grouped_quantize.h has each, operation by operation.
enum class Rule : uint8_t {
  kMinMax,         ///< asymmetric integers between the (clipped) smallest and largest element, with a zero point
  kBlockFloat,     ///< mantissas under a shared power of two (arXiv:2403.20137)
  kMicroscaling,   ///< OCP: a power of two, elements rounded to the element format
  kLargestToTop,   ///< the largest magnitude becomes the largest level: scale = max / top
  kSignedLargest,  ///< GGML's Q4_0: the element of largest magnitude becomes -8
  kNorm,           ///< TurboQuant: nearest level of x over its root mean square
};

/// What codes of up to 4 bits stand for, magnitudes up to 63.
using LevelTable = std::array<int8_t, 16>;

/// How the groups of keys or values are coded.
struct GroupedCodec {
  Levels levels = Levels::kInteger;
  Rule rule = Rule::kMinMax;
  LevelTable table = {};     ///< kTable
  float unit = 1.0F;         ///< an element is (scale * unit, rounded to fp32) * integer
  float clip = 1.0F;         ///< kMinMax: factor on the smallest and the largest element
  bool symmetric = false;    ///< kBlockFloat: no mantissa -2^(m - 1)
  bool carry = false;        ///< kBlockFloat: the next exponent where it costs less than saturating
  bool keep_length = false;  ///< kNorm: the scale makes the decoded group as long as x; else it is the root mean square
};

/// Channels that one scale may serve at most.
inline constexpr int kMaxGroup = 1024;

/// What one layer's pages need besides their bytes. Keys and values are both kE4m3 or neither is.
struct GroupedLayer {
  GroupedPageLayout layout;
  GroupedCodec key;
  GroupedCodec value;
};

/// Quantizes up to 16 consecutive tokens that lie in one block.
struct GroupedStoreParams {
  const GroupedLayer* layer;
  const float* key;    ///< [n_tokens][n_kv_heads * head_dim] in the basis that is stored; row_stride in elements
  const float* value;  ///< the same
  int64_t row_stride;
  int block;     ///< within the page
  int first;     ///< first token within the block
  int n_tokens;  ///< first + n_tokens <= 16; other tokens of the block keep their codes and scales
  std::byte* page;
};

/// Plain C++, one element after the other: the same bytes on every machine. (A token is stored once and read at every step.)
/// @return false where an element is not finite or the scale's type cannot hold the scale; the tokens' bytes are then unspecified
bool grouped_store(const GroupedStoreParams& params);

/// Decode attention of all query heads of one kv head over packed pages; adds to `state`.
/// Integer levels: the query enters as 8-bit integers (one step per head and group), sums of a group are exact in 32 bits and take
/// one scale per token and group; softmax weights times value scales enter as 15-bit integers (one step per page, head and group).
/// kE4m3: fp32 throughout.
struct GroupedDecodeParams {
  const GroupedLayer* layer;
  kernels::PageRun run;
  int kv_head;
  int n_q;         ///< query heads of this kv head, >= 1
  const float* q;  ///< [n_q][head_dim] in the basis of the keys, times softmax scale and attention factor
  kernels::SoftmaxState state;
};

/// Highway, dispatched at run time.
void grouped_decode(const GroupedDecodeParams& params);

/// Unpacks one block of one kv head, in the stored basis.
struct GroupedLoadParams {
  const GroupedLayer* layer;
  const std::byte* page;
  int kv_head;
  int block;
  float* key_out;    ///< [head_dim][16], 64-byte aligned, tokens in columns
  float* value_out;  ///< [16][head_dim]
};

/// Highway, dispatched at run time; equal to the reference to the last bit.
void grouped_load(const GroupedLoadParams& params);

}  // namespace rotunda::kv::grouped
