#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/error.h"
#include "io/tokenizer/tokenizer.h"

namespace rotunda {

/// Writes the bytes to `file_name` in a folder of this process, loads it as a tokenizer's folder, and has what loads encode and decode.
inline int fuzz_tokenizer(const std::string& file_name, const uint8_t* data, size_t size) {
  static const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("rotunda_fuzz_" + file_name + "_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  std::ofstream(folder / file_name, std::ios::binary | std::ios::trunc)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const auto tokenizer = io::load_tokenizer(folder);
    const auto ids = tokenizer->encode("Hello  wo\xCC\x81rld 123\n\t\xF0\x9F\x98\x80 \xFF <s>", true);
    tokenizer->decode(ids, false);
    io::StreamDecoder stream(*tokenizer);
    for (const int64_t id : ids) stream.push(id);
    stream.finish();
  } catch (const Error& e) {
    if (e.fault() == Fault::kBug) throw;
  }
  return 0;
}

}  // namespace rotunda
