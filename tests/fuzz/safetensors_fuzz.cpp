// Any bytes as a safetensors file, and as a header alone. A refusal must be an Error of the user's fault on one line;
// what is accepted must tile the data, tensor by tensor.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "io/safetensors_header.h"

namespace {

using rotunda::io::SafetensorsHeader;

void require(bool condition) {
  if (!condition) std::abort();  // a finding
}

void check_accepted(const SafetensorsHeader& header, int64_t data_start, int64_t file_bytes) {
  int64_t total_bytes = 0;
  for (const auto& [name, entry] : header.entries) {
    require(name != "__metadata__");
    require(data_start <= entry.begin_byte && entry.begin_byte <= entry.end_byte && entry.end_byte <= file_bytes);
    int64_t size_bytes = static_cast<int64_t>(c10::elementSize(entry.dtype));
    for (const int64_t size : entry.shape) {
      require(size >= 0);
      size_bytes *= size;  // UBSan watches
    }
    require(size_bytes == entry.end_byte - entry.begin_byte);
    for (const auto& [other_name, other] : header.entries) {
      if (&other == &entry || size_bytes == 0 || other.begin_byte == other.end_byte) continue;
      require(entry.end_byte <= other.begin_byte || other.end_byte <= entry.begin_byte);
    }
    total_bytes += size_bytes;
  }
  require(total_bytes == file_bytes - data_start);
}

template <typename Parse>
bool refused(SafetensorsHeader& header, Parse parse) {
  try {
    header = parse();
    return false;
  } catch (const rotunda::Error& error) {
    const std::string_view message = error.what();
    require(error.fault() == rotunda::Fault::kUser && message.substr(0, 3) == "f: " &&
            message.find('\n') == message.npos && message.size() < 4096);
    return true;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rotunda::io;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  SafetensorsHeader header;

  if (!refused(header, [&] { return parse_safetensors(bytes, "f"); })) {
    int64_t header_bytes = 0;
    for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | data[i];
    check_accepted(header, kSafetensorsPrefixBytes + header_bytes, static_cast<int64_t>(size));
  }

  // The header alone, before data of a length that the input chooses: mutations of the JSON get through without the
  // prefix.
  if (size == 0) return 0;
  const int64_t data_bytes = data[size - 1];
  const std::string_view json = bytes.substr(0, size - 1);
  if (!refused(header, [&] { return parse_safetensors_header(json, data_bytes, "f"); })) {
    const int64_t data_start = kSafetensorsPrefixBytes + static_cast<int64_t>(json.size());
    check_accepted(header, data_start, data_start + data_bytes);
  }
  return 0;
}
