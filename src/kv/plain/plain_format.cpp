#include "kv/plain/plain_format.h"

#include "base/check.h"
#include "kv/paged_cache.h"
#include "kv/plain/plain_cache.h"

namespace rotunda::kv::plain {

std::string PlainFormat::summary() const {
  return "keys and values as they are, " + std::to_string(8 * kernels::element_bytes(type_)) + " bits an element";
}

void PlainFormat::validate(const KvSpec& spec) const {
  ROTUNDA_CHECK(spec.options.empty(), "kv format ", name_, ": option '", spec.options.begin()->first, "' is unknown, it has no options");
}

std::optional<std::string> PlainFormat::unsupported_reason(const KvSpec&, const KvModel& model) const {
  if (model.head_dim % 16 == 0) return std::nullopt;
  return concat(name_, " on cpu: head_dim ", model.head_dim, " is not a multiple of 16");
}

int64_t PlainFormat::planned_bytes(const KvSpec&, const KvModel& model, int64_t kv_len) const {
  const int64_t pages = (kv_len + kPageTokens - 1) / kPageTokens;
  return pages * plain_layout(model, type_).page_bytes() * model.n_layers;
}

std::unique_ptr<KvCache> PlainFormat::make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle&) const {
  validate(spec);
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
  return make_plain_cache(spec, model, type_);
}

}  // namespace rotunda::kv::plain
