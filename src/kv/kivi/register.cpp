#include "kv/kivi/kivi_format.h"
#include "kv/kv_registry.h"

namespace rotunda::kv {

void register_kivi(KvRegistry& registry) {
  for (const int bits : {2, 4}) registry.add(std::make_unique<kivi::KiviFormat>(bits));
}

}  // namespace rotunda::kv
