#include "engine/layer_probe.h"

#include <ATen/ATen.h>

#include <cmath>
#include <memory>

#include "engine/cache_decorator.h"
#include "engine/step.h"
#include "ops/tile_attention.h"

namespace rotunda::engine {

namespace {

std::vector<kv::SeqChunk> whole(kv::SeqId seq, int64_t n_tokens) {
  return {{.seq = seq, .n_tokens = n_tokens, .is_prompt = true, .rope_len = 0}};
}

/// Queries and keys of one step from position 0 on, turned.
struct Turned {
  at::Tensor q, k;  // [T, heads, head_dim] fp32
};

// [T, T] int64: how old the column's token is when the row's sees it.
at::Tensor age_of_tokens(int64_t n_tokens, at::Device device) {
  const at::Tensor place = at::arange(n_tokens, at::TensorOptions().dtype(at::kLong).device(device));
  return place.unsqueeze(1) - place;
}

Turned turn(const kv::KvModel& model, const kv::AttendInput& in) {
  const int64_t n_tokens = in.q.size(0);
  const auto [cos, sin] = model.rope.cos_sin(at::arange(n_tokens, in.q.options().dtype(at::kLong)), n_tokens);
  return {ops::apply_rope(in.q.to(at::kFloat), cos, sin), ops::apply_rope(in.k.to(at::kFloat), cos, sin)};
}

/// Runs the model on exact attention and feeds every layer's input to a cache beside it as well, whose tokens see only what it stores.
/// Holds one sequence.
class ComparingCache final : public CacheDecorator {
 public:
  /// @param exact, stored  two caches of one binding   @param fused  whether its format fuses projections
  ComparingCache(kv::KvCache& exact, kv::KvCache& stored, bool fused)
      : CacheDecorator(exact), stored_(stored), stored_seq_(stored.create()), fused_(fused) {
    error_energy_.resize(static_cast<size_t>(model().n_layers));
    energy_.resize(error_energy_.size());
  }

  void begin_step(const std::vector<kv::SeqChunk>& chunks, kv::StepKind kind) override {
    inner_.begin_step(chunks, kind);
    try {
      stored_.begin_step(whole(stored_seq_, chunks.front().n_tokens), kv::StepKind::kQuantizeAll);
    } catch (...) {
      inner_.abort_step();
      throw;
    }
  }
  at::Tensor attend(int layer, const kv::AttendInput& in) override {
    const at::Tensor own = inner_.attend(layer, in);
    const at::Tensor exact = fused_ ? own.to(at::kDouble) : exact_attention(in);
    const at::Tensor error = stored_.attend(layer, in).to(at::kDouble) - exact;
    error_energy_[static_cast<size_t>(layer)] += error.square().sum().item<double>();
    energy_[static_cast<size_t>(layer)] += exact.square().sum().item<double>();
    return fused_ ? own : exact.to(own.scalar_type());
  }
  void end_step() override {
    inner_.check_step();
    stored_.check_step();
    inner_.end_step();
    stored_.end_step();
  }
  void abort_step() override {
    inner_.abort_step();
    stored_.abort_step();
  }

  std::vector<double> errors() const {
    std::vector<double> errors;
    for (size_t i = 0; i < energy_.size(); ++i)
      errors.push_back(energy_[i] > 0.0 ? std::sqrt(error_energy_[i] / energy_[i]) : 0.0);
    return errors;
  }

 private:
  at::Tensor exact_attention(const kv::AttendInput& in) const {
    const Turned turned = turn(model(), in);
    const int64_t window = model().sliding_window;
    if (turned.q.is_cuda()) {  // chunk_attention() is LibTorch's operator for the CPU
      const auto batched = [](const at::Tensor& x) { return x.to(at::kFloat).transpose(0, 1).unsqueeze(0); };  // [1, H, T, d]
      const at::Tensor seen = age_of_tokens(in.q.size(0), in.q.device());
      const at::Tensor mask = window > 0 ? seen.ge(0).logical_and_(seen.lt(window)) : seen.ge(0);
      return at::scaled_dot_product_attention(batched(turned.q), batched(turned.k), batched(in.v), mask, /*dropout_p=*/0.0,
                                              /*is_causal=*/false, model().softmax_scale, /*enable_gqa=*/true)
          .squeeze(0)
          .transpose(0, 1)
          .to(at::kDouble);  // [T, n_heads, head_dim]
    }
    const auto [out, lse] =
        ops::chunk_attention(turned.q, turned.k, in.v.to(at::kFloat), model().softmax_scale, window);
    return ops::unstack_query_heads(out, in.q.size(0)).to(at::kDouble);  // [T, n_heads, head_dim]
  }

