#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/decoder/decoder_config.h"

namespace rotunda::model {

/// How a family's checkpoint names its tensors. Those of a layer stand behind "<layers>.<index>.".
struct DecoderNames {
  std::string embedding = "model.embed_tokens.weight";
  std::string final_norm = "model.norm.weight";
  std::string head = "lm_head.weight";
  std::string layers = "model.layers";
  std::string attention_norm = "input_layernorm.weight";
  std::string q = "self_attn.q_proj";  ///< projections: without ".weight" or ".bias"
  std::string k = "self_attn.k_proj";
  std::string v = "self_attn.v_proj";
  std::string o = "self_attn.o_proj";
  std::string q_norm = "self_attn.q_norm.weight";
  std::string k_norm = "self_attn.k_norm.weight";
  std::string mlp_norm = "post_attention_layernorm.weight";
  std::string gate = "mlp.gate_proj";
  std::string up = "mlp.up_proj";
  std::string down = "mlp.down_proj";

  /// The full name of a layer's tensor: in_layer(3, q + ".bias").
  std::string in_layer(int layer, const std::string& name) const {
    return layers + "." + std::to_string(layer) + "." + name;
  }
};

/// One tensor that a checkpoint must hold.
struct TensorShape {
  std::string name;
  std::vector<int64_t> sizes;
};

/// Every tensor that the config implies, tied weights once.
std::vector<TensorShape> implied_tensors(const DecoderConfig& config, const DecoderNames& names);

}  // namespace rotunda::model
