#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/causal_lm.h"
#include "model/config_file.h"
#include "ops/rope.h"

namespace rotunda::model {

/// The settings of a decoder-only transformer with RMSNorm, RoPE, grouped-query attention and SwiGLU. Read once.
struct DecoderConfig {
  std::string architecture;
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  double rms_norm_eps = 0.0;
  int64_t max_position_embeddings = 0;
  int64_t sliding_window = 0;  ///< 0: none
  ops::RopeSpec rope;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  ///< RMSNorm on every head of queries and keys, before RoPE
  bool tied_embeddings = false;
  std::vector<int64_t> bos_token_ids;
  std::vector<int64_t> eos_token_ids;

  /// What kv/ has to know. `dtype`: of the arithmetic.
  kv::KvModel kv_model(at::ScalarType dtype) const;
};

/// What a family's Hugging Face config class takes for keys that config.json leaves out.
struct DecoderDefaults {
  std::optional<int> n_kv_heads;  ///< nothing: n_heads
  std::optional<int> head_dim;    ///< nothing: hidden_size / n_heads
  std::vector<int64_t> bos_token_ids;
  std::vector<int64_t> eos_token_ids;
};

/// Reads what all families share; biases, norms and windows are the family's (they stay off).
/// @throws Error{kUser} naming file and key for a value that is missing, of the wrong type, out of range, or does not fit the others.
DecoderConfig read_decoder_config(const ModelFolder& folder, const DecoderDefaults& defaults);

/// Reads `use_sliding_window`, `sliding_window`, `max_window_layers` and `layer_types` as the Qwen families mean them.
/// @return the window of every layer, 0 for none. @throws Error{kUser} where only some layers have a window.
int64_t read_switched_sliding_window(const ConfigFile& config, int n_layers);

/// The largest window, context or id that a config may name.
constexpr int64_t kMaxContext = int64_t{1} << 40;

}  // namespace rotunda::model
