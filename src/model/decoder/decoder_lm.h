#pragma once

#include <memory>
#include <string>

#include "model/decoder/decoder_config.h"
#include "model/decoder/decoder_names.h"
#include "model/model_registry.h"

namespace rotunda::model {

/// What the config implies. `n_parameters` counts tied weights once.
CausalLmInfo decoder_info(const DecoderConfig& config, const DecoderNames& names, const CausalLmOptions& options);

/// Loads the weights of a decoder. See load_causal_lm.
std::shared_ptr<const CausalLm> load_decoder_lm(const ModelFolder& folder, const DecoderConfig& config,
                                                const DecoderNames& names, const CausalLmOptions& options);

/// A decoder with random weights, made on its device, whose activations stay of ordinary size: for benches and tests, where what matters is
/// the shape. Weights N(0, 1 / in_features), gains 1, no biases; drawn from LibTorch's generator (at::manual_seed).
std::shared_ptr<const CausalLm> make_random_decoder_lm(const DecoderConfig& config, const CausalLmOptions& options);

/// A family that differs from the other decoders in its config and its names alone.
ModelFamily decoder_family(const std::string& architecture, DecoderConfig (*read_config)(const ModelFolder&),
                           const DecoderNames& names = {});

}  // namespace rotunda::model
