#include "model/decoder/decoder_lm.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <numeric>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "io/checkpoint_index.h"
#include "model/nn/linear.h"
#include "model/nn/mlp.h"
#include "model/nn/residual_stream.h"
#include "model/nn/rms_norm.h"
#include "model/weight_loader.h"

namespace rotunda::model {

namespace {

struct DecoderLayer {
  at::Tensor attention_norm;  // [hidden_size]
  nn::LinearStack qkv;
  at::Tensor q_norm, k_norm;    // [head_dim], or undefined
  at::Tensor o_weight, o_bias;  // [hidden_size, n_heads * head_dim], [hidden_size] or undefined
  at::Tensor mlp_norm;          // [hidden_size]
  nn::SwigluMlp mlp;
};

// The files behind a model and behind its fused forms: the originals of what a format fuses, and the hash.
struct Checkpoint {
  explicit Checkpoint(const std::filesystem::path& dir) : index(io::CheckpointIndex::open(dir)) {}
  const io::CheckpointIndex index;
  std::once_flag hash_once;
  std::string hash;
};

struct DecoderWeights {
  at::Tensor embedding;  // [vocab_size, hidden_size]
  std::vector<DecoderLayer> layers;
  at::Tensor final_norm;  // [hidden_size]
  at::Tensor head;        // [vocab_size, hidden_size]
};

class DecoderLm final : public CausalLm {
 public:
  DecoderLm(DecoderConfig config, DecoderNames names, CausalLmInfo info, std::shared_ptr<Checkpoint> checkpoint,
            DecoderWeights weights)
      : config_(std::move(config)),
        names_(std::move(names)),
        info_(std::move(info)),
        checkpoint_(std::move(checkpoint)),
        weights_(std::move(weights)) {}

  const CausalLmInfo& info() const override { return info_; }

  at::Tensor forward(const at::Tensor& tokens, kv::KvCache& cache) const override {
    const c10::NoGradGuard no_grad;
    check_tokens(tokens);
    nn::ResidualStream x(at::embedding(weights_.embedding, tokens.to(info_.kv.device)));  // [T, hidden_size]
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      const DecoderLayer& w = weights_.layers[static_cast<size_t>(layer)];
      attention(layer, w, x, cache);
      w.mlp(x.norm(w.mlp_norm, config_.rms_norm_eps), x);
    }
    return x.norm(weights_.final_norm, config_.rms_norm_eps);
  }

  at::Tensor logits(const at::Tensor& hidden) const override {
    const c10::NoGradGuard no_grad;
    ROTUNDA_CHECK(hidden.dim() == 2 && hidden.size(1) == config_.hidden_size && hidden.scalar_type() == info_.kv.dtype,
                  "logits: hidden ", hidden.sizes(), " ", hidden.scalar_type(), ", expected [N, ", config_.hidden_size,
                  "] ", info_.kv.dtype);
    return at::linear(hidden, weights_.head).to(at::kFloat);  // [N, vocab_size]
  }

  std::shared_ptr<const CausalLm> with_kv_format(const kv::KvFormat& format, const kv::KvSpec& spec,
                                                 ops::TensorBundle& setup) const override;

  const std::string& weights_hash() const override {
    static const std::string kRandom = "random";
    if (!checkpoint_) return kRandom;
    std::call_once(checkpoint_->hash_once, [this] { checkpoint_->hash = checkpoint_->index.content_hash(); });
    return checkpoint_->hash;
  }

