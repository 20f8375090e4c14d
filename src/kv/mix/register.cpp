#include "kv/kv_registry.h"
#include "kv/mix/mix_format.h"

namespace rotunda::kv {

void register_mix(KvRegistry& registry) { registry.set_mix(std::make_unique<mix::MixFormat>()); }

}  // namespace rotunda::kv
