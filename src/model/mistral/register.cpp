#include "model/decoder/decoder_lm.h"

namespace rotunda::model {

namespace {

DecoderConfig read_config(const ModelFolder& folder) {
  DecoderConfig config =
      read_decoder_config(folder, {.n_kv_heads = 8, .head_dim = {}, .bos_token_ids = {1}, .eos_token_ids = {2}});
  // An absent key stands for the window of the first Mistral 7B; null, as later ones have it, for none.
  if (!folder.config.holds_null("sliding_window"))
    config.sliding_window = folder.config.integer("sliding_window", 1, kMaxContext, 4096);
  return config;
}

}  // namespace

/// Mistral 7B (arXiv:2310.06825): LLaMA with a sliding window.
void register_mistral(ModelRegistry& registry) { registry.add(decoder_family("MistralForCausalLM", &read_config)); }

}  // namespace rotunda::model
