#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kv/rotate/kernels/rotate_page.h"

namespace rotunda::kv::rotate {

/// Unpacks whole pages of one layer and sequence on a GPU. Pointers are to device memory.
struct RotateLoadBatch {
  RotatePageLayout layout;
  const uint16_t* key_group = nullptr;  ///< [kv_channels] as RotateLayer::key_group
  const std::byte* pool = nullptr;      ///< of the layer: page p at pool + p * page_stride
  int64_t page_stride = 0;              ///< bytes
  const int32_t* table = nullptr;       ///< [n_pages] numbers of pages
  int n_pages = 0;
  float* key = nullptr;  ///< [n_pages * page_tokens][kv_channels] keys as they were packed: rotated, before RoPE
  void* value = nullptr;  ///< [n_kv_heads][n_pages * page_tokens][head_dim] of value_type, rounded to nearest even
  kernels::ElementType value_type = kernels::ElementType::kFp32;
};

}  // namespace rotunda::kv::rotate
