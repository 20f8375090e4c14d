#pragma once

#include <cstdint>

#include "model/config_file.h"
#include "ops/rope.h"

namespace rotunda::model {

/// Reads the rotary embedding's settings: `rope_theta` and `rope_scaling` (its type under `rope_type`, or `type` in old files),
/// or both of them in `rope_parameters`, as newer versions of transformers write.
/// @throws Error{kUser} naming file and key for an unknown type, a missing setting, or a value out of range.
ops::RopeSpec read_rope_spec(const ConfigFile& config, int head_dim, int64_t max_position_embeddings);

}  // namespace rotunda::model
