#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/kv_binding.h"

namespace rotunda::engine {

/// One sequence of a cache between memory and a file.
struct SavedCache {
  ops::TensorBundle cache;      ///< as KvCache::export_sequence gave it
  std::vector<int64_t> tokens;  ///< those in the cache, then those generated but not fed yet
};

/// Writes a safetensors file with the weights' hash, the spec and the calibration's fingerprint in its metadata.
/// @throws Error{kWorld} naming the path; then nothing is left behind.
void save_cache(const std::filesystem::path& path, const KvBinding& binding, const SavedCache& saved);

/// @throws Error{kUser} naming the file where it is no saved cache, damaged, or made with other weights, another spec or
///   another calibration; Error{kWorld} where it cannot be read.
SavedCache load_cache(const std::filesystem::path& path, const KvBinding& binding);

}  // namespace rotunda::engine
