#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "kernels/attention/paged_decode.h"

namespace rotunda::kv {

/// Pages on a GPU. A page holds its tokens for every layer, one layer after the other: layer l of page p lies at
/// pool + p * page_stride + l * PageCodecCuda::layer_bytes().
struct PagesCuda {
  std::byte* pool = nullptr;
  int64_t page_stride = 0;  ///< bytes
};

/// What a format does with its pages of 128 tokens on a GPU; the cache around it does the rest.
///
/// Everything runs on the current stream and can be captured in a CUDA graph: nothing waits for the GPU, nothing of the device's memory is
/// read on the host, no decision depends on it. Temporaries are tensors (at::empty). Failing launches throw Error{kBug} naming the kernel.
class PageCodecCuda {
 public:
  virtual ~PageCodecCuda() = default;

  /// Of one layer of a page; a multiple of 64, padding included.
  virtual int64_t layer_bytes() const = 0;
  virtual int64_t codes_bytes_per_token() const = 0;  ///< of one layer
  virtual int64_t scale_bytes_per_token() const = 0;  ///< of one layer, zero points included
  /// What a saved sequence must share with the cache that reads it; the same as the format's cache on the CPU says.
  virtual std::map<std::string, std::string> saved_settings() const { return {}; }

  /// Keys as the model gives them in the basis in which they are turned and kept in 16 bits: where fused projections give another one.
  /// @param k [T, n_kv_heads, head_dim]   @return the same shape
  virtual at::Tensor before_rope(const at::Tensor& k) const { return k; }

  /// Keys or values of a chunk as its own tokens see them: exact, or rounded as pages round them where that is all that pages do.
  virtual at::Tensor within_chunk(const at::Tensor& x) const { return x; }

  /// Rows for store() out of keys after RoPE, of one layer or of several.
  /// @param first_layer of the N layers   @param turned [N, T, n_kv_heads, head_dim] fp32, contiguous, attention factor in
  /// @param cos, sin [T, head_dim / 2] fp32, what the keys were turned by, attention factor in
  /// @param positions [T] int32 or int64 of these tokens, on the GPU
  /// @return [N, T, kv_channels] fp32, contiguous
  virtual at::Tensor packable(int first_layer, const at::Tensor& turned, const at::Tensor& cos, const at::Tensor& sin,
                              const at::Tensor& positions) const = 0;

  /// Packs tokens, of one layer or of several.
  /// @param key, value [N, T, kv_channels] fp32, contiguous; values in the basis given
  /// @param pairs [P, 4] int32: kernels::StorePair, the same for all N layers
  /// @param refused [N] int32: set to 1 where an element is not finite or the format cannot hold it; never set to 0
  virtual void store(int first_layer, const at::Tensor& key, const at::Tensor& value, const at::Tensor& pairs, const PagesCuda& pages,
                     const at::Tensor& refused) const = 0;

  /// Unpacks whole pages of one sequence, for prefill and evaluation.
  /// @param table [P] int32 numbers of pages, on the GPU   @param cos, sin [128 P, head_dim / 2] fp32 of these tokens, attention factor in
  /// @param positions [128 P] int32 or int64 of these tokens, on the GPU   @param dtype kFloat, kBFloat16 or kHalf
  /// @return keys after RoPE with attention factor, in the basis of `turned`, and values: [n_kv_heads, 128 P, head_dim] each
  virtual std::pair<at::Tensor, at::Tensor> load(int layer, const PagesCuda& pages, const at::Tensor& table, const at::Tensor& cos,
                                                 const at::Tensor& sin, const at::Tensor& positions, at::ScalarType dtype) const = 0;

  /// Whether decode() is there; else the cache unpacks pages for every token.
  virtual bool has_decode() const { return true; }
  /// Tokens of a unit of pages (see paged_decode_units).
  virtual int unit_tokens() const = 0;
  /// The grid that decode() wants on the current device; of `shape` only n_q and head_dim are read.
  virtual kernels::PagedDecodeGrid decode_grid(const kernels::PagedDecode& shape) const = 0;
  /// Called before a step's first decode(), outside of any graph, with what its decode() calls will have: for tables and workspaces that
  /// must not be made while a graph is recorded.
  virtual void prepare_decode(const kernels::PagedDecodeGrid& /*grid*/, int /*batch*/, int /*table_stride*/) const {}
  /// Whether decode() wants queries rotated by the normalized Hadamard matrix of head_dim.
  virtual bool rotates_queries() const { return false; }
  /// Decode attention of one layer. What the cache leaves to the codec is made of q_exact: shift, and q_pages unless rotates_queries().
  /// @param params pool and page_bytes are of this layer
  virtual void decode(int layer, kernels::PagedDecode params, const kernels::PagedDecodeGrid& grid) const = 0;
};

}  // namespace rotunda::kv
