#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "io/tokenizer/json_reader.h"

/// The stages around the model in `tokenizer.json`. Each is read from its JSON into a function; all functions are
/// pure and may run in several threads at once. Texts are valid UTF-8.
namespace rotunda::io::tokenizer {

/// A part of the text that the model will see as one word.
struct Piece {
  std::string text;
  bool at_start;  ///< begins where the whole text begins (Metaspace prepend_scheme "first" asks)
};

using Normalizer = std::function<std::string(std::string)>;
using PreTokenizer = std::function<std::vector<Piece>(std::vector<Piece>)>;
/// From token texts to token texts; the decoded text is their concatenation.
using TokenDecoder = std::function<std::vector<std::string>(std::vector<std::string>)>;

/// Sequence, Prepend, Replace, NFC, NFD, NFKC, NFKD, Lowercase, Strip.
/// @throws Error{kUser} naming the part for any other type, as the two below.
Normalizer read_normalizer(const JsonRef& json);

/// Sequence, Split, ByteLevel, Digits, Punctuation, Whitespace, WhitespaceSplit, Metaspace.
/// @param byte_level_prefix_space overrides add_prefix_space of a ByteLevel at the top where not null
PreTokenizer read_pre_tokenizer(const JsonRef& json, const bool* byte_level_prefix_space);

/// Sequence, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip.
TokenDecoder read_decoder(const JsonRef& json);

/// Whether the pieces are spelled in the 256 stand-in characters of byte-level BPE is the vocabulary's affair; this is
/// the mapping: the bytes as those characters.
std::string to_byte_chars(std::string_view bytes);
/// Appends the bytes that `token` stands for; a token with any other character in it stands for its own UTF-8.
void append_from_byte_chars(std::string_view token, std::string& bytes);

}  // namespace rotunda::io::tokenizer
