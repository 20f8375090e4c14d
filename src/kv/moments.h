#pragma once

#include <ATen/core/Tensor.h>

#include "kv/kv_cache.h"
#include "ops/tensor_bundle.h"

namespace rotunda::kv {

/// Of the sums that a calibrator keeps beside what it sees.
inline at::TensorOptions fp64_on(at::Device device) { return at::TensorOptions().dtype(at::kDouble).device(device); }

/// Sum of q q^T over the tokens of a step from position 0 on, after RoPE, and over the query heads of each kv head.
/// @param q [T, n_heads, d] as AttendInput::q   @return [n_kv_heads, d, d] fp32
at::Tensor query_products(const KvModel& model, const at::Tensor& q);

/// One layer of a calibration's tensor, as fp64. @param sizes of the whole tensor, layers first
/// @throws Error{kUser} naming tensor and layer where it is missing, of another shape, or not finite.
at::Tensor calibrated_layer(const ops::TensorBundle& calibration, const char* name, at::IntArrayRef sizes, int layer);

}  // namespace rotunda::kv
