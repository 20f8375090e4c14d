#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/kv_binding.h"
#include "engine/session.h"

namespace rotunda::engine::toy {

/// Every byte is a token: id = byte + 2; BOS 0, EOS 1.
class ByteTokenizer final : public io::Tokenizer {
 public:
  explicit ByteTokenizer(bool with_bos = true) : with_bos_(with_bos) {}
  std::vector<int64_t> encode(std::string_view text, bool add_special) const override {
    std::vector<int64_t> ids;
    if (add_special && with_bos_) ids.push_back(0);
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c) + 2);
    return ids;
  }
  std::string decode(const std::vector<int64_t>& ids, bool) const override {
    std::string text;
    for (const int64_t id : ids) {
      if (id >= 2) text += static_cast<char>(id - 2);
    }
    return text;
  }
  int64_t vocab_size() const override { return 258; }
  std::optional<int64_t> bos_id() const override { return with_bos_ ? std::optional<int64_t>(0) : std::nullopt; }
  std::optional<int64_t> eos_id() const override { return 1; }

 private:
  bool with_bos_;
};

/// Two layers of attention over random weights: small, but it needs its cache to be right, and formats can fuse into it.
class ToyLm final : public model::CausalLm {
 public:
  explicit ToyLm(uint64_t seed = 1, int64_t max_position_embeddings = 4096) : hash_(64, static_cast<char>('a' + seed % 16)) {
    info_.architecture = "ToyLm";
    info_.vocab_size = 258;
    info_.max_position_embeddings = max_position_embeddings;
    info_.bos_token_ids = {0};
    info_.eos_token_ids = {1};
    info_.kv.n_layers = 2;
    info_.kv.n_heads = 4;
    info_.kv.n_kv_heads = 2;
    info_.kv.head_dim = 64;
    info_.kv.hidden_size = 64;
    info_.kv.softmax_scale = 0.125;
    info_.kv.rope = ops::Rope(ops::RopeSpec{.head_dim = 64, .max_position_embeddings = max_position_embeddings});
    auto generator = at::detail::createCPUGenerator(seed);
    const auto random = [&](int64_t rows, int64_t columns, double scale) {
      return at::randn({rows, columns}, generator, at::kFloat) * scale;
    };
    embedding_ = random(258, 64, 1.0);
    head_ = random(258, 64, 0.5);
    for (int i = 0; i < info_.kv.n_layers; ++i) {
      kv::ProjectionWeights layer;
      layer.q_weight = random(256, 64, 0.15);
      layer.k_weight = random(128, 64, 0.15);
      layer.v_weight = random(128, 64, 0.15);
      layer.o_weight = random(64, 256, 0.15);
      layer.input_gain = at::ones({64});
      layers_.push_back(layer);
    }
  }

  const model::CausalLmInfo& info() const override { return info_; }
  at::Tensor forward(const at::Tensor& tokens, kv::KvCache& cache) const override {
    at::Tensor x = embedding_.index_select(0, tokens);
    const int64_t n = tokens.size(0);
    for (size_t i = 0; i < layers_.size(); ++i) {
      kv::AttendInput in;
      in.q = at::linear(x, layers_[i].q_weight).view({n, 4, 64});
      in.k = at::linear(x, layers_[i].k_weight).view({n, 2, 64});
      in.v = at::linear(x, layers_[i].v_weight).view({n, 2, 64});
      in.hidden = x;
      x = x + at::linear(cache.attend(static_cast<int>(i), in).reshape({n, 256}), layers_[i].o_weight);
    }
    return x;
  }
  at::Tensor logits(const at::Tensor& hidden) const override { return at::linear(hidden, head_); }
  std::shared_ptr<const CausalLm> with_kv_format(const kv::KvFormat& format, const kv::KvSpec& spec, ops::TensorBundle& setup) const override {
    auto copy = std::make_shared<ToyLm>(*this);
    for (size_t i = 0; i < layers_.size(); ++i) format.fuse(spec, info_.kv, static_cast<int>(i), copy->layers_[i], setup);
    return copy;
  }
  const std::string& weights_hash() const override { return hash_; }

 private:
  model::CausalLmInfo info_;
  std::string hash_;
  at::Tensor embedding_, head_;
  std::vector<kv::ProjectionWeights> layers_;
};

inline Session make_session(bool with_bos = true, uint64_t seed = 1, int64_t max_position_embeddings = 4096) {
  Session session;
  session.model = std::make_shared<ToyLm>(seed, max_position_embeddings);
  session.tokenizer = std::make_shared<ByteTokenizer>(with_bos);
  session.formats = &kv::kv_registry();
  return session;
}

inline KvBinding bind(const Session& session, const std::string& spec) {
  return bind_kv(session, kv::parse_kv_spec(spec), std::nullopt, {}, nullptr);
}

/// Hidden states of all tokens in one step of a fresh cache.
inline at::Tensor run_whole(const KvBinding& binding, const std::vector<int64_t>& ids, kv::StepKind kind = kv::StepKind::kGenerate) {
  const auto cache = binding.make_cache();
  cache->begin_step({{.seq = cache->create(), .n_tokens = static_cast<int64_t>(ids.size()), .is_prompt = true, .rope_len = 0}}, kind);
  const at::Tensor hidden = binding.model->forward(at::tensor(ids, at::kLong), *cache);
  cache->end_step();
  return hidden;
}

/// A folder of its own, gone at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "rotunda-test-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

/// Runs `action` and returns the message of the Error that it throws; "" where it throws none.
template <typename Action>
std::string error_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace rotunda::engine::toy
