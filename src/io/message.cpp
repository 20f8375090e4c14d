#include "io/message.h"

namespace rotunda::io {

std::string printable(std::string_view text) {
  static constexpr size_t kMaxBytes = 200;
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, kMaxBytes)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    } else {
      out += c;
    }
  }
  return text.size() > kMaxBytes ? out + "..." : out;
}

std::string json_error_detail(std::string_view what) {
  // "[json.exception.parse_error.101] parse error at line 1, column 2: <detail>", or without a place "[...] <detail>".
  if (const size_t id_end = what.find("] "); id_end != std::string_view::npos) what.remove_prefix(id_end + 2);
  if (what.substr(0, 11) == "parse error") {
    if (const size_t colon = what.find(": "); colon != std::string_view::npos) what.remove_prefix(colon + 2);
  }
  return printable(what);
}

}  // namespace rotunda::io
