#pragma once

#include <memory>
#include <vector>

#include "kv/grouped/grouped_options.h"
#include "kv/grouped/head_basis.h"
#include "kv/kv_cache.h"

namespace rotunda::kv::grouped {

/// Makes the cache. Values come in the basis that the fused projections give; keys are brought into theirs here.
/// @param key_bases [n_layers]
std::unique_ptr<KvCache> make_grouped_cache(const KvSpec& spec, const KvModel& model, const GroupedOptions& options,
                                            const GroupedPageLayout& layout, std::vector<HeadBasis> key_bases);

}  // namespace rotunda::kv::grouped
