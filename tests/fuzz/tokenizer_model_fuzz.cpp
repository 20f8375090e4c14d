// Any bytes as tokenizer.model (SentencePiece): an Error or a tokenizer that encodes and decodes.

#include "tokenizer_fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return rotunda::fuzz_tokenizer("tokenizer.model", data, size); }
