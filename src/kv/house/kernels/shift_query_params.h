#pragma once

#include <cstdint>

struct float2;
struct uint2;

namespace rotunda::kv::house {

/// Makes of the queries of a step what house_decode_cuda wants of them where keys are shifted: PagedShift::queries and norm. Device memory.
struct ShiftQueries {
  int batch = 0;
  int n_kv_heads = 0;
  int n_q = 0;                  ///< at most 8
  int head_dim = 0;             ///< 64, 128 or 256
  const float* q = nullptr;     ///< as PagedDecode::q_exact
  int n_steps = 0;              ///< of eight pairs
  const float* shift = nullptr;     ///< [n_kv_heads][head_dim] as HouseLayer::shift
  const uint16_t* pairs = nullptr;  ///< [n_kv_heads][8 n_steps]
  const int32_t* n_pairs = nullptr;  ///< [n_kv_heads] pairs that are shifted, at most 8 n_steps; the rest is padding
  const float2* page_table = nullptr;    ///< [pages][head_dim / 2] cos and sin at the page's first position
  const int32_t* stored_len = nullptr;   ///< [batch] tokens in pages
  const int32_t* first_token = nullptr;  ///< [batch] those before it are not attended; null: 0
  int pages = 0;                         ///< of a sequence, at most
  uint2* queries = nullptr;
  float* norm = nullptr;
};

}  // namespace rotunda::kv::house
