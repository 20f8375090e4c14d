#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "engine/control.h"
#include "kv/kv_format.h"

namespace rotunda::engine {

/// Passes calls on to another cache, which must outlive it; all but graph_epoch(), since a graph would run past whoever looks on. Base of the
/// caches that do.
class CacheDecorator : public kv::KvCache {
 public:
  explicit CacheDecorator(kv::KvCache& inner) : inner_(inner) {}

  const kv::KvSpec& spec() const override { return inner_.spec(); }
  const kv::KvModel& model() const override { return inner_.model(); }
  kv::SeqId create() override { return inner_.create(); }
  kv::SeqId fork(kv::SeqId seq) override { return inner_.fork(seq); }
  void truncate(kv::SeqId seq, int64_t kv_len) override { inner_.truncate(seq, kv_len); }
  void release(kv::SeqId seq) override { inner_.release(seq); }
  int64_t kv_len(kv::SeqId seq) const override { return inner_.kv_len(seq); }
  bool wants_hidden() const override { return inner_.wants_hidden(); }
  void begin_step(const std::vector<kv::SeqChunk>& chunks, kv::StepKind kind) override { inner_.begin_step(chunks, kind); }
  at::Tensor attend(int layer, const kv::AttendInput& in) override { return inner_.attend(layer, in); }
  at::Tensor keys_to_code(int layer, const kv::AttendInput& in) const override { return inner_.keys_to_code(layer, in); }
  void check_step() override { inner_.check_step(); }
  void end_step() override { inner_.end_step(); }
  void abort_step() override { inner_.abort_step(); }
  kv::KvUsage usage() const override { return inner_.usage(); }
  ops::TensorBundle export_sequence(kv::SeqId seq) const override { return inner_.export_sequence(seq); }
  kv::SeqId import_sequence(const ops::TensorBundle& bundle) override { return inner_.import_sequence(bundle); }

 protected:
  kv::KvCache& inner_;
};

/// Throws Interrupted at the next layer once the flag is set, so that a long step ends soon.
class StoppableCache final : public CacheDecorator {
 public:
  StoppableCache(kv::KvCache& inner, StopFlag stop) : CacheDecorator(inner), stop_(stop) {}
  at::Tensor attend(int layer, const kv::AttendInput& in) override {
    if (stop_requested(stop_)) throw Interrupted();
    return inner_.attend(layer, in);
  }

 private:
  StopFlag stop_;
};

/// Shows every layer's input, the residual stream too, to an observer before the cache gets it.
class ObservingCache final : public CacheDecorator {
 public:
  using Observer = std::function<void(int layer, const kv::AttendInput& in)>;

  ObservingCache(kv::KvCache& inner, Observer observer) : CacheDecorator(inner), observer_(std::move(observer)) {}
  bool wants_hidden() const override { return true; }
  at::Tensor attend(int layer, const kv::AttendInput& in) override {
    observer_(layer, in);
    return inner_.attend(layer, in);
  }

 private:
  Observer observer_;
};

}  // namespace rotunda::engine
