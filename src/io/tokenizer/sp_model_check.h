#pragma once

#include <string>
#include <string_view>

namespace rotunda::io::tokenizer {

/// Looks through a serialized SentencePiece model before the library gets it: the library trusts its file (an odd trie in
/// the normalizer is read beyond its end), so whatever it would not survive is refused here.
/// @throws Error{kUser} "<name>: <problem>" where the bytes are no model, or one of another type than BPE.
void check_sp_model(std::string_view bytes, const std::string& name);

}  // namespace rotunda::io::tokenizer
