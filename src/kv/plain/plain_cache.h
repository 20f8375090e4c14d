#pragma once

#include <memory>

#include "kernels/attention/decode_attention.h"
#include "kv/kv_cache.h"

namespace rotunda::kv::plain {

/// The page of one layer of `model`.
kernels::PlainPageLayout plain_layout(const KvModel& model, kernels::ElementType type);

/// A cache that holds keys and values in `type`. Attention always reads the rounded elements, those of the running chunk too,
/// so results do not depend on how a prompt is cut into chunks.
std::unique_ptr<KvCache> make_plain_cache(const KvSpec& spec, const KvModel& model, kernels::ElementType type);

}  // namespace rotunda::kv::plain
