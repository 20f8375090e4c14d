#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace rotunda::ops {

/// Which frequencies the rotary position embedding uses (Hugging Face `rope_type`).
enum class RopeType { kDefault, kLinear, kDynamic, kLlama3, kYarn };

/// The rotary embedding's settings, as a checkpoint's config.json gives them (`rope_theta`, `rope_scaling`).
struct RopeSpec {
  RopeType type = RopeType::kDefault;
  int head_dim = 0;
  double theta = 10000.0;
  double factor = 1.0;                             ///< linear, dynamic, llama3, yarn
  int64_t max_position_embeddings = 0;             ///< dynamic: the length beyond which the base grows
  int64_t original_max_position_embeddings = 0;    ///< llama3, yarn
  double low_freq_factor = 1.0;                    ///< llama3
  double high_freq_factor = 4.0;                   ///< llama3
  double beta_fast = 32.0;                         ///< yarn
  double beta_slow = 1.0;                          ///< yarn
  double attention_factor = 1.0;                   ///< yarn: cos and sin are multiplied by it (already resolved)
  bool truncate = true;                            ///< yarn: round the correction range to whole dimensions
};

/// Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split form of Hugging Face: channel i and channel
/// i + head_dim/2 form a pair that position n turns by n * inv_freq[i].
class Rope {
 public:
  Rope() = default;
  /// @throws Error{kUser} for an odd head_dim or a factor that is not positive.
  explicit Rope(const RopeSpec& spec);

  const RopeSpec& spec() const { return spec_; }
  int head_dim() const { return spec_.head_dim; }
  /// Factor on cos and sin (1 but for yarn), so a score is scaled by its square.
  double attention_factor() const { return spec_.attention_factor; }
  /// Whether the frequencies depend on the length of the sequence (`dynamic`).
  bool depends_on_length() const { return spec_.type == RopeType::kDynamic; }
  /// [head_dim / 2] radians per position, for a sequence of `seq_len` tokens in all (only `dynamic` looks at it).
  std::vector<double> inv_freq(int64_t seq_len) const;

  /// cos and sin, each [T, head_dim / 2] fp32 with the attention factor in, angles reckoned in fp64.
  /// @param positions [T] int64, on any device; the result lies beside them
  std::pair<at::Tensor, at::Tensor> cos_sin(const at::Tensor& positions, int64_t seq_len) const;

 private:
  RopeSpec spec_;
  std::vector<double> inv_freq_;
};

/// Turns every head of `x` by the given angles: fp32 arithmetic, result in the dtype of `x`.
/// @param x [T, n_heads, head_dim]   @param cos, sin [T, head_dim / 2] fp32
at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace rotunda::ops
