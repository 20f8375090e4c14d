#pragma once

#include <memory>

#include "kernels/attention/decode_attention.h"
#include "kv/kv_cache.h"
#include "kv/page_codec_cuda.h"

namespace rotunda::kv::plain {

/// Pages of elements as they are. Decode attention is there for bf16 and fp16 and heads of 64, 128 and 256 channels, eight query heads to a
/// kv head at most; else pages are unpacked for every token.
std::unique_ptr<PageCodecCuda> make_plain_codec_cuda(const KvModel& model, kernels::ElementType type);

}  // namespace rotunda::kv::plain
