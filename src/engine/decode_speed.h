#pragma once

#include <cstdint>
#include <span>

#include "engine/control.h"
#include "engine/kv_binding.h"

namespace rotunda::engine {

/// Tokens per second of decoding one sequence behind a prompt: one over the median time of a step, logits included.
/// @param prompt  run in chunks first, not timed   @param next  fed one by one, one timed step each; not empty
double decode_tok_s(const KvBinding& binding, std::span<const int64_t> prompt, std::span<const int64_t> next,
                    int64_t prefill_chunk, StopFlag stop);

}  // namespace rotunda::engine
