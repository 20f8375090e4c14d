#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kv/kv_cache.h"
#include "ops/rope.h"

namespace rotunda::test {

/// The oracle of a key-value cache: fp32 tensors (or fp64, for error bounds) that grow by concatenation, one softmax over a
/// masked score matrix, no pages. Keys are stored after RoPE, as transformers does: under `dynamic` each keeps the angle of
/// the step it came with. For kQuantizeAll and kGenerate alike every token sees exact keys and values, unless `rounding` says
/// that they are rounded to a dtype as they enter.
class ReferenceCache final : public kv::KvCache {
 public:
  explicit ReferenceCache(kv::KvModel model, at::ScalarType arithmetic = at::kFloat,
                          at::ScalarType rounding = at::kDouble)
      : model_(std::move(model)), arithmetic_(arithmetic), rounding_(rounding) {
    spec_.format = "reference";
  }

  const kv::KvSpec& spec() const override { return spec_; }
  const kv::KvModel& model() const override { return model_; }

  kv::SeqId create() override {
    sequences_[next_] = Sequence{0, std::vector<Layer>(static_cast<size_t>(model_.n_layers), empty_layer())};
    return next_++;
  }
  kv::SeqId fork(kv::SeqId seq) override {
    sequences_[next_] = at_seq(seq);  // tensors are never written to, so sharing them is a copy
    return next_++;
  }
  void truncate(kv::SeqId seq, int64_t kv_len) override {
    Sequence& s = at_seq(seq);
    ROTUNDA_CHECK(kv_len >= 0 && kv_len <= s.kv_len, "truncate: kv_len ", kv_len, ", expected 0 to ", s.kv_len);
    s.kv_len = kv_len;
    for (Layer& layer : s.layers) layer = cut(layer, kv_len);
  }
  void release(kv::SeqId seq) override {
    at_seq(seq);
    sequences_.erase(seq);
  }
  int64_t kv_len(kv::SeqId seq) const override { return const_cast<ReferenceCache*>(this)->at_seq(seq).kv_len; }
  bool wants_hidden() const override { return wants_hidden_; }
  void set_wants_hidden(bool wants) { wants_hidden_ = wants; }

  void begin_step(const std::vector<kv::SeqChunk>& chunks, kv::StepKind = kv::StepKind::kGenerate) override {
    ROTUNDA_ASSERT(chunks_.empty(), "a step is open");
    for (size_t i = 0; i < chunks.size(); ++i) {
      at_seq(chunks[i].seq);
      ROTUNDA_CHECK(chunks[i].n_tokens > 0, "begin_step: chunk of ", chunks[i].n_tokens, " tokens");
      for (size_t j = 0; j < i; ++j)
        ROTUNDA_CHECK(chunks[j].seq != chunks[i].seq, "begin_step: sequence ", chunks[i].seq, " twice");
    }
    chunks_ = chunks;
    next_layer_ = 0;
  }

  at::Tensor attend(int layer, const kv::AttendInput& in) override {
    ROTUNDA_ASSERT(!chunks_.empty() && layer == next_layer_, "attend: layer ", layer, ", expected ", next_layer_);
    ++next_layer_;
    std::vector<at::Tensor> results;
    int64_t begin = 0;
    for (const kv::SeqChunk& chunk : chunks_) {
      results.push_back(attend_chunk(layer, chunk, in.q.narrow(0, begin, chunk.n_tokens),
                                     in.k.narrow(0, begin, chunk.n_tokens), in.v.narrow(0, begin, chunk.n_tokens)));
      begin += chunk.n_tokens;
    }
    ROTUNDA_ASSERT(begin == in.q.size(0) && begin == in.k.size(0) && begin == in.v.size(0), "attend: rows ",
                   in.q.size(0));
    return at::cat(results);
  }

  void end_step() override {
    ROTUNDA_ASSERT(next_layer_ == model_.n_layers, "end_step after layer ", next_layer_);
    for (const kv::SeqChunk& chunk : chunks_) at_seq(chunk.seq).kv_len += chunk.n_tokens;
    chunks_.clear();
  }
  void abort_step() override {
    for (const kv::SeqChunk& chunk : chunks_)
      for (Layer& layer : at_seq(chunk.seq).layers) layer = cut(layer, at_seq(chunk.seq).kv_len);
    chunks_.clear();
  }

  kv::KvUsage usage() const override {
    kv::KvUsage usage;
    for (const auto& [id, s] : sequences_) {
      usage.elements += 2 * s.kv_len * model_.kv_channels() * model_.n_layers;
      for (const Layer& layer : s.layers)
        usage.codes_bytes += static_cast<int64_t>(layer.k.nbytes() + layer.v.nbytes());
    }
    return usage;
  }

