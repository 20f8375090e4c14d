#include "model/decoder/decoder_lm.h"

namespace rotunda::model {

namespace {

DecoderConfig read_config(const ModelFolder& folder) {
  DecoderConfig config =
      read_decoder_config(folder, {.n_kv_heads = {}, .head_dim = {}, .bos_token_ids = {1}, .eos_token_ids = {2}});
  config.qkv_bias = config.o_bias = folder.config.flag("attention_bias", false);
  config.mlp_bias = folder.config.flag("mlp_bias", false);
  return config;
}

}  // namespace

/// LLaMA 1 to 3 (arXiv:2302.13971, arXiv:2407.21783) and what shares their form.
void register_llama(ModelRegistry& registry) { registry.add(decoder_family("LlamaForCausalLM", &read_config)); }

}  // namespace rotunda::model
