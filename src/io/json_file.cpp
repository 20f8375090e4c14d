#include "io/json_file.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io/message.h"

namespace rotunda::io {

namespace {

// "line:column" of the byte `at`, both from 1.
std::string place(std::string_view text, size_t at) {
  size_t line = 1;
  size_t line_start = 0;
  for (size_t i = 0; i < at && i < text.size(); ++i) {
    if (text[i] != '\n') continue;
    ++line;
    line_start = i + 1;
  }
  return concat(line, ":", at - line_start + 1);
}

// The library parses any depth, but copies and prints by recursion: a file of brackets would overflow the stack later.
void check_depth(std::string_view text, const std::string& origin) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      ROTUNDA_CHECK(++depth <= kMaxJsonDepth, origin, ":", place(text, i), ": nested deeper than ", kMaxJsonDepth,
                    " levels");
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& origin) {
  // The library takes a NUL byte for the end of the input and would not look at what follows.
  const size_t nul = text.find('\0');
  ROTUNDA_CHECK(nul == std::string_view::npos, origin, ":", place(text, nul), ": not JSON: byte 0");
  check_depth(text, origin);
  try {
    return nlohmann::json::parse(text.begin(), text.end());
  } catch (const nlohmann::json::parse_error& error) {
    throw_user_error(concat(origin, ":", place(text, error.byte == 0 ? 0 : error.byte - 1),
                            ": not JSON: ", json_error_detail(error.what())));
  } catch (const nlohmann::json::exception& error) {  // a number beyond double
    throw_user_error(concat(origin, ": not JSON: ", json_error_detail(error.what())));
  }
}

nlohmann::json read_json(const std::filesystem::path& path) {
  // A folder opens as a stream and fails at the first read with a reason that says nothing.
  std::error_code ignored;
  ROTUNDA_CHECK_WORLD(!std::filesystem::is_directory(path, ignored), path.string(), ": cannot read: it is a folder");
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  ROTUNDA_CHECK_WORLD(file, path.string(), ": cannot open: ", std::strerror(errno));
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  ROTUNDA_CHECK_WORLD(!file.bad(), path.string(), ": cannot read: ", std::strerror(errno));
  return parse_json(text, path.string());
}

}  // namespace rotunda::io
