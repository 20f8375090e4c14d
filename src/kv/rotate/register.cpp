#include "kv/kv_registry.h"
#include "kv/rotate/rotate_format.h"

namespace rotunda::kv {

void register_rotate(KvRegistry& registry) {
  for (const int bits : {2, 3, 4}) registry.add(std::make_unique<rotate::RotateFormat>(bits));
}

}  // namespace rotunda::kv
