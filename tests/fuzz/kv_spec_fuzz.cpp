// Any text as a list of cache specs: it is read, or refused with an Error; what is read prints to what reads back as the same.

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "kv/kv_registry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rotunda;
  try {
    for (const kv::KvSpec& spec : kv::parse_kv_specs({reinterpret_cast<const char*>(data), size})) {
      if (!(kv::parse_kv_spec(spec.to_string()) == spec)) std::abort();
      kv::kv_registry().get(spec).validate(spec);
    }
  } catch (const Error& error) {
    if (error.fault() == Fault::kBug) std::abort();
  }
  return 0;
}
