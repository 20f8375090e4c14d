#pragma once

#include <filesystem>
#include <memory>

#include "io/tokenizer/hf_config.h"
#include "io/tokenizer/tokenizer.h"

namespace rotunda::io::tokenizer {

/// Reads a SentencePiece `tokenizer.model` and behaves as transformers' LlamaTokenizer does with it and `config`
/// (legacy behaviour unless the config says "legacy": false).
/// @throws Error{kUser} naming the file where it is damaged or no BPE model.
std::unique_ptr<const Tokenizer> load_sp_tokenizer(const std::filesystem::path& path, const HfConfig& config);

}  // namespace rotunda::io::tokenizer
