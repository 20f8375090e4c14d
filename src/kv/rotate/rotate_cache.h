#pragma once

#include <memory>
#include <vector>

#include "kv/kv_cache.h"
#include "kv/rotate/rotate_options.h"

namespace rotunda::kv::rotate {

/// Makes the cache.
/// @param key_groups [n_layers][kv_channels] the quantization group of each rotated key channel
std::unique_ptr<KvCache> make_rotate_cache(const KvSpec& spec, const KvModel& model, const RotateOptions& options,
                                           std::vector<std::vector<uint16_t>> key_groups);

}  // namespace rotunda::kv::rotate
