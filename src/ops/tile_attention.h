#pragma once

#include <ATen/core/Tensor.h>

namespace rotunda::ops {

/// Attention of a block of queries over keys and values that come tile by tile (online softmax, arXiv:1805.02867), so that only
/// one tile has to exist at a time. fp32 throughout; the products are LibTorch's.
class TileAttention {
 public:
  /// @param q [B, M, d] fp32, times the softmax scale: B key/value heads, M = query rows that share one (heads of a group times tokens)
  explicit TileAttention(at::Tensor q);

  /// @param k_t [B, d, N] fp32 keys, transposed   @param v [B, N, d] fp32
  /// @param mask bool, broadcastable to [B, M, N], true: attended; undefined: all are
  void add(const at::Tensor& k_t, const at::Tensor& v, const at::Tensor& mask = {});

  /// Merges an attention of the same queries over other tokens, finished already.
  /// @param out [B, M, d] fp32   @param lse [B, M] natural logarithm of the sum of exponentials of the scores
  void add_finished(const at::Tensor& out, const at::Tensor& lse);

  /// [B, M, d]; a query that has seen no token gives zeros.
  at::Tensor finish() const;

 private:
  at::Tensor q_;
  at::Tensor max_;  // [B, M, 1]
  at::Tensor sum_;  // [B, M, 1]
  at::Tensor acc_;  // [B, M, d]
};

/// Causal attention of a chunk within itself, exact, with the log-sum-exp that merging needs.
/// @param q [T, n_heads, d]   @param k, v [T, n_kv_heads, d], one dtype (fp32 or bf16); n_heads a multiple of n_kv_heads
/// @param sliding_window a token sees this many newest tokens, itself included; 0: all
/// @return out [n_kv_heads, rep * T, d] fp32 and lse [n_kv_heads, rep * T], rows ordered [rep][T]
std::pair<at::Tensor, at::Tensor> chunk_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double softmax_scale,
                                                  int64_t sliding_window);

/// [T, n_heads, d] -> [n_kv_heads, rep * T, d], rows ordered [rep][T], and back.
at::Tensor stack_query_heads(const at::Tensor& q, int64_t n_kv_heads);
at::Tensor unstack_query_heads(const at::Tensor& stacked, int64_t n_tokens);

}  // namespace rotunda::ops
