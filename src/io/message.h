#pragma once

#include <string>
#include <string_view>

namespace rotunda::io {

/// Text out of a file as it may stand in a one-line message: control bytes as \xNN, cut after 200 bytes.
std::string printable(std::string_view text);

/// What remains of a message of the JSON library behind its own id, line and column; printable.
std::string json_error_detail(std::string_view what);

}  // namespace rotunda::io
