#pragma once

#include <memory>

#include "kv/kv_format.h"

namespace rotunda::kv::house {

/// Accumulates, per layer and kv head, the second moment of queries after RoPE and the mean and variance of keys before it:
///   query_moment [n_layers, n_kv_heads, d, d], key_mean [n_layers, n_kv_heads, d], key_variance [n_layers, n_kv_heads, d], fp32.
std::unique_ptr<KvCalibrator> make_house_calibrator(const KvModel& model);

}  // namespace rotunda::kv::house
