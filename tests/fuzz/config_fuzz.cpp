// Any bytes as config.json: either the settings of a model or one user error, never anything else.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "model/model_registry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rotunda;
  // Bytes behind a zero byte are generation_config.json.
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const size_t split = text.find('\0');
  try {
    model::ModelFolder folder{"m", model::ConfigFile::parse(text.substr(0, split), "config.json"), {}};
    if (split != std::string_view::npos)
      folder.generation_config = model::ConfigFile::parse(text.substr(split + 1), "generation_config.json");
    const model::CausalLmInfo info = model::model_registry().get(folder.config).read_info(folder, model::CausalLmOptions{});
    if (info.n_parameters <= 0 || info.kv.head_dim <= 0 || info.kv.n_heads % info.kv.n_kv_heads != 0) __builtin_trap();
  } catch (const Error& error) {
    if (error.fault() != Fault::kUser) __builtin_trap();
  }
  return 0;
}