 private:
  // x + W_o attend(...)
  void attention(int layer, const DecoderLayer& w, nn::ResidualStream& x, kv::KvCache& cache) const {
    const std::vector<at::Tensor> qkv = w.qkv(x.norm(w.attention_norm, config_.rms_norm_eps));
    const int64_t n = qkv[0].size(0);
    kv::AttendInput in;
    in.q = qkv[0].view({n, config_.n_heads, config_.head_dim});
    in.k = qkv[1].view({n, config_.n_kv_heads, config_.head_dim});
    in.v = qkv[2].view({n, config_.n_kv_heads, config_.head_dim});
    in.hidden = x.value();
    if (config_.qk_norm) {
      in.q = nn::rms_norm(in.q, w.q_norm, config_.rms_norm_eps);
      in.k = nn::rms_norm(in.k, w.k_norm, config_.rms_norm_eps);
    }
    const at::Tensor y = cache.attend(layer, in).reshape({n, -1});  // [T, n_heads * head_dim]
    x.add_linear(y, w.o_weight, w.o_bias);
  }

  void check_tokens(const at::Tensor& tokens) const {
    ROTUNDA_CHECK(tokens.dim() == 1 && tokens.scalar_type() == at::kLong && tokens.size(0) > 0, "forward: tokens ",
                  tokens.sizes(), " ", tokens.scalar_type(), ", expected [T] Long with T > 0");
    if (tokens.is_cuda()) return;
    const at::Tensor contiguous = tokens.contiguous();
    const int64_t* ids = contiguous.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens.size(0); ++t)
      ROTUNDA_CHECK(ids[t] >= 0 && ids[t] < config_.vocab_size, "forward: token ", t, " is ", ids[t],
                    ", expected an id from 0 to ", config_.vocab_size - 1);
  }

  kv::ProjectionWeights original_projections(int layer) const;
  kv::ProjectionWeights own_projections(const DecoderLayer& layer) const;
  void replace_projections(const kv::ProjectionWeights& fused, DecoderLayer& layer) const;

  DecoderConfig config_;
  DecoderNames names_;
  CausalLmInfo info_;
  std::shared_ptr<Checkpoint> checkpoint_;  // null: random weights
  DecoderWeights weights_;
};

// As the checkpoint has them, in fp32 on the CPU; copies, so that a format may write to them.
kv::ProjectionWeights DecoderLm::original_projections(int layer) const {
  if (!checkpoint_) return own_projections(weights_.layers[static_cast<size_t>(layer)]);
  const auto read = [&](const std::string& name) {
    return checkpoint_->index.tensor(names_.in_layer(layer, name))
        .to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  };
  kv::ProjectionWeights p;
  p.q_weight = read(names_.q + ".weight");
  p.k_weight = read(names_.k + ".weight");
  p.v_weight = read(names_.v + ".weight");
  p.o_weight = read(names_.o + ".weight");
  if (config_.qkv_bias) {
    p.q_bias = read(names_.q + ".bias");
    p.k_bias = read(names_.k + ".bias");
    p.v_bias = read(names_.v + ".bias");
  }
  if (config_.qk_norm) {
    p.q_norm = read(names_.q_norm);
    p.k_norm = read(names_.k_norm);
  }
  p.input_gain = read(names_.attention_norm);
  return p;
}

// The same of a model without a checkpoint, which has no other weights than its own.
kv::ProjectionWeights DecoderLm::own_projections(const DecoderLayer& layer) const {
  const auto copy = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(at::kCPU).to(at::kFloat, /*non_blocking=*/false, /*copy=*/true) : tensor;
  };
  kv::ProjectionWeights p;
  p.q_weight = copy(layer.qkv.weight(0));
  p.k_weight = copy(layer.qkv.weight(1));
  p.v_weight = copy(layer.qkv.weight(2));
  p.o_weight = copy(layer.o_weight);
  p.q_norm = copy(layer.q_norm);
  p.k_norm = copy(layer.k_norm);
  p.input_gain = copy(layer.attention_norm);
  return p;
}

