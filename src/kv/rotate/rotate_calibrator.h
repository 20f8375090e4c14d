#pragma once

#include <memory>
#include <vector>

#include "kv/kv_format.h"
#include "kv/rotate/rotate_options.h"

namespace rotunda::kv::rotate {

/// Accumulates, per layer, the signed sum of every channel of k W_G (keys before RoPE), and orders channels by it: after the
/// rotation channels have stable, distinct means, and neighbours in that order span a narrow range (RotateKV, arXiv:2501.16383).
std::unique_ptr<KvCalibrator> make_rotate_calibrator(const KvModel& model);

/// The quantization group of each rotated key channel, [n_layers][kv_channels].
/// @param calibration of make_rotate_calibrator; unread for Reorder::kNone
/// @throws Error{kUser} where it is missing, or is no permutation of this model's channels.
std::vector<std::vector<uint16_t>> key_groups(const RotateOptions& options, const KvModel& model, const ops::TensorBundle& calibration);

}  // namespace rotunda::kv::rotate
