#include "kv/windowed_cache.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "base/check.h"
#include "kv/exact_store.h"
#include "kv/sinks.h"

namespace rotunda::kv {

using kernels::kTokenBlock;

namespace {

// Positions and slots of the tokens of a store that lie in first .. end - 1.
std::pair<std::vector<int64_t>, std::vector<int64_t>> sinks_between(const LayerSinks& sinks, int64_t first,
                                                                    int64_t end) {
  std::vector<int64_t> positions;
  std::vector<int64_t> slots;
  for (size_t slot = 0; slot < sinks.slots().size(); ++slot) {
    if (sinks.slots()[slot] < first || sinks.slots()[slot] >= end) continue;
    positions.push_back(sinks.slots()[slot]);
    slots.push_back(static_cast<int64_t>(slot));
  }
  return {positions, slots};
}

}  // namespace

// What a sequence keeps in 16 bits: per layer the newest tokens (a ring: position p lies in slot p % capacity) and the
// sinks.
class WindowedCache::Exact final : public PagedCacheExtra {
 public:
  Exact(const KvModel& model, const ExactOptions& options)
      : pack_group_(options.pack_group),
        rope_lens_(static_cast<size_t>(ExactStore(1, 16, options.longest_window()).n_slots())) {
    for (int layer = 0; layer < model.n_layers; ++layer) {
      windows_.emplace_back(model.n_kv_heads, model.head_dim, options.longest_window());
      sinks_.emplace_back(model.n_kv_heads, model.head_dim, options.sinks, options.n_first);
    }
  }

  std::unique_ptr<PagedCacheExtra> clone() const override { return std::make_unique<Exact>(*this); }

  void truncate(int64_t kv_len) override {
    for (LayerSinks& sinks : sinks_) sinks.truncate(kv_len);
  }

  void add_usage(KvUsage& usage) const override {
    for (const ExactStore& window : windows_) usage.window_bytes += window.bytes();
    for (const LayerSinks& sinks : sinks_) usage.sink_bytes += sinks.store().bytes();
  }

  void export_to(ops::TensorBundle& bundle) const override;
  void import_from(const ops::TensorBundle& bundle, int64_t kv_len) override;

  ExactStore& window(int layer) { return windows_[layer]; }
  const ExactStore& window(int layer) const { return windows_[layer]; }
  LayerSinks& sinks(int layer) { return sinks_[layer]; }
  int64_t slot(int64_t position) const { return position % static_cast<int64_t>(rope_lens_.size()); }
  /// The sequence length that a window token's RoPE was reckoned with, by slot.
  std::vector<int64_t>& rope_lens() { return rope_lens_; }