// Puts the fused projections in, cast to the model's dtype, on its device. One that is the same as before stays shared, so a format that
// fuses nothing costs no memory.
void DecoderLm::replace_projections(const kv::ProjectionWeights& fused, DecoderLayer& layer) const {
  // Cast before it travels, so that a GPU holds no fp32 copy.
  const auto cast = [&](const at::Tensor& tensor) { return tensor.to(info_.kv.dtype).to(info_.kv.device); };
  const std::array<const at::Tensor*, 3> weights = {&fused.q_weight, &fused.k_weight, &fused.v_weight};
  const std::array<const at::Tensor*, 3> biases = {&fused.q_bias, &fused.k_bias, &fused.v_bias};
  std::vector<at::Tensor> new_weights, new_biases;
  int n_changed = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor old_weight = layer.qkv.weight(i);
    const at::Tensor old_bias = layer.qkv.bias(i);
    ROTUNDA_ASSERT(weights[i]->sizes() == old_weight.sizes() && biases[i]->defined() == old_bias.defined(),
                   "fused shape ", weights[i]->sizes());
    at::Tensor weight = cast(*weights[i]);
    at::Tensor bias = old_bias.defined() ? cast(*biases[i]) : old_bias;
    const bool same = at::equal(weight, old_weight) && (!bias.defined() || at::equal(bias, old_bias));
    n_changed += !same;
    new_weights.push_back(same ? old_weight : weight);
    new_biases.push_back(same ? old_bias : bias);
  }
  if (n_changed > 0) {
    if (layer.qkv.stacked() || n_changed == 3) {  // all of it is new memory anyway: one GEMM
      new_weights = {at::cat(new_weights)};
      new_biases = {new_biases[0].defined() ? at::cat(new_biases) : at::Tensor()};
    }
    layer.qkv.weights = std::move(new_weights);
    layer.qkv.biases = std::move(new_biases);
  }
  ROTUNDA_ASSERT(fused.o_weight.sizes() == layer.o_weight.sizes(), "fused shape ", fused.o_weight.sizes());
  const auto replace = [&](const at::Tensor& with, at::Tensor& tensor) {
    const at::Tensor replaced = cast(with);
    if (!at::equal(replaced, tensor)) tensor = replaced;
  };
  replace(fused.o_weight, layer.o_weight);
  if (config_.qk_norm) {
    replace(fused.q_norm, layer.q_norm);
    replace(fused.k_norm, layer.k_norm);
  }
}

std::shared_ptr<const CausalLm> DecoderLm::with_kv_format(const kv::KvFormat& format, const kv::KvSpec& spec,
                                                          ops::TensorBundle& setup) const {
  const c10::NoGradGuard no_grad;
  format.validate(spec);
  const std::optional<std::string> reason = format.unsupported_reason(spec, info_.kv);
  ROTUNDA_CHECK(!reason, checkpoint_ ? checkpoint_->index.model_dir().string() : "random weights", ": ", *reason);
  DecoderWeights weights = weights_;
  for (int layer = 0; layer < config_.n_layers; ++layer) {
    if (!format.fuses_layer(spec, info_.kv, layer)) continue;
    kv::ProjectionWeights projections = original_projections(layer);
    format.fuse(spec, info_.kv, layer, projections, setup);
    replace_projections(projections, weights.layers[static_cast<size_t>(layer)]);
  }
  return std::make_shared<DecoderLm>(config_, names_, info_, checkpoint_, std::move(weights));
}

// Tensors that nothing reads: one line in the log, for they may mean that the model is another than config.json says.
void warn_of_extra_tensors(const io::CheckpointIndex& index, const std::vector<TensorShape>& implied,
                           const DecoderConfig& config, const DecoderNames& names) {
  std::set<std::string> known;
  for (const TensorShape& tensor : implied) known.insert(tensor.name);
  if (config.tied_embeddings) known.insert(names.head);  // many tied checkpoints store the embedding twice
  std::string first;
  int64_t n_extra = 0;
  for (const std::string& name : index.names()) {
    if (known.count(name) != 0 || name.ends_with("rotary_emb.inv_freq")) continue;
    if (n_extra++ == 0) first = name;
  }
  if (n_extra > 0)
    ROTUNDA_LOG_WARN("{}: {} tensors have no place in {}, {} for one; ignored", index.model_dir().string(), n_extra,
                     config.architecture, first);
}

