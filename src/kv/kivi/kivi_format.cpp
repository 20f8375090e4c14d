#include "kv/kivi/kivi_format.h"

#include "base/check.h"
#include "kv/kivi/kivi_cache.h"
#include "kv/windowed_cache.h"

namespace rotunda::kv::kivi {

namespace {

// The residual length of the paper's experiments.
constexpr ExactOptions kDefaults{.recent = 128, .sinks = 0, .pack_group = kGroup};

KiviPageLayout layout_of(int bits, const KvModel& model) { return {bits, model.n_kv_heads, model.head_dim, kBlocksPerPage}; }

}  // namespace

std::string KiviFormat::name() const { return concat("kivi", bits_); }

std::string KiviFormat::summary() const {
  return concat("KIVI (arXiv:2402.02750): ", bits_, "-bit keys per channel and values per token, 32 to a scale");
}

std::vector<KvOption> KiviFormat::options() const { return describe_exact_options(kDefaults); }

ExactOptions KiviFormat::exact_options(const KvSpec& spec) const {
  ExactOptions exact = kDefaults;
  for (const auto& [key, text] : spec.options) {
    if (parse_exact_option(spec, key, exact)) continue;
    std::string known;
    for (const KvOption& option : options()) known += (known.empty() ? "" : ", ") + option.name;
    throw_user_error(concat(spec.format, ": option '", key, "' is unknown, expected one of: ", known));
  }
  return exact;
}

void KiviFormat::validate(const KvSpec& spec) const { exact_options(spec); }

std::optional<std::string> KiviFormat::unsupported_reason(const KvSpec&, const KvModel& model) const {
  if (const auto reason = device_unsupported_reason(*this, model, /*has_cuda_half=*/false)) return reason;
  if (model.head_dim % kGroup != 0) return concat(name(), ": its group of ", kGroup, " channels does not divide head_dim ", model.head_dim);
  return std::nullopt;
}

int64_t KiviFormat::planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const {
  return planned_windowed_bytes(exact_options(spec), model, layout_of(bits_, model).page_bytes(), kv_len);
}

std::unique_ptr<KvCache> KiviFormat::make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle&) const {
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
  return make_kivi_cache(spec, model, exact_options(spec), layout_of(bits_, model));
}

}  // namespace rotunda::kv::kivi