 private:
  int pack_group_;
  std::vector<ExactStore> windows_;
  std::vector<LayerSinks> sinks_;
  std::vector<int64_t> rope_lens_;
};

void WindowedCache::Exact::export_to(ops::TensorBundle& bundle) const {
  bundle.tensors["window_rope_lens"] = at::tensor(rope_lens_, at::kLong);
  for (size_t layer = 0; layer < windows_.size(); ++layer) {
    const std::string suffix = concat(".", layer);
    bundle.tensors["window" + suffix] = windows_[layer].export_bytes();
    sinks_[layer].export_to(bundle, suffix);
  }
}

void WindowedCache::Exact::import_from(const ops::TensorBundle& bundle, int64_t kv_len) {
  const int64_t n_slots = static_cast<int64_t>(rope_lens_.size());
  const int64_t stored_len = bundle.meta_int("rotunda.stored_len");
  ROTUNDA_CHECK(stored_len % pack_group_ == 0, bundle.origin, ": rotunda.stored_len is ", stored_len,
                ", expected a multiple of ", pack_group_);
  const at::Tensor lens = bundle.get("window_rope_lens", at::kLong, {n_slots}).contiguous();
  rope_lens_.assign(lens.data_ptr<int64_t>(), lens.data_ptr<int64_t>() + n_slots);
  for (size_t layer = 0; layer < windows_.size(); ++layer) {
    const std::string suffix = concat(".", layer);
    windows_[layer].import_bytes(bundle.get("window" + suffix, at::kByte, {windows_[layer].bytes()}));
    sinks_[layer].import_from(bundle, suffix, kv_len);
  }
}

// What a layer of a sequence was before the open step touched it.
struct WindowedCache::Undo {
  Exact* exact;
  int layer;
  std::optional<ExactStore> window;  // whole, where the step brings several tokens
  int64_t slot = -1;                 // else the one slot that it overwrites
  std::vector<float> key, value;
  std::optional<LayerSinks> sinks;
};

// What the decode of one sequence points to while the kernels run.
struct WindowedCache::DecodeTask {
  std::vector<const std::byte*> pages;
  std::vector<uint16_t> masks;
  std::vector<uint16_t> window_masks;
  std::vector<uint16_t> sink_masks;
  const float* q;  // [n_heads][head_dim], for exact keys
  PageAttention attend_pages;
};

WindowedCache::WindowedCache(KvSpec spec, KvModel model, const ExactOptions& exact, int64_t page_bytes,
                             int64_t codes_bytes_per_token, int64_t scale_bytes_per_token)
    : PagedCache(std::move(spec), std::move(model), page_bytes, codes_bytes_per_token, scale_bytes_per_token),
      exact_(exact) {}

WindowedCache::~WindowedCache() = default;

WindowedCache::Exact& WindowedCache::exact_of(const Chunk& chunk) {
  return static_cast<Exact&>(*chunk.sequence->extra);
}

WindowedCache::TokenRange WindowedCache::leaving_window(const Chunk& chunk) {
  return {chunk.sequence->stored_len, std::min(chunk.stored_len, chunk.first)};
}

int64_t WindowedCache::rope_len_in_window(const Chunk& chunk, int64_t position) {
  Exact& exact = exact_of(chunk);
  return exact.rope_lens()[exact.slot(position)];
}

// ---- life of a step ------------------------------------------------------------------------------------------------

int64_t WindowedCache::stored_len_after(const Sequence& sequence, int64_t kv_len) const {
  return std::max(sequence.stored_len, exact_.packed_len(kv_len));
}

// The rest of a group that is cut off stands in the window again: sinks as they are, other tokens as their packed form reads.
int64_t WindowedCache::on_truncate(SeqId seq, Sequence& sequence, int64_t kv_len) const {
  if (kv_len >= sequence.stored_len) return sequence.stored_len;
  const int64_t stored_len = kv_len / exact_.pack_group * exact_.pack_group;
  Chunk chunk{};
  chunk.sequence = &sequence;
  chunk.seq = seq;
  chunk.first = chunk.kv_len = chunk.rope_len = kv_len;
  chunk.stored_len = stored_len;
  Exact& exact = exact_of(chunk);
  const int64_t head_floats = int64_t{model().head_dim} * kTokenBlock;
  const at::Tensor keys = at::empty({channels(), kTokenBlock}, at::kFloat);
  const at::Tensor values = at::empty({model().n_kv_heads, kTokenBlock, model().head_dim}, at::kFloat);
  for (int layer = 0; layer < model().n_layers && stored_len < kv_len; ++layer) {
    ExactStore& window = exact.window(layer);
    const StoredTokens tokens = stored_tokens(layer, chunk);
    for (int64_t block = stored_len / kTokenBlock; block * kTokenBlock < kv_len; ++block) {
      tokens.load_block(block, keys.data_ptr<float>(), kTokenBlock, values.data_ptr<float>(), head_floats);
      const at::Tensor key_rows = keys.t().contiguous();
      const at::Tensor value_rows = values.transpose(0, 1).contiguous();
      for (int64_t position = block * kTokenBlock; position < std::min(kv_len, (block + 1) * kTokenBlock); ++position) {
        const int64_t row = position % kTokenBlock * channels();
        const bool fits =
            window.write(exact.slot(position), key_rows.data_ptr<float>() + row, value_rows.data_ptr<float>() + row);
        ROTUNDA_ASSERT(fits, "a packed token that 16 bits cannot hold");
      }
    }
    const auto [sinks, sink_slots] = sinks_between(exact.sinks(layer), stored_len, kv_len);
    for (size_t i = 0; i < sinks.size(); ++i) {
      exact.sinks(layer).store().read(sink_slots[i], keys.data_ptr<float>(), values.data_ptr<float>());
      window.write(exact.slot(sinks[i]), keys.data_ptr<float>(), values.data_ptr<float>());
    }
  }
  for (int64_t position = stored_len; position < kv_len; ++position) exact.rope_lens()[exact.slot(position)] = kv_len;
  return stored_len;
}

std::unique_ptr<PagedCacheExtra> WindowedCache::make_extra() const { return std::make_unique<Exact>(model(), exact_); }

void WindowedCache::on_end_step(const Step& step) {
  undo_.clear();
  if (exact_.longest_window() == 0) return;
  for (const Chunk& chunk : step.chunks) {
    Exact& exact = exact_of(chunk);
    for (int64_t position = std::max(chunk.first, chunk.stored_len); position < chunk.kv_len; ++position)
      exact.rope_lens()[exact.slot(position)] = chunk.rope_len;
  }
}

void WindowedCache::on_abort_step(const Step&) {
  for (Undo& undo : undo_) {
    ExactStore& window = undo.exact->window(undo.layer);
    if (undo.window) window = std::move(*undo.window);
    if (undo.slot >= 0) window.write(undo.slot, undo.key.data(), undo.value.data());
    if (undo.sinks) undo.exact->sinks(undo.layer) = std::move(*undo.sinks);
  }
  undo_.clear();
}

std::map<std::string, std::string> WindowedCache::saved_settings() const {
  std::map<std::string, std::string> settings{{"rotunda.recent", std::to_string(exact_.recent)}};
  if (exact_.n_first > 0) settings["rotunda.n_first"] = std::to_string(exact_.n_first);
  return settings;
}

// ---- one layer -----------------------------------------------------------------------------------------------------

WindowedCache::NewKeys WindowedCache::new_keys(const Step& step, const at::Tensor& k) const {
  return {ops::apply_rope(k.to(at::kFloat), step.cos, step.sin).contiguous(), {}};
}

at::Tensor WindowedCache::attend_layer(int layer, const Step& step, const AttendInput& in) {
  const auto [k, packable] = new_keys(step, in.k);
  const at::Tensor v = in.v.to(at::kFloat).contiguous();
  const at::Tensor q = (ops::apply_rope(in.q.to(at::kFloat), step.cos, step.sin) * model().softmax_scale).contiguous();
  const at::Tensor out = at::empty({step.n_tokens, model().n_heads, model().head_dim}, at::kFloat);
  const Rows step_rows{packable.defined() ? packable.data_ptr<float>() : nullptr, k.data_ptr<float>(),
                       v.data_ptr<float>()};
  std::vector<size_t> decode;
  for (size_t i = 0; i < step.chunks.size(); ++i) {
    const Chunk& chunk = step.chunks[i];
    const Rows rows = step_rows.from(chunk.row * channels());
    prepare_undo(layer, chunk);
    if (step.kind == StepKind::kQuantizeAll) {
      store_rows(layer, chunk, 0, whole_groups(chunk.kv_len), rows);
      update_sinks(layer, chunk, in.hidden, rows, /*choose=*/true);
      out.narrow(0, chunk.row, chunk.n_tokens).copy_(quantize_all_attention(layer, chunk, q, k, v));
      update_window(layer, chunk, rows);
    } else if (chunk.n_tokens == 1) {
      append(layer, chunk, in.hidden, rows);
      decode.push_back(i);
    } else {
      out.narrow(0, chunk.row, chunk.n_tokens).copy_(prefill_attention(layer, chunk, in.q.scalar_type(), q, k, v));
      append(layer, chunk, in.hidden, rows);
    }
  }
  if (!decode.empty()) decode_attention(layer, step, decode, q, out);
  return out.to(model().dtype);
}

at::Tensor WindowedCache::layer_keys_to_code(int layer, const Step& step, const AttendInput& in) const {
  const auto [turned, packable] = new_keys(step, in.k);
  if (packable.defined()) return packable.clone();
  const at::Tensor keys = turned.clone().view({step.n_tokens, channels()});
  for (const Chunk& chunk : step.chunks) {
    for (int64_t low = chunk.first; low < chunk.kv_len;) {
      const int64_t high = std::min(chunk.kv_len, (low / kTokenBlock + 1) * kTokenBlock);
      make_packable(layer, chunk, low, high - low, keys.data_ptr<float>() + (chunk.row + low - chunk.first) * channels());
      low = high;
    }
  }
  return keys;
}

// Sinks are copied by whoever changes them.
void WindowedCache::prepare_undo(int layer, const Chunk& chunk) {
  Exact& exact = exact_of(chunk);
  Undo undo;
  undo.exact = &exact;
  undo.layer = layer;
  if (chunk.n_tokens > 1) {
    undo.window = exact.window(layer);
  } else if (exact_.longest_window() > 0) {
    undo.slot = exact.slot(chunk.first);
    undo.key.resize(static_cast<size_t>(channels()));
    undo.value.resize(undo.key.size());
    exact.window(layer).read(undo.slot, undo.key.data(), undo.value.data());
  }
  undo_.push_back(std::move(undo));
}

// Sinks, then whatever leaves the window (or never enters it) to the pages, then the window.
void WindowedCache::append(int layer, const Chunk& chunk, const at::Tensor& hidden, const Rows& rows) {
  update_sinks(layer, chunk, hidden, rows, exact_.sink_select == SinkSelect::kRunning || chunk.is_prompt);
  const int64_t first = store_leaving(layer, chunk, rows);
  store_rows(layer, chunk, first, chunk.stored_len, rows.from((first - chunk.first) * channels()));
  update_window(layer, chunk, rows);
}

void WindowedCache::update_sinks(int layer, const Chunk& chunk, const at::Tensor& hidden, const Rows& rows,
                                 bool choose) {
  LayerSinks& sinks = exact_of(chunk).sinks(layer);
  const at::Tensor own = choose && exact_.sinks > 0 ? hidden.narrow(0, chunk.row, chunk.n_tokens) : at::Tensor();
  if (!sinks.would_change(own, chunk.first)) return;
  undo_.back().sinks = sinks;
  sinks.update(own, chunk.first, chunk.n_tokens, rows.turned, rows.value);
}

void WindowedCache::throw_not_finite(int layer, const Chunk& chunk, int64_t first, int64_t end) const {
  throw_user_error(concat(spec().format, ": a key or value of layer ", model().layer_id(layer), ", sequence ", chunk.seq, ", tokens ",
                          first, " to ", end - 1, " is NaN, infinite or beyond fp16"));
}

// Writes rows (of tokens first .. end - 1) to their pages, block by block on all threads. Pairs of blocks stay together,
// because a format may keep a word for both, or a scale.
void WindowedCache::store_rows(int layer, const Chunk& chunk, int64_t first, int64_t end, const Rows& rows) const {
  if (first >= end) return;
  const int64_t unit = std::max<int64_t>(kTokenBlock, exact_.pack_group);
  const int64_t first_block = first / kTokenBlock;
  const int64_t end_block = (end + kTokenBlock - 1) / kTokenBlock;
  std::atomic<bool> finite{true};
  at::parallel_for(first_block / 2, (end_block + 1) / 2, 2, [&](int64_t begin_pair, int64_t end_pair) {
    std::vector<float> made;
    for (int64_t low = std::max(first, 2 * begin_pair * kTokenBlock), high;
         low < std::min(end, 2 * end_pair * kTokenBlock); low = high) {
      high = std::min(end, (low / unit + 1) * unit);
      const int64_t block = low / kTokenBlock;
      const Rows own = rows.from((low - first) * channels());
      const float* key = own.packable;
      if (key == nullptr) {
        made.assign(own.turned, own.turned + (high - low) * channels());
        make_packable(layer, chunk, low, high - low, made.data());
        key = made.data();
      }
      std::byte* page = layer_page(chunk, layer, block / kBlocksPerPage);
      if (!store(layer, page, static_cast<int>(block % kBlocksPerPage), static_cast<int>(low % kTokenBlock),
                 static_cast<int>(high - low), key, own.value))
        finite = false;
    }
  });
  if (!finite) throw_not_finite(layer, chunk, first, end);
}

// The tokens that leave the window, and with them the new ones of their group. @return the first new token that is left
int64_t WindowedCache::store_leaving(int layer, const Chunk& chunk, const Rows& rows) const {
  const TokenRange leaving = leaving_window(chunk);
  if (leaving.first >= leaving.end) return chunk.first;
  const Exact& exact = exact_of(chunk);
  const int64_t end = whole_groups(leaving.end + exact_.pack_group - 1);
  std::vector<float> key(static_cast<size_t>((end - leaving.first) * channels()));
  std::vector<float> value(key.size());
  for (int64_t position = leaving.first; position < leaving.end; ++position) {
    const int64_t offset = (position - leaving.first) * channels();
    exact.window(layer).read(exact.slot(position), key.data() + offset, value.data() + offset);
  }
  const int64_t from_window = (leaving.end - leaving.first) * channels();
  const int64_t from_rows = (end - leaving.end) * channels();
  std::copy_n(rows.turned, from_rows, key.data() + from_window);
  std::copy_n(rows.value, from_rows, value.data() + from_window);
  store_rows(layer, chunk, leaving.first, end, {nullptr, key.data(), value.data()});
  return std::max(chunk.first, end);
}

void WindowedCache::update_window(int layer, const Chunk& chunk, const Rows& rows) const {
  Exact& exact = exact_of(chunk);
  for (int64_t position = std::max(chunk.first, chunk.stored_len); position < chunk.kv_len; ++position) {
    const int64_t offset = (position - chunk.first) * channels();
    if (!exact.window(layer).write(exact.slot(position), rows.turned + offset, rows.value + offset))
      throw_not_finite(layer, chunk, position, position + 1);
  }
}

// ---- attention -----------------------------------------------------------------------------------------------------

// The chunk sees itself exactly, the past as it is stored.
at::Tensor WindowedCache::prefill_attention(int layer, const Chunk& chunk, at::ScalarType dtype, const at::Tensor& q,
                                            const at::Tensor& k, const at::Tensor& v) const {
  const auto own = [&](const at::Tensor& x) { return x.narrow(0, chunk.row, chunk.n_tokens); };
  const auto compute = [&](const at::Tensor& x) { return own(x).to(dtype); };
  const at::Tensor v_heads = v.view({v.size(0), model().n_kv_heads, model().head_dim});
  // q carries the softmax scale already.
  auto [chunk_out, lse] = ops::chunk_attention(compute(q), compute(k), compute(v_heads), 1.0, model().sliding_window);
  if (chunk.first == 0) return ops::unstack_query_heads(chunk_out, chunk.n_tokens);

  ops::TileAttention attention(ops::stack_query_heads(own(q), model().n_kv_heads));
  attention.add_finished(chunk_out, lse);
  const Visibility visible{model().sliding_window, 0};
  Exact& exact = exact_of(chunk);
  const int64_t stored = chunk.sequence->stored_len;
  const auto [sink_positions, sink_slots] = sinks_between(exact.sinks(layer), 0, stored);
  std::vector<int64_t> excluded = sink_positions;
  std::sort(excluded.begin(), excluded.end());
  add_stored(attention, stored_tokens(layer, chunk), 0, stored, excluded, chunk.first, chunk.n_tokens, rep(), visible);
  add_slots(attention, exact.sinks(layer).store(), sink_positions, sink_slots, chunk.first, chunk.n_tokens, visible);
  std::vector<int64_t> window_positions;
  std::vector<int64_t> window_slots;
  for (int64_t position = stored; position < chunk.first; ++position) {
    window_positions.push_back(position);
    window_slots.push_back(exact.slot(position));
  }
  add_slots(attention, exact.window(layer), window_positions, window_slots, chunk.first, chunk.n_tokens, visible);
  return ops::unstack_query_heads(attention.finish(), chunk.n_tokens);
}

void WindowedCache::add_slots(ops::TileAttention& attention, const ExactStore& store,
                              const std::vector<int64_t>& positions, const std::vector<int64_t>& slots,
                              int64_t first_query, int64_t n_queries, Visibility visible) const {
  if (positions.empty()) return;
  const auto [k_t, v] = store.load(slots);
  add_exact(attention, k_t, v, at::tensor(positions, at::kLong), first_query, n_queries, rep(), visible);
}

// Every query sees stored keys and values, its own too, but for sinks and, at distances below `recent`, exact ones. The tokens of a
// group that is not whole are exact at any distance.
at::Tensor WindowedCache::quantize_all_attention(int layer, const Chunk& chunk, const at::Tensor& q,
                                                 const at::Tensor& k, const at::Tensor& v) const {
  const int64_t n_tokens = chunk.n_tokens;
  const int64_t window = model().sliding_window;
  const auto own = [&](const at::Tensor& x) { return x.narrow(0, chunk.row, n_tokens); };
  // Exact means 16 bits, as the window has them.
  const at::Tensor k_t = own(k).to(at::kHalf).to(at::kFloat).permute({1, 2, 0});  // [n_kv_heads, head_dim, T]
  const at::Tensor v_heads =
      own(v).view({n_tokens, model().n_kv_heads, model().head_dim}).to(at::kHalf).to(at::kFloat).transpose(0, 1);
  const int64_t packed = whole_groups(n_tokens);
  const auto [sink_positions, sink_slots] = sinks_between(exact_of(chunk).sinks(layer), 0, packed);
  std::vector<int64_t> excluded = sink_positions;
  std::sort(excluded.begin(), excluded.end());
  const StoredTokens tokens = stored_tokens(layer, chunk);
  const int64_t recent = exact_.recent;
  const at::Tensor out = at::empty({n_tokens, model().n_heads, model().head_dim}, at::kFloat);
  for (int64_t first = 0; first < n_tokens; first += kTileTokens) {
    const int64_t count = std::min(kTileTokens, n_tokens - first);
    ops::TileAttention attention(ops::stack_query_heads(own(q).narrow(0, first, count), model().n_kv_heads));
    add_stored(attention, tokens, 0, packed, excluded, first, count, rep(), {window, recent});
    add_slots(attention, exact_of(chunk).sinks(layer).store(), sink_positions, sink_slots, first, count,
              {window, recent});
    const auto add_newest = [&](int64_t begin, int64_t end, Visibility visible) {
      if (begin >= end) return;
      add_exact(attention, k_t.narrow(2, begin, end - begin), v_heads.narrow(1, begin, end - begin),
                at::arange(begin, end, at::kLong), first, count, rep(), visible);
    };
    if (recent > 0)
      add_newest(std::max<int64_t>(0, first - recent + 1), std::min(first + count, packed),
                 {window == 0 ? recent : std::min(window, recent), 0});
    add_newest(packed, first + count, {window, 0});
    out.narrow(0, first, count).copy_(ops::unstack_query_heads(attention.finish(), count));
  }
  return out;
}

void WindowedCache::decode_attention(int layer, const Step& step, const std::vector<size_t>& chunk_indices,
                                     const at::Tensor& q, const at::Tensor& out) const {
  const int head_dim = model().head_dim;
  const int64_t row_floats = int64_t{model().n_heads} * head_dim;
  std::vector<DecodeTask> tasks(chunk_indices.size());
  std::vector<SplitDecode::Item> items;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Chunk& chunk = step.chunks[chunk_indices[i]];
    DecodeTask& task = tasks[i];
    fill_task(layer, chunk, q.data_ptr<float>() + chunk.row * row_floats, task);
    items.push_back({static_cast<int64_t>(task.pages.size()),
                     [&task](int group, int64_t begin, int64_t end, const kernels::SoftmaxState& state) {
                       task.attend_pages(group, begin,
                                         {task.pages.data() + begin, task.masks.data() + begin * kBlocksPerPage,
                                          static_cast<int>(end - begin)},
                                         state);
                     },
                     [this, layer, &chunk, &task](int group, const kernels::SoftmaxState& state) {
                       decode_exact(layer, chunk, task, group, state);
                     },
                     out.data_ptr<float>() + chunk.row * row_floats});
  }
  const int group_heads = kv_heads_per_group();
  SplitDecode{model().n_kv_heads / group_heads, group_heads * rep(), head_dim,
              int64_t{2} * kPageTokens * group_heads * head_dim}
      .run(items);
}

