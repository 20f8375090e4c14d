#pragma once

#include <memory>

#include "kv/kv_format.h"

namespace rotunda::kv::grouped {

/// What a text says of one layer, fp64.
struct GroupedMoments {
  at::Tensor query;         ///< [n_kv_heads, d, d] E[q^T q] of queries after RoPE, over the query heads of each kv head
  at::Tensor key_energy;    ///< [n_kv_heads, d] E[k^2] before RoPE
  at::Tensor value;         ///< [n_kv_heads, d, d] covariance of values
  at::Tensor value_energy;  ///< [n_kv_heads, d] E[v^2]
};

/// Collects these of all layers.
std::unique_ptr<KvCalibrator> make_grouped_calibrator(const KvModel& model);

/// Reads one layer of what the calibrator wrote. @throws Error{kUser} where something is missing or does not fit.
GroupedMoments grouped_moments(const KvModel& model, int layer, const ops::TensorBundle& calibration);

}  // namespace rotunda::kv::grouped
