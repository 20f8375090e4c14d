#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "kv/kv_registry.h"

// Where caches under test keep what they have; kv_conformance_gpu_test says cuda.
#ifndef ROTUNDA_TEST_DEVICE
#define ROTUNDA_TEST_DEVICE at::kCPU
#endif

namespace rotunda::kv::testing {

/// Random queries, keys, values and layer inputs of one sequence, fp32, before RoPE and before any fusing.
struct Text {
  std::vector<at::Tensor> q, k, v, hidden;  // [layer] of [T, heads, d], [T, hidden_size]
};

inline KvModel small_model(int n_heads = 4, int n_kv_heads = 2, int head_dim = 64) {
  KvModel model;
  model.n_layers = 2;
  model.n_heads = n_heads;
  model.n_kv_heads = n_kv_heads;
  model.head_dim = head_dim;
  model.hidden_size = 48;
  model.softmax_scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  ops::RopeSpec rope;
  rope.head_dim = head_dim;
  model.rope = ops::Rope(rope);
  model.device = ROTUNDA_TEST_DEVICE;
  return model;
}

/// Keys have stable channel means of different size, as real ones do; a few tokens have massive layer inputs.
inline Text random_text(const KvModel& model, int64_t n_tokens, uint64_t seed) {
  at::manual_seed(seed);
  Text text;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const at::Tensor mean = 2 * at::randn({model.n_kv_heads, model.head_dim});
    text.q.push_back(at::randn({n_tokens, model.n_heads, model.head_dim}));
    text.k.push_back(at::randn({n_tokens, model.n_kv_heads, model.head_dim}) + mean);
    text.v.push_back(at::randn({n_tokens, model.n_kv_heads, model.head_dim}));
    at::Tensor hidden = at::randn({n_tokens, model.hidden_size});
    hidden[0][3] = 500.0;
    if (n_tokens > 40) hidden[37][11] = -400.0;
    text.hidden.push_back(hidden);
  }
  return text;
}

/// What a text's queries, keys and values of one layer are projected from: the three side by side, [T, input_channels].
inline at::Tensor projection_input(const Text& text, int layer) {
  return at::cat({text.q[layer].flatten(1), text.k[layer].flatten(1), text.v[layer].flatten(1)}, 1);
}

/// Projections that pick the text's queries, keys and values out of projection_input().
inline ProjectionWeights identity_projections(const KvModel& model) {
  const int64_t q_channels = int64_t{model.n_heads} * model.head_dim;
  const at::Tensor identity = at::eye(q_channels + 2 * model.kv_channels());
  ProjectionWeights weights;
  weights.q_weight = identity.slice(0, 0, q_channels).clone();
  weights.k_weight = identity.slice(0, q_channels, q_channels + model.kv_channels()).clone();
  weights.v_weight = identity.slice(0, q_channels + model.kv_channels()).clone();
  weights.o_weight = at::eye(q_channels);
  if (model.key_norm) weights.q_norm = weights.k_norm = at::ones({model.head_dim});
  weights.input_gain = at::ones({identity.size(0)});
  return weights;
}

/// x W^T + b as heads [T, n, d], times the gain of a norm that is itself left out.
inline at::Tensor project(const KvModel& model, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {},
                          const at::Tensor& gain = {}) {
  const at::Tensor y = at::linear(x, weight, bias).view({x.size(0), -1, model.head_dim});
  return gain.defined() ? y * gain : y;
}

/// A cache as a model sees it: projections, fused by the format, stand before and after it.
class FusedCache {
 public:
  using Projections = std::function<ProjectionWeights(int layer)>;

  FusedCache(const std::string& spec_text, const KvModel& model) : FusedCache(parse_kv_spec(spec_text), model) {}

  /// @param original the projections before fusing; none: identities
  /// @param calibration to use; null: none, or one on random text where the format cannot do without
  FusedCache(const KvSpec& spec, const KvModel& model, const Projections& original = {}, const ops::TensorBundle* calibration = nullptr)
      : model_(model) {
    const KvFormat& format = kv_registry().get(spec);
    if (calibration != nullptr) {
      calibration_ = *calibration;
    } else if (spec.parts.empty()) {
      calibration_ = calibrate(spec, model);
    } else {
      for (const KvSpecPart& part : spec.parts)
        calibration_.add(kv_registry().get(part.spec).calibration_name() + "/", calibrate(part.spec, model));
    }
    ops::TensorBundle setup = calibration_;
    const KvSpec used = format.resolved(spec, model, calibration_.tensors.empty() ? nullptr : &calibration_);
    for (int layer = 0; layer < model.n_layers; ++layer) {
      ProjectionWeights weights = original ? original(layer) : identity_projections(model);
      if (format.fuses_layer(used, model, layer)) format.fuse(used, model, layer, weights, setup);
      weights_.push_back(std::move(weights));
    }
    cache_ = format.make_cache(used, model, setup);
  }

  KvCache& cache() { return *cache_; }
  const ops::TensorBundle& calibration() const { return calibration_; }

