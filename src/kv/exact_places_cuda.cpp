#include "kv/exact_places_cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include <algorithm>

#include "base/check.h"
#include "kv/exact_store.h"
#include "kv/paged_cache.h"
#include "kv/sinks.h"
#include "ops/launch_cuda.h"

namespace rotunda::kv {

using kernels::kTokenBlock;

namespace {

using ops::check_launch;
using ops::current_stream;
using ops::on_gpu;

int blocks_of(int64_t slots) { return static_cast<int>((slots + kTokenBlock - 1) / kTokenBlock); }

std::vector<int64_t> to_longs(const at::Tensor& tensor) {
  const at::Tensor host = tensor.to(at::kCPU, at::kLong).contiguous();
  return {host.const_data_ptr<int64_t>(), host.const_data_ptr<int64_t>() + host.numel()};
}

}  // namespace

ExactPlacesCuda::ExactPlacesCuda(const KvModel& model, const ExactOptions& options)
    : n_layers_(model.n_layers), n_kv_heads_(model.n_kv_heads), head_dim_(model.head_dim), options_(options) {
  window_blocks_ = options.recent > 0 ? blocks_of(options.recent + kSpareSlots) : 0;
  const int64_t sinks = int64_t{options.sinks} + options.n_first;
  sink_blocks_ = sinks > 0 ? blocks_of(sinks + 1) : 0;
  grow(1);
}

void ExactPlacesCuda::grow(int64_t n_places) {
  const int64_t before = bytes_.defined() ? bytes_.size(0) : 0;
  if (n_places <= before) return;
  // By an eighth: a place of a large model takes a hundred megabytes, and old and new are there together while they are copied.
  const int64_t made = std::max(n_places, before + before / 8);
  const int64_t piece_bytes = int64_t{window_blocks_ + sink_blocks_} * kTokenBlock * n_kv_heads_ * head_dim_ * 4;
  const auto grown = [&](const at::Tensor& tensor, std::vector<int64_t> sizes, at::ScalarType type, int dim, double fill) {
    const at::Tensor larger = at::full(sizes, fill, on_gpu(type));
    if (before > 0) larger.narrow(dim, 0, before).copy_(tensor);
    return larger;
  };
  // All of them before any takes its place: memory may run out.
  const at::Tensor bytes = grown(bytes_, {made, n_layers_, piece_bytes}, at::kByte, 0, 0);
  const at::Tensor sink_positions = grown(sink_positions_, {made, n_layers_, int64_t{sink_blocks_} * kTokenBlock}, at::kInt, 0, -1);
  const at::Tensor magnitudes = grown(magnitudes_, {made, n_layers_, options_.sinks}, at::kFloat, 0, -1);
  const at::Tensor entries = grown(entries_, {made, n_layers_, options_.sinks}, at::kLong, 0, -1);
  const at::Tensor page_masks = grown(page_masks_, {n_layers_, made, before > 0 ? page_masks_.size(2) : 64}, at::kShort, 1, -1);
  bytes_ = bytes, sink_positions_ = sink_positions, magnitudes_ = magnitudes, entries_ = entries, page_masks_ = page_masks;
  for (int64_t place = made - 1; place >= before; --place) free_.push_back(place);
  ++epoch_;
}

void ExactPlacesCuda::reserve_tokens(int64_t n_tokens) {
  // Of whole pages, since kernels read masks a page at a time.
  const int64_t wanted = (n_tokens + kPageTokens - 1) / kPageTokens * kBlocksPerPage;
  const int64_t before = page_masks_.size(2);
  if (wanted <= before) return;
  const at::Tensor larger = at::full({n_layers_, page_masks_.size(1), std::max(wanted, 2 * before)}, -1, on_gpu(at::kShort));
  larger.narrow(2, 0, before).copy_(page_masks_);
  page_masks_ = larger;
  ++epoch_;
}

int64_t ExactPlacesCuda::take() {
  if (free_.empty()) grow(bytes_.size(0) + 1);
  const int64_t place = free_.back();
  free_.pop_back();
  sink_positions_[place].fill_(-1);
  magnitudes_[place].fill_(-1);
  entries_[place].fill_(-1);
  page_masks_.select(1, place).fill_(-1);
  return place;
}

int64_t ExactPlacesCuda::copy(int64_t place) {
  const int64_t made = take();
  for (const at::Tensor& tensor : {bytes_, sink_positions_, magnitudes_, entries_}) tensor[made].copy_(tensor[place]);
  page_masks_.select(1, made).copy_(page_masks_.select(1, place));
  return made;
}

void ExactPlacesCuda::give_back(int64_t place) { free_.push_back(place); }

void ExactPlacesCuda::truncate(int64_t place, int64_t kv_len) {
  const at::Tensor slots = sink_positions_[place];
  slots.masked_fill_(slots.ge(kv_len), -1);
  // The largest first again, those that are left.
  const at::Tensor gone = entries_[place].ge(kv_len);
  const auto [magnitudes, order] = magnitudes_[place].masked_fill(gone, -1.0).sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
  magnitudes_[place].copy_(magnitudes);
  entries_[place].copy_(entries_[place].masked_fill(gone, -1).gather(-1, order));
  check_launch(kernels::rebuild_masks_cuda(view(), static_cast<int>(place), current_stream()), "rebuild_masks");
}

kernels::ExactTokens ExactPlacesCuda::view() const {
  kernels::ExactTokens view;
  view.bytes = reinterpret_cast<std::byte*>(bytes_.mutable_data_ptr<uint8_t>());
  view.place_stride = bytes_.stride(0);
  view.layer_stride = bytes_.stride(1);
  view.n_layers = n_layers_;
  view.n_kv_heads = n_kv_heads_;
  view.head_dim = head_dim_;
  view.window_blocks = window_blocks_;
  view.sink_blocks = sink_blocks_;
  view.sink_positions = sink_positions_.mutable_data_ptr<int32_t>();
  view.page_masks = reinterpret_cast<uint16_t*>(page_masks_.mutable_data_ptr<int16_t>());
  view.mask_stride = page_masks_.stride(1);
  view.n_places = page_masks_.size(1);
  return view;
}

ExactPlacesCuda::Saved ExactPlacesCuda::save(int64_t place, bool whole) const {
  return {place, whole ? bytes_[place].clone() : at::Tensor(), sink_positions_[place].clone(), magnitudes_[place].clone(), entries_[place].clone()};
}

void ExactPlacesCuda::restore(const Saved& saved) {
  if (saved.bytes.defined()) bytes_[saved.place].copy_(saved.bytes);
  sink_positions_[saved.place].copy_(saved.sink_positions);
  magnitudes_[saved.place].copy_(saved.magnitudes);
  entries_[saved.place].copy_(saved.entries);
  check_launch(kernels::rebuild_masks_cuda(view(), static_cast<int>(saved.place), current_stream()), "rebuild_masks");
}

int64_t ExactPlacesCuda::window_bytes() const {
  return int64_t{n_layers_} * window_blocks_ * kTokenBlock * n_kv_heads_ * head_dim_ * 4;
}

int64_t ExactPlacesCuda::sink_bytes() const {
  return int64_t{n_layers_} * sink_blocks_ * kTokenBlock * n_kv_heads_ * head_dim_ * 4;
}

void ExactPlacesCuda::export_to(int64_t place, int64_t stored_len, int64_t kv_len, ops::TensorBundle& bundle) const {
  const at::Tensor bytes = bytes_[place].cpu();
  const at::Tensor slots = sink_positions_[place].cpu();
  const at::Tensor magnitudes = magnitudes_[place].cpu();
  const at::Tensor positions = entries_[place].cpu();
  std::vector<float> key(static_cast<size_t>(n_kv_heads_) * head_dim_);
  std::vector<float> value(key.size());
  for (int layer = 0; layer < n_layers_; ++layer) {
    const std::string suffix = concat(".", layer);
    ExactStore own(n_kv_heads_, head_dim_, int64_t{window_blocks_ + sink_blocks_} * kTokenBlock);
    own.import_bytes(bytes[layer]);
    const int64_t window_slots = int64_t{window_blocks_} * kTokenBlock;
    ExactStore window(n_kv_heads_, head_dim_, options_.recent);
    for (int64_t position = stored_len; window.n_slots() > 0 && position < kv_len; ++position) {
      own.read(position % window_slots, key.data(), value.data());
      window.write(position % window.n_slots(), key.data(), value.data());
    }
    bundle.tensors["window" + suffix] = window.export_bytes();

    const std::vector<int64_t> owners = to_longs(slots[layer]);
    ExactStore sinks(n_kv_heads_, head_dim_, static_cast<int64_t>(owners.size()));
    for (size_t slot = 0; slot < owners.size(); ++slot) {
      if (owners[slot] < 0) continue;
      own.read(window_slots + static_cast<int64_t>(slot), key.data(), value.data());
      sinks.write(static_cast<int64_t>(slot), key.data(), value.data());
    }
    bundle.tensors["sink_slots" + suffix] = at::tensor(owners, at::kLong);
    bundle.tensors["sinks" + suffix] = sinks.export_bytes();
    const at::Tensor there = positions[layer].ge(0);
    bundle.tensors["sink_magnitudes" + suffix] = magnitudes[layer].masked_select(there);
    bundle.tensors["sink_positions" + suffix] = positions[layer].masked_select(there);
  }
}

void ExactPlacesCuda::import_from(int64_t place, const ops::TensorBundle& bundle, int64_t stored_len, int64_t kv_len) {
  const int64_t window_slots = int64_t{window_blocks_} * kTokenBlock;
  const at::Tensor bytes = at::empty(bytes_[place].sizes(), at::kByte);
  const at::Tensor slots = at::full(sink_positions_[place].sizes(), -1, at::kInt);
  const at::Tensor magnitudes = at::full(magnitudes_[place].sizes(), -1.0, at::kFloat);
  const at::Tensor positions = at::full(entries_[place].sizes(), -1, at::kLong);
  std::vector<float> key(static_cast<size_t>(n_kv_heads_) * head_dim_);
  std::vector<float> value(key.size());
  for (int layer = 0; layer < n_layers_; ++layer) {
    const std::string suffix = concat(".", layer);
    ExactStore own(n_kv_heads_, head_dim_, int64_t{window_blocks_ + sink_blocks_} * kTokenBlock);
    ExactStore window(n_kv_heads_, head_dim_, options_.recent);
    window.import_bytes(bundle.get("window" + suffix, at::kByte, {window.bytes()}));
    for (int64_t position = stored_len; window.n_slots() > 0 && position < kv_len; ++position) {
      window.read(position % window.n_slots(), key.data(), value.data());
      own.write(position % window_slots, key.data(), value.data());
    }
    LayerSinks sinks(n_kv_heads_, head_dim_, options_.sinks, options_.n_first);
    sinks.import_from(bundle, suffix, kv_len);
    int64_t slot = 0;
    for (size_t from = 0; from < sinks.slots().size(); ++from) {
      if (sinks.slots()[from] < 0) continue;
      sinks.store().read(static_cast<int64_t>(from), key.data(), value.data());
      own.write(window_slots + slot, key.data(), value.data());
      slots[layer][slot++] = sinks.slots()[from];
    }
    for (size_t i = 0; i < sinks.entries().size(); ++i) {
      magnitudes[layer][static_cast<int64_t>(i)] = sinks.entries()[i].magnitude;
      positions[layer][static_cast<int64_t>(i)] = sinks.entries()[i].position;
    }
    bytes[layer].copy_(own.export_bytes());
  }
  bytes_[place].copy_(bytes);
  sink_positions_[place].copy_(slots);
  magnitudes_[place].copy_(magnitudes);
  entries_[place].copy_(positions);
  reserve_tokens(kv_len);
  check_launch(kernels::rebuild_masks_cuda(view(), static_cast<int>(place), current_stream()), "rebuild_masks");
}

}  // namespace rotunda::kv
