#include "engine/self_check.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>

#include "base/check.h"
#include "engine/calibration.h"
#include "engine/perplexity.h"

namespace rotunda::engine {

namespace {

constexpr int64_t kWindowLen = 384;
constexpr double kMostKl = 0.05;
constexpr double kLeastAgreement = 0.85;
constexpr double kBitsBelow = 4.0;
// Formats that differ by less are of one size.
constexpr double kSameSizeBits = 0.5;
// Where windows, sinks and the room in the last page count for nothing.
constexpr int64_t kManyTokens = int64_t{1} << 20;

// Bits of an element in the long run; of a mix those of its smallest part.
double least_bits(const Session& session, const kv::KvSpec& spec) {
  if (!spec.parts.empty()) {
    double least = least_bits(session, spec.parts.front().spec);
    for (const kv::KvSpecPart& part : spec.parts) least = std::min(least, least_bits(session, part.spec));
    return least;
  }
  kv::KvModel layer = session.model->info().kv;
  layer.n_layers = 1;
  const auto bytes = static_cast<double>(session.formats->get(spec).planned_bytes(spec, layer, kManyTokens));
  return 8.0 * bytes / (2.0 * layer.kv_channels() * static_cast<double>(kManyTokens));
}

// Of the second half of the built-in text, for a calibration made of it has seen the first; as much as fills the window.
std::string_view text_to_check() {
  constexpr size_t kBytesPerToken = 8;  // more than any tokenizer makes of it
  const std::string_view text = builtin_calibration_text();
  const size_t begin = text.find('\n', text.size() / 2) + 1;
  return text.substr(begin, text.find('\n', begin + kBytesPerToken * kWindowLen) - begin);
}

// What to try in place of the binding's cache: the recommended formats of its size and above, smallest first.
std::vector<kv::KvSpec> alternatives(const Session& session, const KvBinding& binding) {
  const double least = least_bits(session, binding.used) - kSameSizeBits;
  std::multimap<double, kv::KvSpec> by_bits;
  for (const auto& format : session.formats->all()) {
    const kv::KvSpec spec{.format = format->name(), .options = {}, .parts = {}};
    const kv::KvSpec full = format->with_defaults(spec);
    if (!format->recommended() || spec == binding.requested ||
        format->unsupported_reason(full, session.model->info().kv))
      continue;
    const double bits = least_bits(session, full);
    if (bits >= least) by_bits.emplace(bits, spec);
  }
  std::vector<kv::KvSpec> specs;
  for (const auto& [bits, spec] : by_bits) specs.push_back(spec);
  return specs;
}

std::string percent(double share) { return concat(std::lround(100.0 * share), " %"); }
double rounded(double kl) { return std::round(1e4 * kl) / 1e4; }

}  // namespace

SelfCheckMode parse_self_check(const std::string& text) {
  if (text == "off") return SelfCheckMode::kOff;
  if (text == "on") return SelfCheckMode::kOn;
  ROTUNDA_CHECK(text == "auto", "--self-check: got '", text, "', expected on, off or auto");
  return SelfCheckMode::kAuto;
}

bool CacheQuality::good() const { return mean_kl <= kMostKl && top1_agreement >= kLeastAgreement; }

std::string SelfCheck::warning() const {
  if (quality.good()) return "";
  const std::string advice = better
                                 ? concat("--kv ", better->requested.to_string(), " was tried as well and is good (",
                                          percent(1.0 - better->top1_agreement), ", KL ", rounded(better->mean_kl), ")")
                                 : concat("no packed format that was tried is good either; --kv ", kReferenceKv,
                                          " is the 16-bit cache itself");
  return concat("--kv ", quality.requested.to_string(), " does badly on this model, expect wrong answers: for ",
                percent(1.0 - quality.top1_agreement), " of ", tokens,
                " tokens of a test text another next token is likeliest than with the ", "16-bit cache, KL ",
                rounded(quality.mean_kl), " (good: up to ", percent(1.0 - kLeastAgreement), ", KL ", kMostKl, "). ",
                advice);
}

std::optional<SelfCheck> self_check(const Session& session, const KvBinding& binding, SelfCheckMode mode,
                                    const Progress& progress, StopFlag stop) {
  if (mode == SelfCheckMode::kOff || (mode == SelfCheckMode::kAuto && least_bits(session, binding.used) >= kBitsBelow))
    return std::nullopt;
  const auto start = std::chrono::steady_clock::now();
  EvalOptions options;
  options.limit = 1;
  options.stop = stop;
  if (progress)
    options.progress = [&](const std::string&, int64_t done, int64_t total) { progress("self-check", done, total); };
  const TextWindows text = cut_text(session, text_to_check(), kWindowLen);
  const auto quality_of = [](const PerplexityResult& result) {
    return CacheQuality{
        .requested = result.requested, .mean_kl = result.mean_kl, .top1_agreement = result.top1_agreement};
  };
  SelfCheck check;
  const PerplexityReport report = evaluate_perplexity(session, text, {binding}, options);
  check.quality = quality_of(report.results[0]);
  check.tokens = report.scored_tokens;
  if (!check.quality.good()) {
    for (const kv::KvSpec& spec : alternatives(session, binding)) {
      options.specs = {spec};
      const CacheQuality other =
          quality_of(evaluate_perplexity(session, text, bind_all(session, options), options).results[0]);
      if (!other.good()) continue;
      check.better = other;
      break;
    }
  }
  check.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return check;
}

}  // namespace rotunda::engine
