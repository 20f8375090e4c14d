#include "model/decoder/decoder_config.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "model/decoder/rope_config.h"

namespace rotunda::model {

namespace {

// Far above any model, and low enough that no product of shapes below overflows int64.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxHidden = int64_t{1} << 18;
constexpr int64_t kMaxIntermediate = int64_t{1} << 20;
constexpr int64_t kMaxLayers = int64_t{1} << 12;
constexpr int64_t kMaxHeads = int64_t{1} << 12;
constexpr int64_t kMaxHeadDim = int64_t{1} << 12;

int read_int(const ConfigFile& config, const std::string& key, int64_t max, std::optional<int64_t> fallback = {}) {
  return static_cast<int>(config.integer(key, 1, max, fallback));
}

// An id that stands in config.json and, where it says more, in generation_config.json: all of them, each once.
std::vector<int64_t> read_token_ids(const ModelFolder& folder, const std::string& key,
                                    const std::vector<int64_t>& fallback, int64_t max) {
  std::vector<int64_t> ids = folder.config.ids(key, max);
  if (!folder.config.has(key) && !folder.config.holds_null(key)) ids = fallback;
  if (folder.generation_config)
    for (const int64_t id : folder.generation_config->ids(key, max)) ids.push_back(id);
  std::vector<int64_t> unique;
  for (const int64_t id : ids)
    if (std::find(unique.begin(), unique.end(), id) == unique.end()) unique.push_back(id);
  return unique;
}

}  // namespace

kv::KvModel DecoderConfig::kv_model(at::ScalarType dtype) const {
  kv::KvModel model;
  model.n_layers = n_layers;
  model.n_heads = n_heads;
  model.n_kv_heads = n_kv_heads;
  model.head_dim = head_dim;
  model.hidden_size = hidden_size;
  model.softmax_scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  model.sliding_window = sliding_window;
  model.key_norm = qk_norm;
  model.dtype = dtype;
  model.rope = ops::Rope(rope);
  return model;
}

DecoderConfig read_decoder_config(const ModelFolder& folder, const DecoderDefaults& defaults) {
  const ConfigFile& file = folder.config;
  DecoderConfig config;
  config.architecture = file.texts("architectures").at(0);
  config.vocab_size = read_int(file, "vocab_size", kMaxVocab);
  config.hidden_size = read_int(file, "hidden_size", kMaxHidden);
  config.intermediate_size = read_int(file, "intermediate_size", kMaxIntermediate);
  config.n_layers = read_int(file, "num_hidden_layers", kMaxLayers);
  config.n_heads = read_int(file, "num_attention_heads", kMaxHeads);

  const bool kv_heads_null = file.holds_null("num_key_value_heads");
  config.n_kv_heads = read_int(file, "num_key_value_heads", kMaxHeads,
                               kv_heads_null ? config.n_heads : defaults.n_kv_heads.value_or(config.n_heads));
  ROTUNDA_CHECK(config.n_heads % config.n_kv_heads == 0, file.where("num_key_value_heads"), " is ", config.n_kv_heads,
                ", expected a divisor of num_attention_heads, ", config.n_heads);

  if (file.has("head_dim") || (defaults.head_dim && !file.holds_null("head_dim"))) {
    config.head_dim = read_int(file, "head_dim", kMaxHeadDim, defaults.head_dim);
  } else {
    ROTUNDA_CHECK(config.hidden_size % config.n_heads == 0, file.where("num_attention_heads"), " is ", config.n_heads,
                  ", expected a divisor of hidden_size, ", config.hidden_size);
    config.head_dim = config.hidden_size / config.n_heads;
  }
  ROTUNDA_CHECK(config.head_dim % 2 == 0 && config.head_dim > 2, file.where("head_dim"), " is ", config.head_dim,
                ", expected an even number above 2");

  config.rms_norm_eps = file.positive("rms_norm_eps", 1e-6);
  config.max_position_embeddings = file.integer("max_position_embeddings", 1, kMaxContext);
  config.tied_embeddings = file.flag("tie_word_embeddings", false);
  config.rope = read_rope_spec(file, config.head_dim, config.max_position_embeddings);

  const std::string act = file.text("hidden_act", "silu");
  ROTUNDA_CHECK(act == "silu", file.where("hidden_act"), " is \"", act.substr(0, 60), "\", expected \"silu\"");
  ROTUNDA_CHECK(!file.has("quantization_config"), file.where("quantization_config"),
                " is there, expected a checkpoint whose weights are not quantized");

  config.bos_token_ids = read_token_ids(folder, "bos_token_id", defaults.bos_token_ids, config.vocab_size - 1);
  ROTUNDA_CHECK(config.bos_token_ids.size() <= 1, file.where("bos_token_id"), " (with generation_config.json) names ",
                config.bos_token_ids.size(), " ids, expected at most one");
  config.eos_token_ids = read_token_ids(folder, "eos_token_id", defaults.eos_token_ids, config.vocab_size - 1);
  return config;
}

int64_t read_switched_sliding_window(const ConfigFile& config, int n_layers) {
  if (!config.flag("use_sliding_window", false)) return 0;
  if (config.holds_null("sliding_window")) return 0;
  const int64_t window = config.integer("sliding_window", 1, kMaxContext, 4096);
  int n_windowed = 0;
  std::string key = "max_window_layers";
  if (config.has("layer_types")) {
    key = "layer_types";
    const std::vector<std::string> types = config.texts(key);
    ROTUNDA_CHECK(static_cast<int64_t>(types.size()) == n_layers, config.where(key), " has ", types.size(),
                  " entries, expected ", n_layers);
    for (const std::string& type : types) {
      ROTUNDA_CHECK(type == "full_attention" || type == "sliding_attention", config.where(key), " names \"",
                    type.substr(0, 60), "\", expected full_attention or sliding_attention");
      n_windowed += type == "sliding_attention";
    }
  } else {
    // The name misleads: the first max_window_layers layers are the ones without a window.
    n_windowed = n_layers - static_cast<int>(std::min<int64_t>(config.integer(key, 0, kMaxContext, 28), n_layers));
  }
  ROTUNDA_CHECK(n_windowed == 0 || n_windowed == n_layers, config.where(key), " gives ", n_windowed, " of ", n_layers,
                " layers a sliding window, expected all or none");
  return n_windowed == 0 ? 0 : window;
}

}  // namespace rotunda::model
