#pragma once

#include <ATen/core/Tensor.h>

#include "kv/kv_format.h"

namespace rotunda::kv::house {

/// What balance, shift and feedback want to know of one layer's queries and keys. All fp64.
struct LayerMoments {
  at::Tensor query;  ///< [n_kv_heads, d, d] E[q q^T] after RoPE, over positions and over the query heads of a kv head
  at::Tensor key_mean;      ///< [n_kv_heads, d] before RoPE
  at::Tensor key_variance;  ///< [n_kv_heads, d] about that mean
};

/// From the weights alone: the normed input is taken as uncorrelated with mean 0 and variance 1, so E[q q^T] = W diag(g^2) W^T + b b^T
/// with g the gain of the norm in front; RoPE positions as even over 0 .. trained context - 1 (4096 at most). Where a norm
/// stands behind the projection, its unit mean square and its gain are reckoned in, and the key mean is 0.
LayerMoments weight_moments(const KvModel& model, const ProjectionWeights& weights);

/// From the part of a calibration file that make_house_calibrator made. @throws Error{kUser} naming what is missing or does not fit.
LayerMoments calibrated_moments(const KvModel& model, int layer, const ops::TensorBundle& calibration);

/// E[R_n^T M R_n] in row vectors, n even over 0 .. n_positions - 1, in closed form.
/// @param moment [..., d, d] fp64   @param inv_freq [d / 2] radians per position
at::Tensor average_over_rope(const at::Tensor& moment, const std::vector<double>& inv_freq, int64_t n_positions);

/// The rounding feedback of house_store for errors that cost e S e^T: with U the upper Cholesky factor of
/// (S + 0.01 mean(diag S) I)^-1, entry (i, j) is U_ij / U_ii above the diagonal (GPTQ's update, arXiv:2210.17323, applied to a key
/// instead of a row of weights), 1 / U_ii^2 on it (up to a factor common to all: S is brought to mean(diag S) = 1), 0 below.
/// @param s [..., d, d] fp64, positive semidefinite   @return the same shape, fp32
at::Tensor feedback_triangle(const at::Tensor& s);

}  // namespace rotunda::kv::house
