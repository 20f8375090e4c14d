#pragma once

#include <memory>

#include "kv/house/house_options.h"
#include "kv/page_codec_cuda.h"

namespace rotunda::kv::house {

/// Positions from this one on are refused where keys are shifted: the turns of all pages before it lie in a table, whose address a CUDA
/// graph remembers (4 MB at head_dim 128, one for all layers).
inline constexpr int64_t kMaxShiftedPositions = int64_t{1} << 20;

/// PagedShift::turns out of cos and sin at the places of a page.
/// @param turns [8 n_steps n_kv_heads, 128, 2] fp32, pairs of a kv head together
/// @return [n_kv_heads, n_steps, 8, 2, 32, 8] fp16
at::Tensor shift_operands(const at::Tensor& turns, int64_t n_steps);

/// rotunda2/3/4 on the current GPU. @param setup what HouseFormat::fuse left: balance.l, shift.l and feedback.l of every layer
/// @throws Error{kUser} where one is missing or does not fit.
std::unique_ptr<PageCodecCuda> make_house_codec_cuda(const KvModel& model, const HouseOptions& options, const ops::TensorBundle& setup);

}  // namespace rotunda::kv::house
