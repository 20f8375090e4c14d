#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/store_pair.h"
#include "kv/house/kernels/house_codec.h"

namespace rotunda::kv::house {

using kernels::StorePair;

/// house_store of many tokens on a GPU, of one layer or of several at once; the same bytes. Pointers are to device memory.
struct HouseStoreBatch {
  HousePageLayout layout;
  ScaleRule scale = ScaleRule::kUnbiased;
  const float* feedback = nullptr;  ///< [n_layers] as HouseLayer::feedback, 16-byte aligned, or null
  const float* key = nullptr;       ///< [n_layers] as HouseStoreParams::key, layer_stride apart
  const float* value = nullptr;
  int64_t row_stride = 0;    ///< in elements
  int64_t layer_stride = 0;  ///< in elements
  std::byte* pool = nullptr;
  int64_t page_bytes = 0;   ///< from page to page
  int64_t layer_bytes = 0;  ///< from layer to layer within a page
  const StorePair* pairs = nullptr;  ///< [n_pairs], each of another place, or with no tokens; the same for all layers
  int n_pairs = 0;
  int n_rows = 0;  ///< of a layer; with n_pairs it says which kernel suits, no more
  int n_layers = 1;
  /// [n_layers]: set to 1 where house_store would return false for a token; its bytes are then unspecified. Never set to 0.
  int32_t* refused = nullptr;
};

}  // namespace rotunda::kv::house
