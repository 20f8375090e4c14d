#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "engine/sampling.h"

namespace rotunda::engine {

/// What Sampler::sample does, for a batch, with tensor operators alone: on a GPU nothing is read back on the way, so that it can be part of
/// a recorded step.
/// @param logits [N, vocab_size] fp32
/// @param draws  [N] fp64, Sampler::draw() of each sequence, on the same device; not read where sampling is greedy
/// @return [N] int64 ids; negative where a row's logits are at fault, see checked_ids()
at::Tensor sample_rows(const at::Tensor& logits, const SamplingOptions& options, const at::Tensor& draws);

/// The ids of sample_rows, read back. @throws Error{kUser} as Sampler::sample does, for the first row at fault
std::vector<int64_t> checked_ids(const at::Tensor& ids);

}  // namespace rotunda::engine
