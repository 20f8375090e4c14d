#pragma once

#include <cstdint>

struct float2;

namespace rotunda::kv::house {

/// Makes of the queries of a step what house_decode_cuda wants: PagedDecode::q_pages, PagedShift::ab and norm. Device memory.
struct HouseQueries {
  int batch = 0;
  int n_kv_heads = 0;
  int n_q = 0;
  int head_dim = 0;             ///< 64, 128 or 256
  const float* q = nullptr;     ///< as PagedDecode::q_exact
  float* rotated = nullptr;     ///< the same times the Hadamard matrix of kernels::hadamard_plan
  int n_steps = 0;              ///< as in PagedShift; 0: nothing is shifted, and what follows is unread
  const float* shift = nullptr;     ///< [n_kv_heads][head_dim] as HouseLayer::shift
  const uint16_t* pairs = nullptr;  ///< as PagedShift::pairs
  const int32_t* n_pairs = nullptr;  ///< [n_kv_heads] pairs that are shifted, at most 8 n_steps; the rest is padding
  float2* ab = nullptr;
  float* norm = nullptr;
};

}  // namespace rotunda::kv::house
