#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/store_pair.h"
#include "kv/house/kernels/house_codec.h"

namespace rotunda::kv::house {

using kernels::StorePair;

/// house_store of many tokens on a GPU; the same bytes. Pointers are to device memory.
struct HouseStoreBatch {
  HousePageLayout layout;
  ScaleRule scale = ScaleRule::kUnbiased;
  const float* feedback = nullptr;  ///< as HouseLayer::feedback, 16-byte aligned, or null
  const float* key = nullptr;       ///< as HouseStoreParams::key
  const float* value = nullptr;
  int64_t row_stride = 0;
  std::byte* pool = nullptr;  ///< pages of page_bytes each
  int64_t page_bytes = 0;
  const StorePair* pairs = nullptr;  ///< [n_pairs], each of another place
  int n_pairs = 0;
  /// Set to 1 where house_store would return false for a token; its bytes are then unspecified. Never set to 0.
  int32_t* refused = nullptr;
};

}  // namespace rotunda::kv::house
