#include <array>
#include <string>
#include <string_view>

#include "io/tokenizer/pipeline.h"
#include "io/tokenizer/utf8.h"

namespace rotunda::io::tokenizer {
namespace {

// Byte-level BPE writes every byte as a printable character: the printable ones of Latin-1 as themselves, the other 68
// as U+0100 onwards in order.
struct ByteChars {
  std::array<std::string, 256> text;
  std::array<int, 0x144> byte_of{};  // by code point; -1 for none

  ByteChars() {
    byte_of.fill(-1);
    char32_t next = 0x100;
    for (unsigned b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      const char32_t cp = printable ? b : next++;
      append_utf8(text[b], cp);
      byte_of[cp] = static_cast<int>(b);
    }
  }
};

const ByteChars& byte_chars() {
  static const ByteChars table;
  return table;
}

}  // namespace

std::string to_byte_chars(std::string_view bytes) {
  const ByteChars& table = byte_chars();
  std::string out;
  out.reserve(bytes.size() + bytes.size() / 4);
  for (const char b : bytes) out += table.text[static_cast<unsigned char>(b)];
  return out;
}

void append_from_byte_chars(std::string_view token, std::string& bytes) {
  const ByteChars& table = byte_chars();
  const size_t before = bytes.size();
  for (size_t pos = 0; pos < token.size();) {
    const CodePoint cp = code_point_at(token, pos);
    pos += cp.size_bytes;
    const int byte = cp.value < table.byte_of.size() ? table.byte_of[cp.value] : -1;
    if (byte < 0) {
      bytes.resize(before);
      bytes += token;
      return;
    }
    bytes += static_cast<char>(byte);
  }
}

}  // namespace rotunda::io::tokenizer
