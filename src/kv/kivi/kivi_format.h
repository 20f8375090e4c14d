#pragma once

#include "kv/kv_format.h"
#include "kv/kv_options.h"

namespace rotunda::kv::kivi {

/// `kivi2`, `kivi4`: KIVI (arXiv:2402.02750), keys after RoPE per channel in groups of 32 tokens, values per token in groups of 32
/// channels, asymmetric between minimum and maximum; the newest tokens in 16 bits. No rotation, no calibration.
class KiviFormat : public KvFormat {
 public:
  explicit KiviFormat(int bits) : bits_(bits) {}

  std::string name() const override;
  std::string summary() const override;
  std::vector<KvOption> options() const override;
  void validate(const KvSpec& spec) const override;
  std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const override;
  int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const override;
  std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model,
                                      const ops::TensorBundle& setup) const override;

 private:
  struct Options;
  /// @throws Error{kUser} naming format, option, got and expected.
  Options read(const KvSpec& spec) const;

  int bits_;
};

}  // namespace rotunda::kv::kivi