  bool ask_keys = false;               ///< step() asks for the keys to code, before each layer's attention
  std::vector<at::Tensor> asked_keys;  ///< what it got

  struct Part {
    SeqId seq;
    const Text* text;
    int64_t begin, end;  // tokens of the text
    bool is_prompt = true;
  };

  /// One step over all layers; the last layer's output [T, n_heads, d]. Layers are independent of each other here.
  /// @param abort_after abort instead of finishing, after this many layers (-1: finish)
  at::Tensor step(const std::vector<Part>& parts, StepKind kind = StepKind::kGenerate, int abort_after = -1) {
    std::vector<SeqChunk> chunks;
    for (const Part& part : parts) chunks.push_back({part.seq, part.end - part.begin, part.is_prompt, 0});
    cache_->begin_step(chunks, kind);
    std::vector<at::Tensor> outs;
    for (int layer = 0; layer < model_.n_layers; ++layer) {
      if (layer == abort_after) break;
      std::vector<at::Tensor> inputs, hidden;
      for (const Part& part : parts) {
        inputs.push_back(projection_input(*part.text, layer).slice(0, part.begin, part.end));
        hidden.push_back(part.text->hidden[layer].slice(0, part.begin, part.end));
      }
      const at::Tensor x = at::cat(inputs);
      const ProjectionWeights& w = weights_[layer];
      try {
        const auto input = [&](const at::Tensor& made) { return made.to(model_.device, model_.dtype); };
        const AttendInput in{input(project(model_, x, w.q_weight, w.q_bias, w.q_norm)), input(project(model_, x, w.k_weight, w.k_bias, w.k_norm)),
                             input(project(model_, x, w.v_weight, w.v_bias)), input(at::cat(hidden))};
        if (ask_keys) {
          const at::Tensor keys = cache_->keys_to_code(layer, in);
          asked_keys.push_back(keys.defined() ? keys.cpu() : keys);
        }
        const at::Tensor out = cache_->attend(layer, in);
        outs.push_back(project(model_, out.to(at::kCPU, at::kFloat).flatten(1), w.o_weight));
      } catch (...) {
        cache_->abort_step();
        throw;
      }
    }
    if (abort_after >= 0) {
      cache_->abort_step();
      return {};
    }
    cache_->end_step();
    return at::stack(outs);  // [layer, T, n_heads, d]
  }

 private:
  // On random text where the format cannot do without; else nothing.
  static ops::TensorBundle calibrate(const KvSpec& spec, const KvModel& model) {
    const KvFormat& format = kv_registry().get(spec);
    if (format.calibration_use(spec) != CalibrationUse::kRequired) return {};
    const auto calibrator = format.make_calibrator(model);
    const Text text = random_text(model, 64, 4242);
    for (int layer = 0; layer < model.n_layers; ++layer)
      calibrator->observe(layer, {text.q[layer].to(model.device), text.k[layer].to(model.device), text.v[layer].to(model.device),
                                  text.hidden[layer].to(model.device)});
    return calibrator->finish();
  }

  KvModel model_;
  ops::TensorBundle calibration_;
  std::unique_ptr<KvCache> cache_;
  std::vector<ProjectionWeights> weights_;  // [layer], fused
};

/// Causal attention in fp64 over unquantized keys and values; [layer, T, n_heads, d].
inline at::Tensor exact_attention(const KvModel& model, const Text& text, int64_t n_tokens) {
  std::vector<at::Tensor> outs;
  const auto [cos, sin] = model.rope.cos_sin(at::arange(n_tokens, at::kLong), n_tokens);
  for (int layer = 0; layer < model.n_layers; ++layer) {
    const auto turned = [&](const at::Tensor& x) {
      return ops::apply_rope(x.slice(0, 0, n_tokens), cos, sin).to(at::kDouble).transpose(0, 1);
    };
    const int64_t rep = model.n_heads / model.n_kv_heads;
    const at::Tensor q = turned(text.q[layer]);
    const at::Tensor k = turned(text.k[layer]).repeat_interleave(rep, 0);
    const at::Tensor v = text.v[layer].slice(0, 0, n_tokens).to(at::kDouble).transpose(0, 1).repeat_interleave(rep, 0);
    at::Tensor scores = at::matmul(q, k.transpose(1, 2)) * model.softmax_scale;
    const at::Tensor place = at::arange(n_tokens, at::kLong);
    const at::Tensor distance = place.unsqueeze(1) - place.unsqueeze(0);
    at::Tensor hidden = distance.lt(0);
    if (model.sliding_window > 0) hidden = hidden.logical_or(distance.ge(model.sliding_window));
    scores.masked_fill_(hidden, -std::numeric_limits<double>::infinity());
    outs.push_back(at::matmul(scores.softmax(-1), v).transpose(0, 1));
  }
  return at::stack(outs);
}

/// ||a - b||^2 / ||b||^2 in fp64.
inline double nmse(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor difference = a.to(at::kDouble) - b.to(at::kDouble);
  return (difference.square().sum() / b.to(at::kDouble).square().sum()).item<double>();
}

}  // namespace rotunda::kv::testing
