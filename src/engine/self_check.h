#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "engine/kv_binding.h"

namespace rotunda::engine {

/// Whether a cache is tried on a few hundred tokens before it is used.
enum class SelfCheckMode {
  kOff,
  kOn,
  kAuto,  ///< where a layer's cache has fewer than 4 bits an element
};
/// "off", "on" or "auto". @throws Error{kUser} listing them.
SelfCheckMode parse_self_check(const std::string& text);

/// How far a cache is from the 16-bit one on the built-in text.
struct CacheQuality {
  kv::KvSpec requested;
  double mean_kl = 0.0;
  double top1_agreement = 0.0;

  /// Neither of the two is beyond what caches show that still answer as the 16-bit one does; docs/benchmarks.md has the figures behind it.
  bool good() const;
};

struct SelfCheck {
  CacheQuality quality;
  int64_t tokens = 0;  ///< compared
  std::optional<CacheQuality>
      better;  ///< where the quality is not good: the smallest format found good by the same check, if any was
  double seconds = 0.0;

  /// What to tell the user: what was seen, what it means, what to take instead. Empty where the quality is good.
  std::string warning() const;
};

/// Tries the cache of a binding where the mode asks for it: two runs over 384 tokens, one with the 16-bit cache, and another two for each
/// recommended format (KvFormat::recommended) that is tried because the cache does badly.
/// @throws Error of cache or model, Interrupted.
std::optional<SelfCheck> self_check(const Session& session, const KvBinding& binding, SelfCheckMode mode,
                                    const Progress& progress, StopFlag stop);

}  // namespace rotunda::engine
