#pragma once

#include "kernels/attention/decode_attention.h"
#include "kv/kv_format.h"

namespace rotunda::kv::plain {

/// Keys (after RoPE) and values as they are, rounded to nearest even: the formats fp32, bf16 and fp16. No options.
class PlainFormat : public KvFormat {
 public:
  PlainFormat(std::string name, kernels::ElementType type) : name_(std::move(name)), type_(type) {}

  std::string name() const override { return name_; }
  std::string summary() const override;
  std::vector<KvOption> options() const override { return {}; }
  void validate(const KvSpec& spec) const override;
  std::optional<std::string> unsupported_reason(const KvSpec& spec, const KvModel& model) const override;
  int64_t planned_bytes(const KvSpec& spec, const KvModel& model, int64_t kv_len) const override;
  std::unique_ptr<KvCache> make_cache(const KvSpec& spec, const KvModel& model, const ops::TensorBundle& setup) const override;

 private:
  std::string name_;
  kernels::ElementType type_;
};

}  // namespace rotunda::kv::plain
