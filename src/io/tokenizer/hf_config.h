#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "io/tokenizer/added_tokens.h"

namespace rotunda::io::tokenizer {

/// What `tokenizer_config.json` (with `special_tokens_map.json` and `added_tokens.json` beside it) says about a
/// tokenizer, read the way Hugging Face transformers reads them. A missing file leaves everything unset.
struct HfConfig {
  std::string tokenizer_class;  ///< without a "Fast" at the end; empty where not given
  std::optional<bool> add_bos_token;
  std::optional<bool> add_eos_token;
  std::optional<bool> add_prefix_space;
  std::optional<bool> legacy;
  bool clean_up_tokenization_spaces = false;

  std::vector<AddedToken> added_tokens;  ///< by id; ids as the files give them
  std::optional<AddedToken> bos, eos, unk;
  /// Every special token by its role: bos, eos, unk, sep, pad, cls, mask, then the additional ones; no content twice.
  std::vector<AddedToken> special_tokens;

  std::vector<AddedToken> additional_special_tokens;  ///< the last part of special_tokens

  bool is_llama() const { return tokenizer_class == "LlamaTokenizer" || tokenizer_class == "CodeLlamaTokenizer"; }
};

/// @param default_class the tokenizer_class where no file names one
/// @throws Error{kUser} naming file and part where a file is damaged.
HfConfig read_hf_config(const std::filesystem::path& model_dir, const std::string& default_class);

/// The clean-up that transformers applies to decoded English where clean_up_tokenization_spaces is set.
std::string clean_up_spaces(std::string text);

}  // namespace rotunda::io::tokenizer
