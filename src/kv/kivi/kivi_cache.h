#pragma once

#include <memory>

#include "kv/kivi/kernels/kivi_codec.h"
#include "kv/kv_cache.h"
#include "kv/kv_options.h"

namespace rotunda::kv::kivi {

/// @param exact its pack_group is kGroup
std::unique_ptr<KvCache> make_kivi_cache(const KvSpec& spec, const KvModel& model, const ExactOptions& exact,
                                         ZeroPoint zero, const KiviPageLayout& layout);

}  // namespace rotunda::kv::kivi
