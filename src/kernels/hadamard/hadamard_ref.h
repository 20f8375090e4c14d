#pragma once

#include <cstddef>
#include <vector>

#include "kernels/attention/token_block.h"
#include "kernels/hadamard/hadamard.h"

namespace rotunda::kernels {

/// hadamard_rows by the dense matrix, in double.
inline void hadamard_rows_ref(const HadamardPlan& plan, bool inverse, double* x, int64_t n_rows, int64_t row_stride) {
  const int n = plan.n;
  std::vector<double> matrix(static_cast<size_t>(n) * n);
  hadamard_dense(plan, matrix.data());
  std::vector<double> out(n);
  for (int64_t row = 0; row < n_rows; ++row) {
    double* values = x + row * row_stride;
    for (int to = 0; to < n; ++to) {
      double sum = 0;
      for (int from = 0; from < n; ++from) {
        sum += values[from] * (inverse ? matrix[static_cast<size_t>(to) * n + from] : matrix[static_cast<size_t>(from) * n + to]);
      }
      out[to] = sum;
    }
    for (int i = 0; i < n; ++i) values[i] = out[i];
  }
}

}  // namespace rotunda::kernels