void WindowedCache::fill_task(int layer, const Chunk& chunk, const float* q, DecodeTask& task) const {
  Exact& exact = exact_of(chunk);
  const int64_t oldest = model().sliding_window == 0 ? 0 : std::max<int64_t>(0, chunk.kv_len - model().sliding_window);
  const int64_t n_pages = (chunk.stored_len + kPageTokens - 1) / kPageTokens;
  for (int64_t page = 0; page < n_pages; ++page) task.pages.push_back(layer_page(chunk, layer, page));
  task.masks = block_masks(n_pages * kBlocksPerPage, oldest, chunk.stored_len);
  const auto bit = [](int64_t slot) { return static_cast<uint16_t>(1u << (slot % kTokenBlock)); };

  const LayerSinks& sinks = exact.sinks(layer);
  task.sink_masks.assign(sinks.slots().size() / kTokenBlock, 0);
  const auto [positions, slots] = sinks_between(sinks, 0, chunk.stored_len);
  for (size_t i = 0; i < positions.size(); ++i) {
    task.masks[positions[i] / kTokenBlock] &= static_cast<uint16_t>(~bit(positions[i]));
    if (positions[i] >= oldest) task.sink_masks[slots[i] / kTokenBlock] |= bit(slots[i]);
  }

  task.window_masks.assign(static_cast<size_t>(exact.window(layer).layout().blocks_per_page), 0);
  for (int64_t position = std::max(oldest, chunk.stored_len); position < chunk.kv_len; ++position)
    task.window_masks[exact.slot(position) / kTokenBlock] |= bit(exact.slot(position));

  task.q = q;
  task.attend_pages = page_attention(layer, chunk, q);
}

