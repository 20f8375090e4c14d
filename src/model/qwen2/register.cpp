#include "model/decoder/decoder_lm.h"

namespace rotunda::model {

namespace {

DecoderConfig read_config(const ModelFolder& folder) {
  DecoderConfig config =
      read_decoder_config(folder, {.n_kv_heads = 32, .head_dim = {}, .bos_token_ids = {}, .eos_token_ids = {}});
  config.qkv_bias = true;
  config.sliding_window = read_switched_sliding_window(folder.config, config.n_layers);
  return config;
}

}  // namespace

/// Qwen2 and Qwen2.5 (arXiv:2407.10671): LLaMA with biases on queries, keys and values.
void register_qwen2(ModelRegistry& registry) { registry.add(decoder_family("Qwen2ForCausalLM", &read_config)); }

}  // namespace rotunda::model
