#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kernels/hadamard/hadamard.h"
#include "kv/house/kernels/house_page.h"

namespace rotunda::kv::house {

/// How a token's scale follows from its elements y and its code values c (odd integers).
enum class ScaleRule : uint8_t {
  kUnbiased,      ///< (y . y) / (y . c): y . (s c) = y . y, so scores are not shrunk
  kLeastSquares,  ///< (y . c) / (c . c): least squared error, but shrinks every key; for comparison
};

/// Steps tried for a token's codes, in units of its root mean square: `count` of them, evenly from `first` to `last`.
struct StepSearch {
  float first;
  float last;
  int count;
};
inline constexpr StepSearch step_search(int bits) {
  return bits == 2   ? StepSearch{0.40F, 0.65F, 6}
         : bits == 3 ? StepSearch{0.20F, 0.36F, 5}
                     : StepSearch{0.10F, 0.22F, 5};
}
/// Candidate i in fp32: first + i * ((last - first) / (count - 1)), one rounding an operation.
inline float step_candidate(const StepSearch& search, int i) {
  return search.first + static_cast<float>(i) * ((search.last - search.first) / static_cast<float>(search.count - 1));
}

/// Factors on the inverse step among which feedback chooses: with feedback the best step is not that of plain rounding.
inline constexpr float kFeedbackTries[] = {1.0F, 1.07F, 0.93F, 1.15F, 0.87F, 1.25F, 0.81F};

/// What one layer's pages need besides their bytes.
struct HouseLayer {
  HousePageLayout layout;
  ScaleRule scale = ScaleRule::kUnbiased;
  /// [n_kv_heads][head_dim][head_dim] rounding feedback for keys: entry (i, j) = U_ij / U_ii for j > i, (i, i) = 1 / U_ii^2 > 0, what an error
  /// of channel i costs once the channels behind it have made up for it; below the diagonal unread. Null: plain rounding.
  const float* feedback = nullptr;
  /// [n_kv_heads][head_dim] what was subtracted from keys before RoPE (times the RoPE's attention factor); null: nothing.
  const float* shift = nullptr;
  kernels::HadamardPlan hadamard;  ///< of size head_dim
};

/// Quantizes up to 16 consecutive tokens that lie in one block. Per token and head, all in fp32, sums over channels in
/// ascending order, products rounded before they are added but for one fused step, so that every instruction set gives the same bytes:
///   1. e = sum y^2; e / d = 0 (also by underflow): scale 0, every code value +1.   r = sqrt(e / d).
///   2. For each candidate step t = candidate * r: q = clamp(floor(y * (0.5 / t) + 2^(b-1)), 0, 2^b - 1), c = 2 q - (2^b - 1),
///      yc = sum y c, cc = sum c^2. The codes with the largest yc^2 / cc win, the first of equals.
///   3. Keys with feedback: the winner's step and others near it are tried, 0.5 / t times each of kFeedbackTries, and each time for itself: the codes
///      of y by that step give s = yc / cc; then x = y, cost = 0; for i = 0 .. d - 1: q_i, c_i from x_i; f = x_i - s c_i;
///      cost += (f f) * feedback(i, i); x_j = fma(-f, feedback(i, j), x_j) for j > i. The codes of least cost win, the first of equals: cost is
///      what queries are expected to see of the error. Then yc = sum y c and cc = sum c^2 anew with the original y; where yc is not
///      above 0, the codes of step 2 stay.
///   4. scale = fp16(e / yc), or fp16(yc / cc) by ScaleRule::kLeastSquares; where it underflows to 0, the smallest fp16 above 0.
struct HouseStoreParams {
  const HouseLayer* layer;
  const float*
      key;  ///< [n_tokens][n_kv_heads * head_dim] (k - mu) R_n H: shifted, turned and rotated; row_stride in elements
  const float* value;  ///< [n_tokens][n_kv_heads * head_dim] rotated per head
  int64_t row_stride;
  int block;     ///< within the page
  int first;     ///< first token within the block
  int n_tokens;  ///< first + n_tokens <= 16; other tokens of the block keep their codes and scales
  std::byte* page;
};

/// Highway, dispatched at run time.
/// @return false where an element is not finite, a sum overflows, or a scale (the stored one, or yc / cc of step 2)
/// overflows fp16; the tokens' bytes are then unspecified
bool house_store(const HouseStoreParams& params);

/// The part of a score that the shift took away: q R_m . mu R_n = sum over pairs of
/// a_i cos(n w_i) + b_i sin(n w_i), with (per RoPE pair i of channels i and i + d/2, q after RoPE) a = q_i mu_i + q_i' mu_i',
/// b = q_i' mu_i - q_i mu_i'. Only pairs with a shift are listed.
struct ShiftTerm {
  int n_pairs = 0;
  const uint16_t* pairs = nullptr;  ///< [n_pairs]
  const float* a = nullptr;         ///< [n_q][n_pairs], softmax scale in
  const float* b = nullptr;         ///< [n_q][n_pairs]
  /// cos and sin of each page's first position: [n_pages][head_dim / 2], of the run's pages
  const float* page_cos = nullptr;
  const float* page_sin = nullptr;
  /// cos and sin of positions 0 .. page_tokens - 1: [blocks_per_page][head_dim / 2][16]
  const float* token_cos = nullptr;
  const float* token_sin = nullptr;
};

/// Decode attention of all query heads of one kv head over packed pages; adds to `state`. Nothing is undone per cached token:
/// codes times query in integers, one scale per token on the score, codes times weights in integers, one scale per token on the weight.
/// The query enters as 8-bit integers (one step per head), weights times scales as 15-bit integers (one step per page and head).
struct HouseDecodeParams {
  const HouseLayer* layer;
  kernels::PageRun run;
  int kv_head;
  int n_q;         ///< query heads of this kv head, >= 1
  const float* q;  ///< [n_q][head_dim] q R_m H, times softmax scale and attention factor
  ShiftTerm shift;
  kernels::SoftmaxState state;
};

void house_decode(const HouseDecodeParams& params);

/// Unpacks one block of one kv head for a tile of a matrix product: keys rotated back, with RoPE and shift; values as stored (rotated).
struct HouseLoadParams {
  const HouseLayer* layer;
  const std::byte* page;
  int kv_head;
  int block;
  /// cos and sin of this block's tokens at their absolute positions, no attention factor: [head_dim / 2][16]; unread without a shift
  const float* cos;
  const float* sin;
  float* key_out;  ///< [head_dim][out_stride], tokens in columns 0 .. 15
  int64_t out_stride;
  float* value_out;  ///< [16][head_dim]
};

void house_load(const HouseLoadParams& params);

}  // namespace rotunda::kv::house