  ops::TensorBundle export_sequence(kv::SeqId seq) const override {
    const Sequence& s = const_cast<ReferenceCache*>(this)->at_seq(seq);
    ops::TensorBundle bundle;
    bundle.metadata["kv_len"] = std::to_string(s.kv_len);
    for (size_t i = 0; i < s.layers.size(); ++i) {
      bundle.tensors["k." + std::to_string(i)] = s.layers[i].k;
      bundle.tensors["v." + std::to_string(i)] = s.layers[i].v;
    }
    return bundle;
  }
  kv::SeqId import_sequence(const ops::TensorBundle& bundle) override {
    Sequence s{bundle.meta_int("kv_len"), {}};
    for (int i = 0; i < model_.n_layers; ++i) {
      const auto get = [&](const char* name) {
        return bundle.get(name + std::to_string(i), arithmetic_, {s.kv_len, model_.n_kv_heads, model_.head_dim});
      };
      s.layers.push_back({get("k."), get("v.")});
    }
    sequences_[next_] = std::move(s);
    return next_++;
  }

 private:
  struct Layer {
    at::Tensor k, v;  // [kv_len, n_kv_heads, head_dim]
  };
  struct Sequence {
    int64_t kv_len = 0;
    std::vector<Layer> layers;
  };

  Layer empty_layer() const {
    const at::Tensor none = at::empty({0, model_.n_kv_heads, model_.head_dim}, at::TensorOptions().dtype(arithmetic_));
    return {none, none};
  }
  static Layer cut(const Layer& layer, int64_t kv_len) {
    return {layer.k.narrow(0, 0, kv_len), layer.v.narrow(0, 0, kv_len)};
  }
  Sequence& at_seq(kv::SeqId seq) {
    const auto it = sequences_.find(seq);
    ROTUNDA_CHECK(it != sequences_.end(), "no sequence ", seq);
    return it->second;
  }

  // In the arithmetic's dtype throughout; apply_rope would round fp64 to fp32.
  at::Tensor turned(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) const {
    const std::vector<at::Tensor> halves = x.to(arithmetic_).chunk(2, 2);
    const at::Tensor c = cos.to(arithmetic_).unsqueeze(1), s = sin.to(arithmetic_).unsqueeze(1);
    return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, 2);
  }
  at::Tensor rounded(const at::Tensor& x) const {
    return rounding_ == at::kDouble ? x : x.to(rounding_).to(arithmetic_);
  }

  at::Tensor attend_chunk(int layer, const kv::SeqChunk& chunk, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v) {
    Sequence& s = at_seq(chunk.seq);
    Layer& stored = s.layers[static_cast<size_t>(layer)];
    ROTUNDA_CHECK(at::isfinite(k).all().item<bool>() && at::isfinite(v).all().item<bool>(), "layer ", layer,
                  ", sequence ", chunk.seq, ": keys or values are not finite");
    const int64_t kv_len = s.kv_len + chunk.n_tokens;
    const at::Tensor positions = at::arange(s.kv_len, kv_len, at::TensorOptions().dtype(at::kLong));
    const auto [cos, sin] = model_.rope.cos_sin(positions, chunk.rope_len == 0 ? kv_len : chunk.rope_len);
    stored.k = at::cat({stored.k, rounded(turned(k, cos, sin))});
    stored.v = at::cat({stored.v, rounded(v.to(arithmetic_))});

    const int64_t group = model_.n_heads / model_.n_kv_heads;
    const at::Tensor queries = turned(q, cos, sin).transpose(0, 1);                   // [n_heads, T, head_dim]
    const at::Tensor keys = stored.k.repeat_interleave(group, 1).permute({1, 2, 0});  // [n_heads, head_dim, kv_len]
    const at::Tensor values = stored.v.repeat_interleave(group, 1).transpose(0, 1);   // [n_heads, kv_len, head_dim]
    const at::Tensor age =
        positions.unsqueeze(1) - at::arange(kv_len, at::TensorOptions().dtype(at::kLong)).unsqueeze(0);
    at::Tensor hidden = age.lt(0);  // [T, kv_len]
    if (model_.sliding_window > 0) hidden = hidden.logical_or(age.ge(model_.sliding_window));
    const at::Tensor scores = at::matmul(queries, keys)
                                  .mul(model_.softmax_scale)
                                  .masked_fill(hidden, -std::numeric_limits<double>::infinity());
    return at::matmul(at::softmax(scores, -1), values).transpose(0, 1).contiguous().to(model_.dtype);
  }

  kv::KvSpec spec_;
  kv::KvModel model_;
  at::ScalarType arithmetic_, rounding_;
  std::map<kv::SeqId, Sequence> sequences_;
  kv::SeqId next_ = 0;
  std::vector<kv::SeqChunk> chunks_;
  int next_layer_ = 0;
  bool wants_hidden_ = false;
};

}  // namespace rotunda::test
