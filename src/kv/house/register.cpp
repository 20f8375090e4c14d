#include "kv/house/house_format.h"
#include "kv/kv_registry.h"

namespace rotunda::kv {

void register_house(KvRegistry& registry) {
  for (int bits = house::kLeastBits; bits <= house::kMostBits; ++bits) registry.add(std::make_unique<house::HouseFormat>(bits));
}

}  // namespace rotunda::kv
