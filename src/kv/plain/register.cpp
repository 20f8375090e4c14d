#include "kv/kv_registry.h"
#include "kv/plain/plain_format.h"

namespace rotunda::kv {

void register_plain(KvRegistry& registry) {
  registry.add(std::make_unique<plain::PlainFormat>("fp32", kernels::ElementType::kFp32));
  registry.add(std::make_unique<plain::PlainFormat>("bf16", kernels::ElementType::kBf16));
  registry.add(std::make_unique<plain::PlainFormat>("fp16", kernels::ElementType::kFp16));
}

}  // namespace rotunda::kv
