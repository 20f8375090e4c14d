#pragma once

#include <memory>
#include <optional>

#include "kv/kv_cache.h"
#include "kv/kv_options.h"
#include "kv/page_codec_cuda.h"

namespace rotunda::kv {

/// A cache on the current GPU, for any format: pages in one pool that grows in place, and what `exact` keeps in 16 bits beside them, which
/// WindowedCache describes. A saved sequence is the same as the CPU's.
///
/// A step of single tokens launches the same kernels on the same addresses whatever the sequences are, so it can be captured in a CUDA
/// graph (KvCache::graph_epoch).
/// @param exact what is kept in 16 bits; nothing: the format has no window, and saved sequences say nothing of one
std::unique_ptr<KvCache> make_cache_cuda(const KvSpec& spec, const KvModel& model, const std::optional<ExactOptions>& exact,
                                         std::unique_ptr<PageCodecCuda> codec);

/// KvFormat::planned_bytes of such a cache. @param layer_bytes as PageCodecCuda has it
int64_t planned_cuda_bytes(const ExactOptions& exact, const KvModel& model, int64_t layer_bytes, int64_t kv_len);

}  // namespace rotunda::kv
