#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/control.h"
#include "engine/session.h"
#include "kv/kv_format.h"

namespace rotunda::engine {

/// A model made ready for one kind of cache: what the format fuses is fused, its calibration is at hand.
struct KvBinding {
  kv::KvSpec requested;                  ///< as the user gave it
  kv::KvSpec used;                       ///< with every default filled in
  const kv::KvFormat* format = nullptr;  ///< owned by the registry
  std::shared_ptr<const model::CausalLm> model;
  std::optional<ops::TensorBundle> calibration;
  ops::TensorBundle setup;  ///< the calibration and what the format learned from the weights

  std::unique_ptr<kv::KvCache> make_cache() const;
};

/// @param calibration_file  as `calibrate` wrote it; without one a format that wants a calibration gets the built-in one
/// @throws Error{kUser} for a spec, a model or a file that do not fit together; Error{kWorld} for files; Interrupted.
KvBinding bind_kv(const Session& session, const kv::KvSpec& spec, const std::optional<std::filesystem::path>& calibration_file,
                  const Progress& progress, StopFlag stop);

/// Asks before anything is allocated whether caches of these lengths (tokens) fit the memory that the device has left.
/// @throws Error{kWorld} naming length, bytes wanted and bytes there.
void require_memory(const KvBinding& binding, const std::vector<int64_t>& kv_lens);

/// The longest sequence whose cache takes at most `budget_bytes`, up to `limit` tokens.
int64_t longest_kv_len(const kv::KvFormat& format, const kv::KvSpec& spec, const kv::KvModel& model, int64_t budget_bytes,
                       int64_t limit);

}  // namespace rotunda::engine
