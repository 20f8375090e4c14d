#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "ops/tile_attention.h"

namespace rotunda::kv {

/// Which earlier tokens a query sees: token j is seen from position p if p - window < j <= p - lag.
struct Visibility {
  int64_t window = 0;  ///< 0: no limit
  int64_t lag = 0;
};

/// Keys and values that stand in pages, unpacked a block at a time.
struct StoredTokens {
  int64_t n_kv_heads;
  int64_t head_dim;
  /// Unpacks block `block` of the sequence (positions 16 block .. 16 block + 15) as fp32, keys with RoPE:
  /// @param key [n_kv_heads * head_dim][stride], tokens in columns 0 .. 15   @param value [n_kv_heads][value_head_stride][.. 16 rows of head_dim]
  std::function<void(int64_t block, float* key, int64_t stride, float* value, int64_t value_head_stride)> load_block;
};

/// Adds the tokens begin .. end - 1 but for `excluded` (positions, sorted) to the attention of queries at positions
/// first_query .. first_query + n_queries - 1. Tokens are unpacked kTileTokens at a time: the whole is never there.
/// @param attention of q [n_kv_heads, rep * n_queries, head_dim], rows ordered [rep][n_queries]
void add_stored(ops::TileAttention& attention, const StoredTokens& tokens, int64_t begin, int64_t end,
                const std::vector<int64_t>& excluded, int64_t first_query, int64_t n_queries, int64_t rep, Visibility visibility);

/// Which of the tokens begin .. begin + n - 1 queries see: [rep * n_queries, n] bool on `device`, or undefined where every query sees all.
at::Tensor visibility_mask(int64_t begin, int64_t n, int64_t first_query, int64_t n_queries, int64_t rep, Visibility visibility,
                           at::Device device);

/// The same for tokens that are there as tensors.
/// @param k_t [n_kv_heads, head_dim, N] fp32   @param v [n_kv_heads, N, head_dim] fp32   @param positions of the N tokens
void add_exact(ops::TileAttention& attention, const at::Tensor& k_t, const at::Tensor& v, const at::Tensor& positions,
               int64_t first_query, int64_t n_queries, int64_t rep, Visibility visibility);

/// 512 tokens: large enough for the matrix products, small enough to stay in the L2 cache with the scores.
inline constexpr int64_t kTileTokens = 512;

}  // namespace rotunda::kv
