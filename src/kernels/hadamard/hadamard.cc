#include "kernels/hadamard/hadamard.h"

#include <bit>
#include <cmath>
#include <vector>

#include "kernels/hadamard/paley.h"

namespace rotunda::kernels {
namespace {

/// 1, -1 or 0: whether a is a nonzero square modulo the odd prime q.
int legendre(int a, int q) {
  a = ((a % q) + q) % q;
  if (a == 0) return 0;
  for (int root = 1; root < q; ++root) {
    if (root * root % q == a) return 1;
  }
  return -1;
}

/// Entry (i, j) of [[0, 1], [corner, Q]] with Q[i][j] = legendre(i - j), of order q + 1.
int bordered(int i, int j, int q, int corner) {
  if (i == 0) return j == 0 ? 0 : 1;
  if (j == 0) return corner;
  return legendre(i - j, q);
}

}  // namespace

int paley_entry(int m, int i, int j) {
  if (m == 1) return 1;
  if (m == 28) {
    // Paley's second construction, q = 13 = 1 modulo 4: each 0 and +-1 of the symmetric conference matrix becomes a 2 x 2 block.
    static constexpr int kZero[2][2] = {{1, -1}, {-1, -1}};
    static constexpr int kOne[2][2] = {{1, 1}, {1, -1}};
    const int c = bordered(i / 2, j / 2, 13, 1);
    return c == 0 ? kZero[i % 2][j % 2] : c * kOne[i % 2][j % 2];
  }
  // Paley's first construction, q = 11 or 19 = 3 modulo 4: identity plus a skew conference matrix. Not symmetric.
  return (i == j ? 1 : 0) + bordered(i, j, m - 1, -1);
}

HadamardPlan hadamard_plan(int n) {
  HadamardPlan plan;
  plan.n = n;
  const int pow2 = 1 << std::countr_zero(static_cast<unsigned>(n));
  const int odd = n / pow2;
  if (pow2 >= 4 && (odd == 3 || odd == 5 || odd == 7)) {
    plan.m = odd * 4;
    plan.pow2 = pow2 / 4;
  } else {
    plan.pow2 = pow2;
    plan.blocks = odd;
  }
  return plan;
}

void hadamard_dense(const HadamardPlan& plan, double* matrix) {
  const int size = plan.m * plan.pow2;
  const double scale = 1.0 / std::sqrt(static_cast<double>(size));
  for (int64_t i = 0; i < int64_t{plan.n} * plan.n; ++i) matrix[i] = 0;
  for (int block = 0; block < plan.blocks; ++block) {
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        const bool odd = std::popcount(static_cast<unsigned>((i % plan.pow2) & (j % plan.pow2))) % 2 != 0;
        const int sign = paley_entry(plan.m, i / plan.pow2, j / plan.pow2) * (odd ? -1 : 1);
        matrix[(int64_t{block} * size + i) * plan.n + block * size + j] = sign * scale;
      }
    }
  }
}

}  // namespace rotunda::kernels
