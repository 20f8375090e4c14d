// Any bytes as tokenizer.json: an Error or a tokenizer that encodes and decodes.

#include "tokenizer_fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return rotunda::fuzz_tokenizer("tokenizer.json", data, size); }
