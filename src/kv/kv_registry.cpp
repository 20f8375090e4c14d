#include "kv/kv_registry.h"

#include "base/check.h"
#include "kv_formats.h"

namespace rotunda::kv {

void KvRegistry::add(std::unique_ptr<KvFormat> format) {
  for (const auto& other : formats_)
    ROTUNDA_ASSERT(other->name() != format->name(), "kv format ", format->name(), " is registered twice");
  formats_.push_back(std::move(format));
}

const KvFormat& KvRegistry::get(const std::string& name) const {
  std::string known;
  for (const auto& format : formats_) {
    if (format->name() == name) return *format;
    known += (known.empty() ? "" : ", ") + format->name();
  }
  throw_user_error("kv format '" + name + "' is unknown, expected one of: " + known);
}

const KvRegistry& kv_registry() {
  static const KvRegistry registry = [] {
    KvRegistry made;
    register_all(made);
    return made;
  }();
  return registry;
}

}  // namespace rotunda::kv
