#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace rotunda::env {

/// The environment is read here and nowhere else. Empty variables count as unset.
std::optional<std::string> get(const char* name);

/// Where per-user results are kept between runs: $ROTUNDA_CACHE_DIR, else $XDG_CACHE_HOME/rotunda, else ~/.cache/rotunda.
/// @throws Error{kWorld} where none of the three can be told.
std::filesystem::path user_cache_dir();

/// Bytes of memory that the machine can still give (MemAvailable, and the cgroup's limit where one is set).
int64_t available_memory_bytes();

}  // namespace rotunda::env
