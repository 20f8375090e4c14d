#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace rotunda::io::tokenizer {

/// One code point of a UTF-8 text and how many bytes it takes.
struct CodePoint {
  char32_t value;
  size_t size_bytes;
};

/// The code point that begins at `text[pos]`; `text` must be valid UTF-8 and `pos` at a character's first byte.
CodePoint code_point_at(std::string_view text, size_t pos);
/// The code point that ends right before `text[end]`, end > 0; `text` as above.
CodePoint code_point_before(std::string_view text, size_t end);
/// Appends `cp` in UTF-8; surrogates and values beyond U+10FFFF become U+FFFD.
void append_utf8(std::string& out, char32_t cp);
/// `bytes` with every maximal ill-formed run replaced by one U+FFFD (Unicode 15, section 3.9; Python's errors="replace").
std::string replace_ill_formed(std::string_view bytes);
bool is_valid_utf8(std::string_view bytes);

/// The Unicode property White_Space (what `\s` means to the Hugging Face tokenizers).
bool is_white_space(char32_t cp);
/// White_Space and U+001C..U+001F (what Python's str.strip removes).
bool is_python_space(char32_t cp);
/// Alphabetic, marks, decimal digits, connector punctuation, join controls: the word characters of Unicode TR18.
bool is_word_char(char32_t cp);
/// General category N*.
bool is_numeric(char32_t cp);
/// General category P*, and the ASCII signs that Unicode counts as symbols ($ + < = > ^ ` | ~).
bool is_punctuation(char32_t cp);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };
/// The Unicode normal form of a valid UTF-8 text; time in n log n at worst, also for long runs of combining marks.
std::string normalize(std::string_view text, NormalForm form);
/// Every character lowercased on its own (no rule looks at its neighbours), as Rust's char::to_lowercase does.
std::string lowercase(std::string_view text);

}  // namespace rotunda::io::tokenizer
