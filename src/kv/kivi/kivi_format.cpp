#include "kv/kivi/kivi_format.h"

#include "base/check.h"
#include "kv/kivi/kivi_cache.h"
#include "kv/windowed_cache.h"

namespace rotunda::kv::kivi {

namespace {

// The residual length of the paper's experiments.
constexpr ExactOptions kDefaults{.recent = 128, .sinks = 0, .pack_group = kGroup};

KiviPageLayout layout_of(int bits, const KvModel& model) {
  return {bits, model.n_kv_heads, model.head_dim, kBlocksPerPage};
}

}  // namespace

struct KiviFormat::Options {
  ExactOptions exact = kDefaults;
  ZeroPoint zero = ZeroPoint::kMinimum;
};

std::string KiviFormat::name() const { return concat("kivi", bits_); }

std::string KiviFormat::summary() const {
  return concat("KIVI (arXiv:2402.02750): ", bits_, "-bit keys per channel and values per token, 32 to a scale");
}

std::vector<KvOption> KiviFormat::options() const {
  std::vector<KvOption> options = describe_exact_options(kDefaults);
  options.push_back({"zero", "minimum",
                     "what code 0 stands for: a group's minimum (minimum, as published) or the multiple of its scale "
                     "nearest to it (code)"});
  return options;
}

KiviFormat::Options KiviFormat::read(const KvSpec& spec) const {
  Options read;
  for (const auto& [key, text] : spec.options) {
    if (parse_exact_option(spec, key, read.exact)) continue;
    if (key == "zero") {
      read.zero = parse_choice<ZeroPoint>(spec, key, {{"minimum", ZeroPoint::kMinimum}, {"code", ZeroPoint::kCode}});
      continue;
    }
    std::string known;
    for (const KvOption& option : options()) known += (known.empty() ? "" : ", ") + option.name;
    throw_user_error(concat(spec.format, ": option '", key, "' is unknown, expected one of: ", known));
  }
  return read;
}

void KiviFormat::validate(const KvSpec& spec) const { read(spec); }

std::optional<std::string> KiviFormat::unsupported_reason(const KvSpec&, const KvModel& model) const {
  if (const auto reason = device_unsupported_reason(*this, model, /*has_cuda_half=*/false)) return reason;
  if (model.head_dim % kGroup != 0)
    return concat(name(), ": its group of ", kGroup, " channels does not divide head_dim ", model.head_dim);
  return std::nullopt;
}

int64_t KiviFormat::planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const {
  return planned_windowed_bytes(read(spec).exact, model, layout_of(bits_, model).page_bytes(), kv_len);
}

std::unique_ptr<KvCache> KiviFormat::make_cache(const KvSpec& spec, const KvModel& model,
                                                const ops::TensorBundle&) const {
  const auto reason = unsupported_reason(spec, model);
  ROTUNDA_CHECK(!reason, *reason);
  const Options options = read(spec);
  return make_kivi_cache(spec, model, options.exact, options.zero, layout_of(bits_, model));
}

}  // namespace rotunda::kv::kivi
