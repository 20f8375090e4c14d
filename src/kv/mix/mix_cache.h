#pragma once

#include <memory>
#include <vector>

#include "kv/kv_cache.h"
#include "kv/mix/mix_plan.h"

namespace rotunda::kv::mix {

/// One cache for a whole model out of caches for some of its layers each. Every call goes to all of them, or none of them keeps it.
/// @param caches  one per part   @param places [n_layers]
std::unique_ptr<KvCache> make_mix_cache(KvSpec spec, KvModel model, std::vector<std::unique_ptr<KvCache>> caches,
                                        std::vector<MixPlace> places);

}  // namespace rotunda::kv::mix
