#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/control.h"
#include "engine/kv_binding.h"
#include "engine/session.h"

namespace rotunda::engine {

// Looks inside a model while it reads a text, through the cache's interface alone: one sequence, all tokens in one step.

/// What each layer's attention loses: ||stored - exact|| / ||exact|| over the outputs of all tokens and heads, both made of the same
/// inputs, which are those of an exact run, so that no layer's error reaches the next. Stored: the tokens see the stored form of all keys
/// and values (StepKind::kQuantizeAll). Exact: fp32 attention; where the format fuses the projections, whose output is then in a basis that
/// the format alone knows, its own attention with all tokens in one step.
/// @return [n_layers]
std::vector<double> layer_errors(const KvBinding& binding, std::span<const int64_t> tokens, StopFlag stop);

/// Keys of one layer before RoPE, as the model makes them.   @return [T, kv_channels] fp32
at::Tensor model_keys(const Session& session, int layer, std::span<const int64_t> tokens, StopFlag stop);

/// The same keys as the binding's cache codes them (KvCache::keys_to_code).
/// @return [T, kv_channels] fp32; undefined where it does not tell
at::Tensor coded_keys(const KvBinding& binding, int layer, std::span<const int64_t> tokens, StopFlag stop);

/// The share of each layer's attention that each token gets, over all heads and all tokens that look. Rows sum to 1.
/// @return [n_layers, T] fp32
at::Tensor attention_shares(const Session& session, std::span<const int64_t> tokens, StopFlag stop);

}  // namespace rotunda::engine