void WindowedCache::decode_exact(int layer, const Chunk& chunk, const DecodeTask& task, int group,
                                 const kernels::SoftmaxState& state) const {
  const int head_dim = model().head_dim;
  const int heads_per_group = kv_heads_per_group();
  const auto attend = [&](const ExactStore& store, const std::vector<uint16_t>& masks) {
    if (masks.empty()) return;
    const std::byte* page = store.page();
    for (int head = 0; head < heads_per_group; ++head) {
      const int kv_head = group * heads_per_group + head;
      const kernels::SoftmaxState part{state.max + head * rep(), state.sum + head * rep(),
                                       state.acc + int64_t{head} * rep() * head_dim};
      kernels::decode_plain({store.layout(),
                             {&page, masks.data(), 1},
                             kv_head,
                             rep(),
                             task.q + int64_t{kv_head} * rep() * head_dim,
                             part});
    }
  };
  attend(exact_of(chunk).window(layer), task.window_masks);
  attend(exact_of(chunk).sinks(layer).store(), task.sink_masks);
}

int64_t planned_windowed_bytes(const ExactOptions& exact, const KvModel& model, int64_t page_bytes, int64_t kv_len) {
  const int64_t stored = exact.packed_len(kv_len);
  const int64_t pages = (stored + kPageTokens - 1) / kPageTokens;
  const int64_t window = ExactStore(model.n_kv_heads, model.head_dim, exact.longest_window()).bytes();
  // How many different tokens own the largest entries is only known at run time; this is the most.
  const int64_t n_sinks = std::min<int64_t>(int64_t{exact.sinks} + exact.n_first, kv_len);
  const int64_t sinks = ExactStore(model.n_kv_heads, model.head_dim, n_sinks).bytes();
  return model.n_layers * (pages * PagePool(page_bytes).page_bytes() + window + sinks);
}

}  // namespace rotunda::kv