// The loader's calls by the names and shapes of one model.
class DecoderLoader {
 public:
  DecoderLoader(const DecoderNames& names, const std::vector<TensorShape>& implied, WeightLoader& loader)
      : names_(names), loader_(loader) {
    for (const TensorShape& tensor : implied) sizes_.emplace(tensor.name, tensor.sizes);
  }

  at::Tensor take(const std::string& name) { return loader_.take(name, sizes_.at(name)); }
  /// Undefined where the config has no such tensor.
  at::Tensor take_if_implied(const std::string& name) { return sizes_.count(name) != 0 ? take(name) : at::Tensor(); }

  nn::LinearStack take_stack(int layer, const std::vector<std::string>& projections) {
    std::vector<std::string> weights, biases;
    nn::LinearStack stack;
    bool mappable = true;
    for (const std::string& projection : projections) {
      weights.push_back(names_.in_layer(layer, projection + ".weight"));
      biases.push_back(names_.in_layer(layer, projection + ".bias"));
      stack.out_features.push_back(sizes_.at(weights.back())[0]);
      mappable = mappable && loader_.is_mappable(weights.back());
    }
    const bool has_bias = sizes_.count(biases[0]) != 0;
    if (mappable) {
      for (const std::string& name : weights) stack.weights.push_back(take(name));
      for (const std::string& name : biases) stack.biases.push_back(take_if_implied(name));
    } else {
      stack.weights = {take_stacked(weights)};
      stack.biases = {has_bias ? take_stacked(biases) : at::Tensor()};
    }
    return stack;
  }

 private:
  at::Tensor take_stacked(const std::vector<std::string>& names) {
    std::vector<std::vector<int64_t>> sizes;
    for (const std::string& name : names) sizes.push_back(sizes_.at(name));
    return loader_.take_stacked(names, sizes);
  }

  const DecoderNames& names_;
  WeightLoader& loader_;
  std::map<std::string, std::vector<int64_t>> sizes_;
};

}  // namespace

CausalLmInfo decoder_info(const DecoderConfig& config, const DecoderNames& names, const CausalLmOptions& options) {
  CausalLmInfo info;
  info.architecture = config.architecture;
  info.kv = config.kv_model(options.dtype);
  info.kv.device = options.device;
  info.kv.device_budget_bytes = options.device_budget_bytes;
  info.vocab_size = config.vocab_size;
  info.intermediate_size = config.intermediate_size;
  info.tied_embeddings = config.tied_embeddings;
  info.max_position_embeddings = config.max_position_embeddings;
  info.bos_token_ids = config.bos_token_ids;
  info.eos_token_ids = config.eos_token_ids;
  for (const TensorShape& tensor : implied_tensors(config, names)) {
    int64_t numel = 1;
    for (const int64_t size : tensor.sizes) numel *= size;
    info.n_parameters += numel;
  }
  return info;
}

