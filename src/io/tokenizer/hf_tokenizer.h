#pragma once

#include <filesystem>
#include <memory>

#include "io/tokenizer/hf_config.h"
#include "io/tokenizer/tokenizer.h"

namespace rotunda::io::tokenizer {

/// Reads a `tokenizer.json` (BPE models) the way transformers' fast tokenizers do, with what `config` adds to it.
/// @throws Error{kUser} naming file and part for anything damaged or unsupported.
std::unique_ptr<const Tokenizer> load_hf_tokenizer(const std::filesystem::path& path, const HfConfig& config);

}  // namespace rotunda::io::tokenizer
