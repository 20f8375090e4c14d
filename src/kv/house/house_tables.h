#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kv/house/house_options.h"
#include "kv/kv_cache.h"

namespace rotunda::kv::house {

/// What one layer's weights (and a calibration) made of the format's tables, on the CPU.
struct LayerTables {
  at::Tensor balance;                        ///< [n_kv_heads, d / 2]
  at::Tensor shift;                          ///< [n_kv_heads, d], attention factor in
  at::Tensor feedback;                       ///< [n_kv_heads, d, d], or undefined
  std::vector<std::vector<uint16_t>> pairs;  ///< [n_kv_heads], RoPE pairs that are shifted

  const float* shift_of(int head) const { return shift.const_data_ptr<float>() + head * shift.size(1); }
  bool shifts() const;  ///< whether any head has a pair that is
};

/// The tables of every layer. @param setup what HouseFormat::fuse left: balance.l, shift.l and feedback.l of every layer
/// @throws Error{kUser} where one is missing or does not fit.
std::vector<LayerTables> house_tables(const KvModel& model, const HouseOptions& options, const ops::TensorBundle& setup);

/// What a saved sequence must share with the cache that reads it for its codes to mean the same, on every device.
std::map<std::string, std::string> codes_settings(const HousePageLayout& layout, const std::vector<LayerTables>& tables);

}  // namespace rotunda::kv::house
