// Any bytes as tokenizer.json: an Error or a tokenizer that encodes and decodes.

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/error.h"
#include "io/tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("rotunda_fuzz_json_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "tokenizer.json", std::ios::binary | std::ios::trunc)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const auto tokenizer = rotunda::io::load_tokenizer(folder);
    const auto ids = tokenizer->encode("Hello  wo\xCC\x81rld 123\n\t\xF0\x9F\x98\x80 \xFF <s>", true);
    tokenizer->decode(ids, false);
    rotunda::io::StreamDecoder stream(*tokenizer);
    for (const int64_t id : ids) stream.push(id);
    stream.finish();
  } catch (const rotunda::Error& e) {
    if (e.fault() == rotunda::Fault::kBug) throw;
  }
  return 0;
}
