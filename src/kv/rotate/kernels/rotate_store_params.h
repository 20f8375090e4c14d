#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/store_pair.h"
#include "kv/rotate/kernels/rotate_page.h"

namespace rotunda::kv::rotate {

using kernels::StorePair;

/// rotate_store of many tokens on a GPU, of one layer or of several; the same bytes. Pointers are to device memory.
struct RotateStoreBatch {
  RotatePageLayout layout;
  int n_layers = 1;
  const uint16_t* key_group = nullptr;  ///< [n_layers][kv_channels] as RotateLayer::key_group
  const uint16_t* key_order = nullptr;  ///< [n_layers][kv_channels] the channels of group 0, those of group 1, and so on
  float key_clip = 0.8F;
  float value_clip = 0.8F;
  const float* key = nullptr;  ///< [n_layers][rows][kv_channels] as RotateStoreParams::key; row and layer stride in elements
  const float* value = nullptr;
  int64_t row_stride = 0;
  int64_t layer_stride = 0;
  std::byte* pool = nullptr;        ///< page p of layer l at pool + p * page_stride + l * layer_page_stride
  int64_t page_stride = 0;          ///< bytes
  int64_t layer_page_stride = 0;    ///< bytes
  const StorePair* pairs = nullptr;  ///< [n_pairs], each of another place; the same for all layers
  int n_pairs = 0;
  /// [n_layers] set to 1 where rotate_store would return false for a token; its bytes are then unspecified. Never set to 0.
  int32_t* refused = nullptr;
};

}  // namespace rotunda::kv::rotate
