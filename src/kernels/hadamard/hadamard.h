#pragma once

#include <cstdint>

namespace rotunda::kernels {

/// How a normalized Hadamard matrix of size n is built: H_m (Kronecker) W_{2^k}, n = m * 2^k. W is Walsh-Hadamard in Sylvester order.
/// m is 1, 12, 20 or 28 (Paley), else n is cut into equal blocks of its largest power of two: `blocks` matrices W side by side.
struct HadamardPlan {
  int n = 0;
  int m = 1;       ///< order of the small factor
  int pow2 = 1;    ///< 2^k
  int blocks = 1;  ///< n = blocks * m * pow2; more than 1 only where no H_m fits
};

/// @return a plan for n >= 1
HadamardPlan hadamard_plan(int n);

/// x <- x H (row vectors) or, with `inverse`, x H^T, over the channels of token-lane data.
/// @param x [n][kTokenBlock] fp32, 64-byte aligned, in place. Highway, dispatched at run time.
void hadamard_lanes(const HadamardPlan& plan, bool inverse, float* x);

/// The same over rows: x [n_rows][n], row_stride in elements, in place.
void hadamard_rows(const HadamardPlan& plan, bool inverse, float* x, int64_t n_rows, int64_t row_stride);

/// The dense matrix, [n][n] row-major fp64, entries +-1/sqrt(m * pow2) or 0: the definition, for tests and for fusing into weights.
void hadamard_dense(const HadamardPlan& plan, double* matrix);

}  // namespace rotunda::kernels
