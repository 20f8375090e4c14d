#include "kv/mix/mix_cache.h"

#include <algorithm>
#include <functional>
#include <map>

#include "base/check.h"

namespace rotunda::kv::mix {

namespace {

constexpr int64_t kSavedVersion = 1;

class MixCache final : public KvCache {
 public:
  MixCache(KvSpec spec, KvModel model, std::vector<std::unique_ptr<KvCache>> caches, std::vector<MixPlace> places)
      : spec_(std::move(spec)), model_(std::move(model)), caches_(std::move(caches)), places_(std::move(places)) {}

  const KvSpec& spec() const override { return spec_; }
  const KvModel& model() const override { return model_; }

  SeqId create() override {
    return add([&](size_t part) { return caches_[part]->create(); });
  }

  SeqId fork(SeqId seq) override {
    const std::vector<SeqId> from = ids(seq);
    return add([&](size_t part) { return caches_[part]->fork(from[part]); });
  }

  // All parts hold the same tokens, so what the first refuses none has done.
  void truncate(SeqId seq, int64_t kv_len) override {
    for (size_t part = 0; part < caches_.size(); ++part) caches_[part]->truncate(ids(seq)[part], kv_len);
  }

  void release(SeqId seq) override {
    release_in_parts(ids(seq));
    sequences_.erase(seq);
  }

  int64_t kv_len(SeqId seq) const override { return caches_[0]->kv_len(ids(seq)[0]); }

  bool wants_hidden() const override {
    return std::any_of(caches_.begin(), caches_.end(), [](const auto& cache) { return cache->wants_hidden(); });
  }

  void begin_step(const std::vector<SeqChunk>& chunks, StepKind kind) override {
    abort_step();
    try {
      for (size_t part = 0; part < caches_.size(); ++part) {
        std::vector<SeqChunk> own = chunks;
        for (SeqChunk& chunk : own) chunk.seq = ids(chunk.seq)[part];
        caches_[part]->begin_step(own, kind);
      }
    } catch (...) {
      abort_step();
      throw;
    }
  }

  at::Tensor attend(int layer, const AttendInput& in) override {
    ROTUNDA_ASSERT(layer >= 0 && layer < model_.n_layers);
    const MixPlace& place = places_[static_cast<size_t>(layer)];
    return caches_[static_cast<size_t>(place.part)]->attend(place.layer, in);
  }

  at::Tensor keys_to_code(int layer, const AttendInput& in) const override {
    ROTUNDA_ASSERT(layer >= 0 && layer < model_.n_layers);
    const MixPlace& place = places_[static_cast<size_t>(layer)];
    return caches_[static_cast<size_t>(place.part)]->keys_to_code(place.layer, in);
  }

  void check_step() override {
    for (const auto& cache : caches_) cache->check_step();
  }

  // All are asked before the first ends: what one refuses no other has taken then.
  void end_step() override {
    check_step();
    for (const auto& cache : caches_) cache->end_step();
  }

  uint64_t graph_epoch() const override {
    uint64_t all = 1;
    for (const auto& cache : caches_) {
      const uint64_t one = cache->graph_epoch();
      if (one == 0) return 0;
      all = all * 1000003 + one;
    }
    return all;
  }

  void abort_step() override {
    for (const auto& cache : caches_) cache->abort_step();
  }

  KvUsage usage() const override {
    KvUsage usage;
    for (const auto& cache : caches_) usage += cache->usage();
    return usage;
  }

  ops::TensorBundle export_sequence(SeqId seq) const override {
    ops::TensorBundle bundle;
    bundle.metadata = saved_header();
    for (size_t part = 0; part < caches_.size(); ++part)
      bundle.add(part_prefix(part), caches_[part]->export_sequence(ids(seq)[part]));
    return bundle;
  }

  SeqId import_sequence(const ops::TensorBundle& bundle) override {
    for (const auto& [key, value] : saved_header())
      ROTUNDA_CHECK(bundle.meta(key) == value, bundle.origin, ": ", key, " is ", bundle.meta(key), ", this cache has ",
                    value);
    const SeqId seq = add([&](size_t part) {
      ops::TensorBundle own = bundle.part(part_prefix(part));
      own.origin = concat(bundle.origin, ", ", part_prefix(part));
      return caches_[part]->import_sequence(own);
    });
    for (size_t part = 1; part < caches_.size(); ++part) {
      const int64_t first = kv_len(seq), other = caches_[part]->kv_len(ids(seq)[part]);
      if (first == other) continue;
      release(seq);
      throw_user_error(
          concat(bundle.origin, ": ", part_prefix(part), " holds ", other, " tokens, ", part_prefix(0), " ", first));
    }
    return seq;
  }

 private:
  const std::vector<SeqId>& ids(SeqId seq) const {
    const auto it = sequences_.find(seq);
    ROTUNDA_CHECK(it != sequences_.end(), "kv cache: sequence ", seq, " does not exist");
    return it->second;
  }

  // A sequence that `make` makes in every part, or in none.
  SeqId add(const std::function<SeqId(size_t part)>& make) {
    std::vector<SeqId> made;
    try {
      for (size_t part = 0; part < caches_.size(); ++part) made.push_back(make(part));
      sequences_.emplace(next_seq_, made);
    } catch (...) {
      release_in_parts(made);
      throw;
    }
    return next_seq_++;
  }

  void release_in_parts(const std::vector<SeqId>& made) {
    for (size_t part = 0; part < made.size(); ++part) caches_[part]->release(made[part]);
  }

  std::map<std::string, std::string> saved_header() const {
    return {{"rotunda.format", spec_.format},
            {"rotunda.version", std::to_string(kSavedVersion)},
            {"rotunda.mix", spec_.to_string()},
            {"rotunda.n_layers", std::to_string(model_.n_layers)}};
  }

  KvSpec spec_;
  KvModel model_;
  std::vector<std::unique_ptr<KvCache>> caches_;  // one per part
  std::vector<MixPlace> places_;                  // [n_layers]
  std::map<SeqId, std::vector<SeqId>>
      sequences_;  // what each part calls the sequence; a part's failed import may leave them apart
  SeqId next_seq_ = 0;
};

}  // namespace

std::unique_ptr<KvCache> make_mix_cache(KvSpec spec, KvModel model, std::vector<std::unique_ptr<KvCache>> caches,
                                        std::vector<MixPlace> places) {
  return std::make_unique<MixCache>(std::move(spec), std::move(model), std::move(caches), std::move(places));
}

}  // namespace rotunda::kv::mix
