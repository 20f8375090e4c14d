#pragma once

#include <cstdint>

namespace rotunda::kernels {

/// RMSNorm of rows: y = x / sqrt(mean(x^2) + eps) * weight. Rows lie one after the other; all of one element type. With `update` the rows
/// are x + update, which are written to `sum`.
struct RmsNorm {
  const void* x = nullptr;       ///< [n_rows, row_size]
  const void* weight = nullptr;  ///< [row_size]
  void* y = nullptr;             ///< [n_rows, row_size]
  int64_t n_rows = 0;
  int64_t row_size = 0;
  float eps = 0.0F;
  const void* update = nullptr;  ///< [n_rows, row_size], or null
  void* sum = nullptr;           ///< [n_rows, row_size], rounded; may be x or update; unused without `update`
};

/// SwiGLU's gate of rows: y = silu(gate) * up.
struct Swiglu {
  const void* gate_up = nullptr;  ///< [n_rows, 2 row_size]: a row's gate, then its up
  void* y = nullptr;              ///< [n_rows, row_size]
  int64_t n_rows = 0;
  int64_t row_size = 0;
};

}  // namespace rotunda::kernels
