#pragma once

#include <filesystem>
#include <string>

namespace rotunda::cli {

/// Writes and flushes. @throws Error{kWorld} where stdout cannot be written (a full disk, a closed pipe).
void write_stdout(const std::string& text);

/// Asks whether a file can be made at `path`, before the work that it is for. @throws Error{kWorld} naming path and reason.
void check_writable(const std::filesystem::path& path);

/// Writes a whole file through a temporary one beside it: a reader sees the old file or the new one, never half of it.
/// @throws Error{kWorld} naming path and reason; then nothing is left behind.
void write_file_atomically(const std::filesystem::path& path, const std::string& content);

}  // namespace rotunda::cli
