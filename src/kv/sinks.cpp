#include "kv/sinks.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "base/check.h"

namespace rotunda::kv {

bool LayerSinks::would_change(const at::Tensor& hidden, int64_t first) const {
  if (first < n_first_) return true;
  if (n_entries_ == 0 || !hidden.defined()) return false;
  if (static_cast<int>(entries_.size()) < n_entries_) return true;
  return hidden.abs().max().item<float>() > entries_.back().magnitude;
}

void LayerSinks::choose(const at::Tensor& hidden, int64_t first) {
  const at::Tensor magnitude = hidden.abs().to(at::kFloat);
  // Any of the n largest entries belongs to one of the n tokens with the largest maxima, so only those are searched.
  const int64_t n_candidates = std::min<int64_t>(n_entries_, magnitude.size(0));
  const at::Tensor candidates = std::get<1>(magnitude.amax(1).topk(n_candidates));
  const at::Tensor flat = magnitude.index_select(0, candidates).flatten();
  const auto [values, indices] = flat.topk(std::min<int64_t>(n_entries_, flat.numel()));
  for (int64_t i = 0; i < values.numel(); ++i) {
    const int64_t row = candidates[indices[i].item<int64_t>() / magnitude.size(1)].item<int64_t>();
    entries_.push_back({values[i].item<float>(), first + row});
  }
  std::stable_sort(entries_.begin(), entries_.end(),
                   [](const SinkEntry& a, const SinkEntry& b) { return a.magnitude > b.magnitude; });
  if (static_cast<int>(entries_.size()) > n_entries_) entries_.resize(n_entries_);
}

bool LayerSinks::update(const at::Tensor& hidden, int64_t first, int64_t n_tokens, const float* key,
                        const float* value) {
  if (!would_change(hidden, first)) return false;
  if (n_entries_ > 0 && hidden.defined()) choose(hidden, first);

  std::vector<int64_t> wanted;
  for (const SinkEntry& entry : entries_) wanted.push_back(entry.position);
  for (int64_t position = 0; position < std::min<int64_t>(n_first_, first + n_tokens); ++position)
    wanted.push_back(position);
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());

  for (int64_t& slot : slots_)
    if (slot >= 0 && !std::binary_search(wanted.begin(), wanted.end(), slot)) slot = -1;
  for (const int64_t position : wanted) {
    if (position < first || std::find(slots_.begin(), slots_.end(), position) != slots_.end()) continue;
    auto free = std::find(slots_.begin(), slots_.end(), -1);
    if (free == slots_.end()) {
      store_.grow(static_cast<int64_t>(slots_.size()) + 1);
      slots_.resize(static_cast<size_t>(store_.n_slots()), -1);
      free = std::find(slots_.begin(), slots_.end(), -1);
    }
    const int64_t channels = int64_t{store_.layout().n_kv_heads} * store_.layout().head_dim;
    const bool finite =
        store_.write(free - slots_.begin(), key + (position - first) * channels, value + (position - first) * channels);
    ROTUNDA_CHECK(finite, "kv cache: the key or value of token ", position,
                  " (a sink) is NaN, infinite or beyond fp16");
    *free = position;
  }
  return true;
}

std::vector<int64_t> LayerSinks::positions() const {
  std::vector<int64_t> positions;
  for (const int64_t position : slots_)
    if (position >= 0) positions.push_back(position);
  std::sort(positions.begin(), positions.end());
  return positions;
}

void LayerSinks::truncate(int64_t kv_len) {
  std::erase_if(entries_, [&](const SinkEntry& entry) { return entry.position >= kv_len; });
  for (int64_t& slot : slots_)
    if (slot >= kv_len) slot = -1;
}

void LayerSinks::export_to(ops::TensorBundle& bundle, const std::string& suffix) const {
  bundle.tensors["sink_slots" + suffix] = at::tensor(slots_, at::kLong);
  bundle.tensors["sinks" + suffix] = store_.export_bytes();
  std::vector<float> magnitudes;
  std::vector<int64_t> positions;
  for (const SinkEntry& entry : entries_) {
    magnitudes.push_back(entry.magnitude);
    positions.push_back(entry.position);
  }
  bundle.tensors["sink_magnitudes" + suffix] = at::tensor(magnitudes, at::kFloat);
  bundle.tensors["sink_positions" + suffix] = at::tensor(positions, at::kLong);
}

void LayerSinks::import_from(const ops::TensorBundle& bundle, const std::string& suffix, int64_t kv_len) {
  const auto longs = [&](const std::string& name, int64_t count) {
    const at::Tensor tensor = bundle.get(name, at::kLong, {count}).contiguous();
    return std::vector<int64_t>(tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel());
  };
  const std::vector<int64_t> slots = longs("sink_slots" + suffix, -1);
  const at::Tensor magnitudes = bundle.get("sink_magnitudes" + suffix, at::kFloat, {-1}).contiguous();
  const std::vector<int64_t> positions = longs("sink_positions" + suffix, magnitudes.numel());
  ROTUNDA_CHECK(static_cast<int64_t>(positions.size()) <= n_entries_, bundle.origin, ": tensor sink_positions", suffix, " has ",
                positions.size(), " entries, this cache keeps ", n_entries_);
  std::vector<SinkEntry> entries;
  for (size_t i = 0; i < positions.size(); ++i) {
    ROTUNDA_CHECK(
        positions[i] >= 0 && positions[i] < kv_len && std::count(slots.begin(), slots.end(), positions[i]) == 1,
        bundle.origin, ": tensor sink_positions", suffix, " has ", positions[i],
        ", which has no slot in sink_slots or lies outside ", kv_len, " tokens");
    entries.push_back({magnitudes.data_ptr<float>()[i], positions[i]});
  }
  const int64_t n_first = std::min<int64_t>(n_first_, kv_len);
  for (int64_t position = 0; position < n_first; ++position)
    ROTUNDA_CHECK(std::count(slots.begin(), slots.end(), position) == 1, bundle.origin, ": tensor sink_slots", suffix,
                  " lacks token ", position, ", one of the first ", n_first, " that this cache keeps");
  for (const int64_t slot : slots)
    ROTUNDA_CHECK(
        slot == -1 || (slot >= 0 && slot < n_first) || std::count(positions.begin(), positions.end(), slot) > 0,
        bundle.origin, ": tensor sink_slots", suffix, " has ", slot, ", which is no sink");
  ExactStore store(store_.layout().n_kv_heads, store_.layout().head_dim, static_cast<int64_t>(slots.size()));
  ROTUNDA_CHECK(store.n_slots() == static_cast<int64_t>(slots.size()), bundle.origin, ": tensor sink_slots",
                suffix, " has ", slots.size(), " entries, expected a multiple of ", kernels::kTokenBlock);
  store.import_bytes(bundle.get("sinks" + suffix, at::kByte, {store.bytes()}));
  entries_ = std::move(entries);
  slots_ = slots;
  store_ = std::move(store);
}

}  // namespace rotunda::kv
