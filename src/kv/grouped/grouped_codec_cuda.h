#pragma once

#include <memory>
#include <vector>

#include "kv/grouped/grouped_options.h"
#include "kv/grouped/head_basis.h"
#include "kv/page_codec_cuda.h"

namespace rotunda::kv::grouped {

/// Any grouped format on the current GPU; decode attention on packed pages for fp8 alone. @param key_bases [n_layers]
std::unique_ptr<PageCodecCuda> make_grouped_codec_cuda(const KvModel& model, const GroupedOptions& options, const GroupedPageLayout& layout,
                                                       const std::vector<HeadBasis>& key_bases);

}  // namespace rotunda::kv::grouped
