#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace rotunda::io {

/// Containers within containers that `parse_json` accepts; copying a json value recurses once per level.
constexpr int kMaxJsonDepth = 256;

/// Reads a JSON file. A byte order mark is skipped; a key given twice keeps its last value.
/// @throws Error{kWorld} if it cannot be read, Error{kUser} `path:line:column: ...` where it is not JSON (lines and
/// columns count from 1, columns in bytes) or nests deeper than kMaxJsonDepth.
nlohmann::json read_json(const std::filesystem::path& path);

/// `read_json` for text in memory; `origin` stands for the path in messages.
nlohmann::json parse_json(std::string_view text, const std::string& origin);

}  // namespace rotunda::io
