#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "io/safetensors.h"

namespace rotunda::io {

/// What the head of a safetensors file says, after every check.
struct SafetensorsHeader {
  std::map<std::string, SafetensorsFile::Entry> entries;
  std::map<std::string, std::string> metadata;
};

/// A file is: header_bytes as uint64 little-endian, the header (JSON), the data that its offsets count from.
constexpr int64_t kSafetensorsPrefixBytes = 8;
/// As the reference implementation: no more, so that a lying length cannot make a reader chew on the data.
constexpr int64_t kMaxSafetensorsHeaderBytes = 100'000'000;

/// Checks a header whole: JSON, an object of objects, known dtypes, shapes that fit their bytes, no key twice, tensors
/// that tile the data without overlap, gap or rest.
/// @param header_json  The header alone.  @param data_bytes  Length of what follows it.  @param origin  The path, for
/// messages.
/// @return entries with offsets from the start of the file.
/// @throws Error{kUser}: one line with origin, tensor, got and expected.
SafetensorsHeader parse_safetensors_header(std::string_view header_json, int64_t data_bytes, const std::string& origin);

/// The same for the bytes of a whole file; checks the prefix too.
SafetensorsHeader parse_safetensors(std::string_view file_bytes, const std::string& origin);

/// "BF16" for kBFloat16; empty where the format has no such dtype.
std::string_view safetensors_dtype_name(at::ScalarType dtype);

}  // namespace rotunda::io
