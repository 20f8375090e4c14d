#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/decode_attention.h"
#include "kv/house/kernels/house_page.h"

namespace rotunda::kv::house {

/// Whole pages of one sequence, unpacked on a GPU to what house_store was given: codes times scale, rotated and shifted as they are stored.
/// Pointers are to device memory.
struct HouseLoadPages {
  HousePageLayout layout;
  const std::byte* pool = nullptr;
  int64_t page_stride = 0;         ///< bytes from page to page, a multiple of 16
  const int32_t* table = nullptr;  ///< [n_pages] numbers of pages in the pool
  int n_pages = 0;
  kernels::ElementType type = kernels::ElementType::kFp32;  ///< of key and value; products are exact in fp32 and rounded to nearest even
  void* key = nullptr;    ///< [n_kv_heads][n_pages * page_tokens][head_dim], 16-byte aligned
  void* value = nullptr;  ///< the same
};

}  // namespace rotunda::kv::house
