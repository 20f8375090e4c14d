#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kernels/attention/store_pair.h"

namespace rotunda::kernels {

/// Pages as in PlainPageLayout on a GPU: page p of the first of some layers lies at pool + p * page_stride, that of the next layer
/// layer_stride further.
struct PlainPagesCuda {
  PlainPageLayout layout;
  std::byte* pool = nullptr;
  int64_t page_stride = 0;
  int64_t layer_stride = 0;
};

/// Writes rows into pages, as store_plain does.
/// @param key, value [n_layers][rows][n_kv_heads * head_dim] fp32, `rows` of a layer   @param pairs [n_pairs]
/// @param refused [n_layers] set to 1 where an element is not finite or overflows fp16; 0 is stored in its place
cudaError_t store_plain_cuda(const PlainPagesCuda& pages, const float* key, const float* value, int64_t rows, int n_layers,
                             const StorePair* pairs, int n_pairs, int32_t* refused, cudaStream_t stream);

/// Reads whole pages of one layer. @param table [n_pages]   @param key, value [n_kv_heads][n_pages * page_tokens][head_dim] of `type`
cudaError_t load_plain_cuda(const PlainPagesCuda& pages, const int32_t* table, int n_pages, ElementType type, void* key, void* value,
                            cudaStream_t stream);

}  // namespace rotunda::kernels
