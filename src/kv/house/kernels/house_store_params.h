#pragma once

#include <cstddef>
#include <cstdint>

#include "kv/house/kernels/house_codec.h"

namespace rotunda::kv::house {

/// Tokens that go to two neighbouring blocks of a page (32 tokens: what a warp packs at once, and what shares a word at 3 bits).
struct StorePair {
  int32_t page;     ///< in the pool
  int32_t pair;     ///< within the page: blocks 2 pair and 2 pair + 1
  int32_t row;      ///< of the first of the tokens; the others follow it
  uint32_t tokens;  ///< bit t: token t of the pair is stored; the bits are neighbours. Other tokens keep their codes and scales
};

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