  kv::KvCache& stored_;
  const kv::SeqId stored_seq_;
  const bool fused_;
  std::vector<double> error_energy_;
  std::vector<double> energy_;
};

/// The 16-bit cache over the model as loaded, for looking at what the model itself does.
std::unique_ptr<kv::KvCache> reference_cache(const Session& session) {
  const kv::KvSpec spec = kv::parse_kv_spec(kReferenceKv);
  return session.formats->get(spec).make_cache(spec, session.model->info().kv, {});
}

void observe(const model::CausalLm& model, kv::KvCache& cache, std::span<const int64_t> tokens, StopFlag stop,
             const ObservingCache::Observer& observer) {
  ObservingCache observing(cache, observer);
  run_step(model, observing, whole(observing.create(), static_cast<int64_t>(tokens.size())), tokens,
           kv::StepKind::kGenerate, stop);
}

}  // namespace

std::vector<double> layer_errors(const KvBinding& binding, std::span<const int64_t> tokens, StopFlag stop) {
  const auto exact = binding.make_cache();
  const auto stored = binding.make_cache();
  ComparingCache comparing(*exact, *stored, binding.format->fuses_projections());
  run_step(*binding.model, comparing, whole(comparing.create(), static_cast<int64_t>(tokens.size())), tokens,
           kv::StepKind::kGenerate, stop);
  return comparing.errors();
}

at::Tensor model_keys(const Session& session, int layer, std::span<const int64_t> tokens, StopFlag stop) {
  const auto cache = reference_cache(session);
  at::Tensor keys;
  observe(*session.model, *cache, tokens, stop, [&](int at_layer, const kv::AttendInput& in) {
    if (at_layer == layer) keys = in.k.to(at::kFloat).flatten(1).to(at::kCPU, /*non_blocking=*/false, /*copy=*/true);
  });
  return keys;
}

at::Tensor coded_keys(const KvBinding& binding, int layer, std::span<const int64_t> tokens, StopFlag stop) {
  const auto cache = binding.make_cache();
  at::Tensor keys;
  observe(*binding.model, *cache, tokens, stop, [&](int at_layer, const kv::AttendInput& in) {
    if (at_layer == layer) keys = cache->keys_to_code(layer, in);
  });
  return keys.defined() ? keys.to(at::kCPU) : keys;
}

at::Tensor attention_shares(const Session& session, std::span<const int64_t> tokens, StopFlag stop) {
  const auto cache = reference_cache(session);
  const kv::KvModel& model = session.model->info().kv;
  const int64_t n_tokens = static_cast<int64_t>(tokens.size());
  const at::Tensor age = age_of_tokens(n_tokens, model.device);
  at::Tensor hidden = age < 0;
  if (model.sliding_window > 0) hidden = hidden.logical_or(age >= model.sliding_window);
  const at::Tensor shares = at::empty({model.n_layers, n_tokens}, at::kFloat);
  observe(*session.model, *cache, tokens, stop, [&](int layer, const kv::AttendInput& in) {
    const Turned turned = turn(model, in);
    const at::Tensor k = turned.k.repeat_interleave(model.n_heads / model.n_kv_heads, 1);  // [T, n_heads, head_dim]
    const at::Tensor scores =
        at::matmul(turned.q.transpose(0, 1), k.permute({1, 2, 0})) * model.softmax_scale;  // [n_heads, T, T]
    shares[layer].copy_(at::softmax(scores.masked_fill(hidden, -INFINITY), -1).mean(at::IntArrayRef{0, 1}));
  });
  return shares;
}

}  // namespace rotunda::engine
