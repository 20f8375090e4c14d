#include "kv/plain/plain_format.h"

#include "base/check.h"
#include "kv/paged_cache.h"
#include "kv/plain/plain_cache.h"
#ifdef ROTUNDA_CUDA
#include "kv/cache_cuda.h"
#include "kv/plain/plain_codec_cuda.h"
#endif

namespace rotunda::kv::plain {

std::string PlainFormat::summary() const {
  return "keys and values as they are, " + std::to_string(8 * kernels::element_bytes(type_)) + " bits an element";
}

void PlainFormat::validate(const KvSpec& spec) const {
  ROTUNDA_CHECK(spec.options.empty(), "kv format ", name_, ": option '", spec.options.begin()->first, "' is unknown, it has no options");
}

std::optional<std::string> PlainFormat::unsupported_reason(const KvSpec&, const KvModel& model) const {
  if (const auto reason = device_unsupported_reason(*this, model, /*has_cuda_half=*/true)) return reason;
  if (model.head_dim % 16 == 0) return std::nullopt;
  return concat(name_, ": head_dim ", model.head_dim, " is not a multiple of 16");
}

int64_t PlainFormat::planned_bytes(const KvSpec&, const KvModel& model, int64_t kv_len) const {
  const int64_t pages = (kv_len + kPageTokens - 1) / kPageTokens;
  return pages * plain_layout(model, type_).page_bytes() * model.n_layers;  // on every device
}

std::unique_ptr<KvCache> PlainFormat::make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle&) const {
  validate(spec);
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
#ifdef ROTUNDA_CUDA
  if (model.device.is_cuda()) return make_cache_cuda(spec, model, std::nullopt, make_plain_codec_cuda(model, type_));
#endif
  return make_plain_cache(spec, model, type_);
}

}  // namespace rotunda::kv::plain