std::shared_ptr<const CausalLm> load_decoder_lm(const ModelFolder& folder, const DecoderConfig& config,
                                                const DecoderNames& names, const CausalLmOptions& options) {
  const c10::NoGradGuard no_grad;
  CausalLmInfo info = decoder_info(config, names, options);
  const auto checkpoint = std::make_shared<Checkpoint>(folder.dir);
  const std::vector<TensorShape> implied = implied_tensors(config, names);
  warn_of_extra_tensors(checkpoint->index, implied, config, names);

  WeightLoader weight_loader(checkpoint->index, options.dtype, options.device);
  DecoderLoader loader(names, implied, weight_loader);
  DecoderWeights weights;
  weights.embedding = loader.take(names.embedding);
  for (int i = 0; i < config.n_layers; ++i) {
    DecoderLayer layer;
    layer.attention_norm = loader.take(names.in_layer(i, names.attention_norm));
    layer.qkv = loader.take_stack(i, {names.q, names.k, names.v});
    layer.q_norm = loader.take_if_implied(names.in_layer(i, names.q_norm));
    layer.k_norm = loader.take_if_implied(names.in_layer(i, names.k_norm));
    layer.o_weight = loader.take(names.in_layer(i, names.o + ".weight"));
    layer.o_bias = loader.take_if_implied(names.in_layer(i, names.o + ".bias"));
    layer.mlp_norm = loader.take(names.in_layer(i, names.mlp_norm));
    layer.mlp.gate_up = loader.take_stack(i, {names.gate, names.up});
    layer.mlp.down_weight = loader.take(names.in_layer(i, names.down + ".weight"));
    layer.mlp.down_bias = loader.take_if_implied(names.in_layer(i, names.down + ".bias"));
    weights.layers.push_back(std::move(layer));
  }
  weights.final_norm = loader.take(names.final_norm);
  weights.head = config.tied_embeddings ? weights.embedding : loader.take(names.head);
  weight_loader.run(options.progress);
  return std::make_shared<DecoderLm>(config, names, std::move(info), checkpoint, std::move(weights));
}

std::shared_ptr<const CausalLm> make_random_decoder_lm(const DecoderConfig& config, const CausalLmOptions& options) {
  const c10::NoGradGuard no_grad;
  const at::TensorOptions place = at::TensorOptions().dtype(options.dtype).device(options.device);
  const int64_t hidden = config.hidden_size;
  const auto gain = [&](int64_t n) { return at::ones({n}, place); };
  const auto weight = [&](int64_t out, int64_t in) { return at::randn({out, in}, place).mul_(1.0 / std::sqrt(static_cast<double>(in))); };
  const auto stack = [&](std::vector<int64_t> out_features) {
    nn::LinearStack made;
    made.weights = {weight(std::accumulate(out_features.begin(), out_features.end(), int64_t{0}), hidden)};
    made.biases = {at::Tensor()};
    made.out_features = std::move(out_features);
    return made;
  };
  ROTUNDA_CHECK(!config.qkv_bias && !config.o_bias && !config.mlp_bias, "random weights: expected a config without biases");
  const int64_t q_channels = int64_t{config.n_heads} * config.head_dim;
  const int64_t kv_channels = int64_t{config.n_kv_heads} * config.head_dim;
  DecoderWeights weights;
  weights.embedding = at::randn({config.vocab_size, hidden}, place);
  for (int i = 0; i < config.n_layers; ++i) {
    DecoderLayer layer;
    layer.attention_norm = gain(hidden);
    layer.qkv = stack({q_channels, kv_channels, kv_channels});
    if (config.qk_norm) layer.q_norm = layer.k_norm = gain(config.head_dim);
    layer.o_weight = weight(hidden, q_channels);
    layer.mlp_norm = gain(hidden);
    layer.mlp.gate_up = stack({config.intermediate_size, config.intermediate_size});
    layer.mlp.down_weight = weight(hidden, config.intermediate_size);
    weights.layers.push_back(std::move(layer));
  }
  weights.final_norm = gain(hidden);
  weights.head = config.tied_embeddings ? weights.embedding : weight(config.vocab_size, hidden);
  const DecoderNames names;
  return std::make_shared<DecoderLm>(config, names, decoder_info(config, names, options), nullptr, std::move(weights));
}

ModelFamily decoder_family(const std::string& architecture, DecoderConfig (*read_config)(const ModelFolder&),
                           const DecoderNames& names) {
  return {
      architecture,
      [=](const ModelFolder& folder, const CausalLmOptions& options) { return decoder_info(read_config(folder), names, options); },
      [=](const ModelFolder& folder, const CausalLmOptions& options) {
        return load_decoder_lm(folder, read_config(folder), names, options);
      }};
}

}  // namespace rotunda::model
