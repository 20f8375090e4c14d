#pragma once

#include <memory>

#include "kv/house/house_options.h"
#include "kv/kv_cache.h"

namespace rotunda::kv::house {

/// Makes the cache. @param setup what HouseFormat::fuse left: balance.l, shift.l and feedback.l of every layer
/// @throws Error{kUser} where one is missing or does not fit.
std::unique_ptr<KvCache> make_house_cache(const KvSpec& spec, const KvModel& model, const HouseOptions& options,
                                          const ops::TensorBundle& setup);

}  // namespace rotunda::kv::house
