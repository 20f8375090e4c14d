#include "model/decoder/decoder_names.h"

namespace rotunda::model {

std::vector<TensorShape> implied_tensors(const DecoderConfig& config, const DecoderNames& names) {
  const int64_t hidden = config.hidden_size;
  const int64_t q_rows = int64_t{config.n_heads} * config.head_dim;
  const int64_t kv_rows = int64_t{config.n_kv_heads} * config.head_dim;
  std::vector<TensorShape> tensors;
  tensors.push_back({names.embedding, {config.vocab_size, hidden}});
  for (int layer = 0; layer < config.n_layers; ++layer) {
    const auto add = [&](const std::string& name, std::vector<int64_t> sizes) {
      tensors.push_back({names.in_layer(layer, name), std::move(sizes)});
    };
    const auto add_linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
      add(name + ".weight", {out, in});
      if (bias) add(name + ".bias", {out});
    };
    add(names.attention_norm, {hidden});
    add_linear(names.q, q_rows, hidden, config.qkv_bias);
    add_linear(names.k, kv_rows, hidden, config.qkv_bias);
    add_linear(names.v, kv_rows, hidden, config.qkv_bias);
    add_linear(names.o, hidden, q_rows, config.o_bias);
    if (config.qk_norm) {
      add(names.q_norm, {config.head_dim});
      add(names.k_norm, {config.head_dim});
    }
    add(names.mlp_norm, {hidden});
    add_linear(names.gate, config.intermediate_size, hidden, config.mlp_bias);
    add_linear(names.up, config.intermediate_size, hidden, config.mlp_bias);
    add_linear(names.down, hidden, config.intermediate_size, config.mlp_bias);
  }
  tensors.push_back({names.final_norm, {hidden}});
  if (!config.tied_embeddings) tensors.push_back({names.head, {config.vocab_size, hidden}});
  return tensors;
}

}  // namespace rotunda::model
