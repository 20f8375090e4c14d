#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kernels/attention/store_pair.h"
#include "kv/grouped/kernels/grouped_codec.h"

namespace rotunda::kv::grouped {

using kernels::StorePair;

/// grouped_store of many tokens on a GPU, of one layer or of several at once; the same bytes. Pointers are to device memory.
struct GroupedStoreBatch {
  GroupedLayer layer;
  const float* key = nullptr;  ///< [n_layers] as GroupedStoreParams::key, layer_stride apart
  const float* value = nullptr;
  int64_t row_stride = 0;    ///< in elements
  int64_t layer_stride = 0;  ///< in elements
  std::byte* pool = nullptr;
  int64_t page_bytes = 0;            ///< from page to page
  int64_t layer_bytes = 0;           ///< from layer to layer within a page
  const StorePair* pairs = nullptr;  ///< [n_pairs], each of another place, or with no tokens; the same for all layers
  int n_pairs = 0;
  int n_layers = 1;
  /// [n_layers]: set to 1 where grouped_store would return false for a token; its scales are then unspecified. Never set to 0.
  int32_t* refused = nullptr;
};

/// Whole pages of one sequence, unpacked on a GPU to what grouped_store was given, rounded. Pointers are to device memory.
struct GroupedLoadPages {
  GroupedLayer layer;
  const std::byte* pool = nullptr;
  int64_t page_stride = 0;         ///< bytes from page to page
  const int32_t* table = nullptr;  ///< [n_pages] numbers of pages in the pool
  int n_pages = 0;
  kernels::ElementType type = kernels::ElementType::kFp32;  ///< of key and value: what grouped_load gives, rounded to nearest even
  void* key = nullptr;    ///< [n_kv_heads][n_pages * page_tokens][head_dim], 16-byte aligned
  void* value = nullptr;  ///< the same
};

}  // namespace rotunda::kv::grouped
