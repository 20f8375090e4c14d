#pragma once

#include <cstdint>

struct float2;

namespace rotunda::kv::house {

/// Makes PagedShift::ab and norm of the queries of a step. Device memory.
struct ShiftOfQueries {
  int batch = 0;
  int n_kv_heads = 0;
  int n_q = 0;
  int head_dim = 0;
  int n_steps = 0;
  const float* q = nullptr;         ///< as PagedDecode::q_exact
  const float* shift = nullptr;     ///< [n_kv_heads][head_dim] as HouseLayer::shift
  const uint16_t* pairs = nullptr;  ///< as PagedShift::pairs
  const int32_t* n_pairs = nullptr;  ///< [n_kv_heads] pairs that are shifted, at most 8 n_steps; the rest is padding
  float2* ab = nullptr;
  float* norm = nullptr;
};

}  // namespace rotunda::kv::house
