#include "model/decoder/decoder_lm.h"

namespace rotunda::model {

namespace {

DecoderConfig read_config(const ModelFolder& folder) {
  DecoderConfig config =
      read_decoder_config(folder, {.n_kv_heads = 32, .head_dim = 128, .bos_token_ids = {}, .eos_token_ids = {}});
  config.qk_norm = true;
  config.qkv_bias = config.o_bias = folder.config.flag("attention_bias", false);
  config.sliding_window = read_switched_sliding_window(folder.config, config.n_layers);
  return config;
}

}  // namespace

/// Qwen3 (arXiv:2505.09388): LLaMA with a norm on every head of queries and keys.
void register_qwen3(ModelRegistry& registry) { registry.add(decoder_family("Qwen3ForCausalLM", &read_config)); }

}  // namespace rotunda::model
