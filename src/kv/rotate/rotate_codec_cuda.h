#pragma once

#include <memory>
#include <vector>

#include "kv/kv_cache.h"
#include "kv/page_codec_cuda.h"
#include "kv/rotate/rotate_options.h"

namespace rotunda::kv::rotate {

/// The format on the current GPU.
/// @param key_groups [n_layers][kv_channels] the quantization group of each rotated key channel
std::unique_ptr<PageCodecCuda> make_rotate_codec_cuda(const KvModel& model, const RotateOptions& options,
                                                      const std::vector<std::vector<uint16_t>>& key_groups);

}  // namespace rotunda::kv::rotate
