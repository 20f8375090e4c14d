#include "kv/rotate/rotate_cache.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <optional>

#include "base/check.h"
#include "kernels/hadamard/hadamard.h"
#include "kv/paged_cache.h"
#include "kv/rotate/rope_tables.h"
#include "kv/rotate/sinks.h"
#include "kv/stored_attention.h"

namespace rotunda::kv::rotate {

namespace {

// What a sequence keeps in 16 bits: per layer the newest tokens (a ring: position p lies in slot p % capacity) and the sinks.
class Exact final : public PagedCacheExtra {
 public:
  Exact(const KvModel& model, const RotateOptions& options)
      : rope_lens_(static_cast<size_t>(ExactStore(1, 16, options.recent).n_slots())) {
    for (int layer = 0; layer < model.n_layers; ++layer) {
      windows_.emplace_back(model.n_kv_heads, model.head_dim, options.recent);
      sinks_.emplace_back(model.n_kv_heads, model.head_dim, options.sinks);
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
  LayerSinks& sinks(int layer) { return sinks_[layer]; }
  int64_t slot(int64_t position) const { return position % static_cast<int64_t>(rope_lens_.size()); }
  /// The sequence length that a window token's RoPE was reckoned with, by slot.
  std::vector<int64_t>& rope_lens() { return rope_lens_; }

 private:
  std::vector<ExactStore> windows_;
  std::vector<LayerSinks> sinks_;
  std::vector<int64_t> rope_lens_;
};

void Exact::export_to(ops::TensorBundle& bundle) const {
  bundle.tensors["window_rope_lens"] = at::tensor(rope_lens_, at::kLong);
  for (size_t layer = 0; layer < windows_.size(); ++layer) {
    const std::string suffix = concat(".", layer);
    bundle.tensors["window" + suffix] = windows_[layer].export_bytes();
    const LayerSinks& sinks = sinks_[layer];
    bundle.tensors["sink_slots" + suffix] = at::tensor(sinks.slots(), at::kLong);
    bundle.tensors["sinks" + suffix] = sinks.store().export_bytes();
    std::vector<float> magnitudes;
    std::vector<int64_t> positions;
    for (const SinkEntry& entry : sinks.entries()) {
      magnitudes.push_back(entry.magnitude);
      positions.push_back(entry.position);
    }
    bundle.tensors["sink_magnitudes" + suffix] = at::tensor(magnitudes, at::kFloat);
    bundle.tensors["sink_positions" + suffix] = at::tensor(positions, at::kLong);
  }
}

void Exact::import_from(const ops::TensorBundle& bundle, int64_t kv_len) {
  const auto longs = [&](const std::string& name, int64_t count) {
    const at::Tensor tensor = bundle.get(name, at::kLong, {count}).contiguous();
    return std::vector<int64_t>(tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel());
  };
  rope_lens_ = longs("window_rope_lens", static_cast<int64_t>(rope_lens_.size()));
  for (size_t layer = 0; layer < windows_.size(); ++layer) {
    const std::string suffix = concat(".", layer);
    windows_[layer].import_bytes(bundle.get("window" + suffix, at::kByte, {windows_[layer].bytes()}));
    const std::vector<int64_t> slots = longs("sink_slots" + suffix, -1);
    const at::Tensor magnitudes = bundle.get("sink_magnitudes" + suffix, at::kFloat, {-1}).contiguous();
    const std::vector<int64_t> positions = longs("sink_positions" + suffix, magnitudes.numel());
    std::vector<SinkEntry> entries;
    for (size_t i = 0; i < positions.size(); ++i) {
      ROTUNDA_CHECK(positions[i] >= 0 && positions[i] < kv_len && std::count(slots.begin(), slots.end(), positions[i]) == 1, bundle.origin,
                    ": tensor sink_positions", suffix, " has ", positions[i], ", which has no slot in sink_slots or lies outside ", kv_len, " tokens");
      entries.push_back({magnitudes.data_ptr<float>()[i], positions[i]});
    }
    for (const int64_t slot : slots)
      ROTUNDA_CHECK(slot == -1 || std::count(positions.begin(), positions.end(), slot) > 0, bundle.origin, ": tensor sink_slots", suffix, " has ", slot,
                    ", which is no sink");
    ExactStore expected = sinks_[layer].store();
    expected.grow(static_cast<int64_t>(slots.size()));
    ROTUNDA_CHECK(expected.n_slots() == static_cast<int64_t>(slots.size()), bundle.origin, ": tensor sink_slots", suffix, " has ", slots.size(),
                  " entries, expected a multiple of ", kTokenBlock);
    sinks_[layer].restore(std::move(entries), slots, bundle.get("sinks" + suffix, at::kByte, {expected.bytes()}));
  }
}

// What a layer of a sequence was before the open step touched it.
struct Undo {
  Exact* exact;
  int layer;
  std::optional<ExactStore> window;  // whole, where the step brings several tokens
  int64_t slot = -1;                 // else the one slot that it overwrites
  std::vector<float> key, value;
  std::optional<LayerSinks> sinks;
};

class RotateCache final : public PagedCache {
 public:
  RotateCache(const KvSpec& spec, const KvModel& model, const RotateOptions& options, const RotatePageLayout& layout,
              std::vector<std::vector<uint16_t>> key_groups)
      : PagedCache(spec, model, layout.page_bytes(), (layout.key_codes_bytes() + layout.value_codes_bytes()) / layout.page_tokens(),
                   2 * (layout.scale_bytes() + layout.zeros_bytes()) / layout.page_tokens()),
        options_(options),
        key_groups_(std::move(key_groups)),
        rep_(model.n_heads / model.n_kv_heads) {
    const kernels::HadamardPlan plan = kernels::hadamard_plan(layout.group_channels());
    for (int layer = 0; layer < model.n_layers; ++layer)
      layers_.push_back({layout, key_groups_[layer].data(), options.clip, options.clip, plan});
  }

  bool wants_hidden() const override { return options_.sinks > 0; }

 private:
  // ---- life of a step -------------------------------------------------------------------------------------------------

  int64_t stored_len_after(const Sequence& sequence, int64_t kv_len) const override {
    return std::max(sequence.stored_len, kv_len - options_.recent);
  }

  std::unique_ptr<PagedCacheExtra> make_extra() const override { return std::make_unique<Exact>(model(), options_); }

  static Exact& exact_of(const Chunk& chunk) { return static_cast<Exact&>(*chunk.sequence->extra); }

  void on_begin_step(const Step& step) override {
    undo_.clear();
    leaving_.clear();
    for (const Chunk& chunk : step.chunks) {
      RopeTables& tables = rope_tables(chunk.rope_len);
      tables.reserve_pages((chunk.kv_len + kPageTokens - 1) / kPageTokens);
      // Window tokens that go to pages in this step are turned back with the angles that they were turned by.
      Leaving leaving;
      leaving.first = chunk.sequence->stored_len;
      leaving.end = std::min(chunk.stored_len, chunk.first);
      const int half = model().head_dim / 2;
      for (int64_t position = leaving.first; position < leaving.end; ++position) {
        const std::vector<double>& inv_freq = rope_tables(exact_of(chunk).rope_lens()[exact_of(chunk).slot(position)]).inv_freq();
        for (int pair = 0; pair < half; ++pair) {
          const double angle = static_cast<double>(position) * inv_freq[pair];
          // k = a R k0 with the attention factor a, so k0 = R^T k / a.
          leaving.cos.push_back(static_cast<float>(std::cos(angle) / model().rope.attention_factor()));
          leaving.sin.push_back(static_cast<float>(std::sin(angle) / model().rope.attention_factor()));
        }
      }
      leaving_.push_back(std::move(leaving));
    }
  }

  void on_end_step(const Step& step) override {
    undo_.clear();
    for (const Chunk& chunk : step.chunks) {
      if (options_.recent == 0) continue;
      for (int64_t position = std::max(chunk.first, chunk.stored_len); position < chunk.kv_len; ++position)
        exact_of(chunk).rope_lens()[exact_of(chunk).slot(position)] = chunk.rope_len;
    }
    if (model().rope.depends_on_length()) drop_old_tables(step);
  }

  void on_abort_step(const Step&) override {
    for (Undo& undo : undo_) {
      ExactStore& window = undo.exact->window(undo.layer);
      if (undo.window) window = std::move(*undo.window);
      if (undo.slot >= 0) window.write(undo.slot, undo.key.data(), undo.value.data());
      if (undo.sinks) undo.exact->sinks(undo.layer) = std::move(*undo.sinks);
    }
    undo_.clear();
  }

  std::map<std::string, std::string> saved_settings() const override {
    const RotatePageLayout& layout = layers_.front().layout;
    return {{"rotunda.bits", std::to_string(layout.bits)},
            {"rotunda.zero", layout.zero == ZeroPoint::kCode ? "code" : "minimum"},
            {"rotunda.group_size", std::to_string(layout.group_size)},
            {"rotunda.heads_per_group", std::to_string(layout.heads_per_group)},
            {"rotunda.recent", std::to_string(options_.recent)},
            {"rotunda.key_groups_hash", std::to_string(key_groups_hash())}};
  }

  // FNV-1a over the channel-to-group tables: codes mean nothing under other tables.
  uint64_t key_groups_hash() const {
    uint64_t hash = 14695981039346656037ULL;
    for (const auto& table : key_groups_)
      for (const uint16_t group : table) hash = (hash ^ group) * 1099511628211ULL;
    return hash;
  }

  // Only `dynamic` RoPE has more than one table.
  RopeTables& rope_tables(int64_t rope_len) {
    const bool grown = model().rope.depends_on_length() && rope_len > model().rope.spec().max_position_embeddings;
    auto [it, added] = tables_.try_emplace(grown ? rope_len : 0);
    if (added) it->second = RopeTables(model().rope.inv_freq(grown ? rope_len : 0), kPageTokens);
    return it->second;
  }

  void drop_old_tables(const Step& step) {
    std::erase_if(tables_, [&](const auto& entry) {
      return entry.first != 0 && std::none_of(step.chunks.begin(), step.chunks.end(), [&](const Chunk& c) { return c.rope_len == entry.first; });
    });
  }

  // ---- one layer ------------------------------------------------------------------------------------------------------

  at::Tensor attend_layer(int layer, const Step& step, const AttendInput& in) override {
    const auto [rotated, plain] = both_bases(in.k);  // [T, channels] fp32 before RoPE
    const at::Tensor k = ops::apply_rope(plain.view({step.n_tokens, model().n_kv_heads, model().head_dim}), step.cos, step.sin).contiguous();
    const at::Tensor v = in.v.to(at::kFloat).contiguous();
    const at::Tensor q = (ops::apply_rope(in.q.to(at::kFloat), step.cos, step.sin) * model().softmax_scale).contiguous();
    const at::Tensor out = at::empty({step.n_tokens, model().n_heads, model().head_dim}, at::kFloat);
    std::vector<size_t> decode;
    for (size_t i = 0; i < step.chunks.size(); ++i) {
      const Chunk& chunk = step.chunks[i];
      const Rows rows{rotated.data_ptr<float>() + chunk.row * channels(), k.data_ptr<float>() + chunk.row * channels(),
                      v.data_ptr<float>() + chunk.row * channels()};
      if (step.kind == StepKind::kQuantizeAll) {
        prepare_undo(layer, chunk);
        store_chunk(layer, chunk, 0, chunk.kv_len, rows);
        update_sinks(layer, chunk, in.hidden, rows, /*choose=*/true);
        out.narrow(0, chunk.row, chunk.n_tokens).copy_(quantize_all_attention(layer, chunk, q, k, v));
        update_window(layer, chunk, rows);
      } else if (chunk.n_tokens == 1) {
        prepare_undo(layer, chunk);
        append(layer, i, chunk, in.hidden, rows);
        decode.push_back(i);
      } else {
        prepare_undo(layer, chunk);
        out.narrow(0, chunk.row, chunk.n_tokens).copy_(prefill_attention(layer, chunk, in.q, q, k, v));
        append(layer, i, chunk, in.hidden, rows);
      }
    }
    if (!decode.empty()) decode_attention(layer, step, decode, q, out);
    return out.to(model().dtype);
  }

  int64_t channels() const { return model().kv_channels(); }

  // Keys as [T, channels] fp32, rotated (k W_G) and plain. One of the two comes from the projection, fused or not; the other costs
  // one transform: the exact parts attend on plain keys, codes are of rotated ones.
  std::pair<at::Tensor, at::Tensor> both_bases(const at::Tensor& k) const {
    const at::Tensor given = k.to(at::kFloat).contiguous().view({k.size(0), channels()});
    const at::Tensor other = given.clone();
    const bool given_rotated = !model().key_norm;
    const kernels::HadamardPlan& plan = layers_.front().key_hadamard;
    const int64_t n_rows = other.numel() / plan.n;
    float* data = other.data_ptr<float>();
    at::parallel_for(0, n_rows, std::max<int64_t>(1, (int64_t{1} << 15) / plan.n), [&](int64_t begin, int64_t end) {
      kernels::hadamard_rows(plan, /*inverse=*/given_rotated, data + begin * plan.n, end - begin, plan.n);
    });
    return given_rotated ? std::pair{given, other} : std::pair{other, given};
  }

  // A chunk's tokens, each [n_tokens][channels] fp32.
  struct Rows {
    const float* rotated;  // keys before RoPE, rotated
    const float* key;      // keys after RoPE
    const float* value;
  };

  // Sinks are copied by whoever changes them.
  void prepare_undo(int layer, const Chunk& chunk) {
    Exact& exact = exact_of(chunk);
    Undo undo;
    undo.exact = &exact;
    undo.layer = layer;
    if (chunk.n_tokens > 1) {
      undo.window = exact.window(layer);
    } else if (options_.recent > 0) {
      undo.slot = exact.slot(chunk.first);
      undo.key.resize(static_cast<size_t>(channels()));
      undo.value.resize(undo.key.size());
      exact.window(layer).read(undo.slot, undo.key.data(), undo.value.data());
    }
    undo_.push_back(std::move(undo));
  }

  // Sinks, then whatever leaves the window (or never enters it) to the pages, then the window.
  void append(int layer, size_t chunk_index, const Chunk& chunk, const at::Tensor& hidden, const Rows& rows) {
    update_sinks(layer, chunk, hidden, rows, options_.sink_select == SinkSelect::kRunning || chunk.is_prompt);
    store_leaving(layer, chunk, leaving_[chunk_index]);
    store_chunk(layer, chunk, std::max(chunk.first, chunk.sequence->stored_len), chunk.stored_len, rows);
    update_window(layer, chunk, rows);
  }

  void update_sinks(int layer, const Chunk& chunk, const at::Tensor& hidden, const Rows& rows, bool choose) {
    if (options_.sinks == 0 || !choose) return;
    LayerSinks& sinks = exact_of(chunk).sinks(layer);
    const at::Tensor own = hidden.narrow(0, chunk.row, chunk.n_tokens);
    if (!sinks.would_change(own)) return;
    undo_.back().sinks = sinks;
    sinks.update(own, chunk.first, rows.key, rows.value);
  }

  [[noreturn]] void throw_not_finite(int layer, const Chunk& chunk, int64_t first, int64_t end) const {
    throw_user_error(concat(spec().format, ": a key or value of layer ", layer, ", sequence ", chunk.seq, ", tokens ", first, " to ", end - 1,
                            " is NaN, infinite or beyond fp16"));
  }

  // Writes rows (of tokens first .. end - 1) to their pages, block by block on all threads.
  void store_rows(int layer, const Chunk& chunk, int64_t first, int64_t end, const float* rotated, const float* value) const {
    if (first >= end) return;
    const int64_t first_block = first / kTokenBlock;
    const int64_t end_block = (end + kTokenBlock - 1) / kTokenBlock;
    std::atomic<bool> finite{true};
    at::parallel_for(first_block, end_block, 4, [&](int64_t begin_block, int64_t stop_block) {
      for (int64_t block = begin_block; block < stop_block; ++block) {
        const int64_t low = std::max(first, block * kTokenBlock);
        const int64_t high = std::min(end, (block + 1) * kTokenBlock);
        RotateStoreParams params;
        params.layer = &layers_[layer];
        params.key = rotated + (low - first) * channels();
        params.value = value + (low - first) * channels();
        params.row_stride = channels();
        params.block = static_cast<int>(block % kBlocksPerPage);
        params.first = static_cast<int>(low % kTokenBlock);
        params.n_tokens = static_cast<int>(high - low);
        params.page = chunk.sequence->pages[layer][block / kBlocksPerPage]->bytes;
        if (!rotate_store(params)) finite = false;
      }
    });
    if (!finite) throw_not_finite(layer, chunk, first, end);
  }

  void store_chunk(int layer, const Chunk& chunk, int64_t first, int64_t end, const Rows& rows) const {
    const int64_t offset = (first - chunk.first) * channels();
    store_rows(layer, chunk, first, end, rows.rotated + offset, rows.value + offset);
  }

  struct Leaving {
    int64_t first = 0, end = 0;
    std::vector<float> cos, sin;  // [end - first][head_dim / 2], divided by the attention factor
  };

  void store_leaving(int layer, const Chunk& chunk, const Leaving& leaving) const {
    if (leaving.first >= leaving.end) return;
    const int64_t count = leaving.end - leaving.first;
    const int half = model().head_dim / 2;
    std::vector<float> key(static_cast<size_t>(count * channels()));
    std::vector<float> value(key.size());
    for (int64_t i = 0; i < count; ++i) {
      float* row = key.data() + i * channels();
      exact_of(chunk).window(layer).read(exact_of(chunk).slot(leaving.first + i), row, value.data() + i * channels());
      for (int head = 0; head < model().n_kv_heads; ++head) {
        float* low = row + head * model().head_dim;
        float* high = low + half;
        for (int pair = 0; pair < half; ++pair) {
          const float c = leaving.cos[i * half + pair];
          const float s = leaving.sin[i * half + pair];
          const float a = low[pair];
          const float b = high[pair];
          low[pair] = c * a + s * b;
          high[pair] = c * b - s * a;
        }
      }
    }
    const kernels::HadamardPlan& plan = layers_.front().key_hadamard;
    kernels::hadamard_rows(plan, /*inverse=*/false, key.data(), count * channels() / plan.n, plan.n);
    store_rows(layer, chunk, leaving.first, leaving.end, key.data(), value.data());
  }

  void update_window(int layer, const Chunk& chunk, const Rows& rows) const {
    Exact& exact = exact_of(chunk);
    for (int64_t position = std::max(chunk.first, chunk.stored_len); position < chunk.kv_len; ++position) {
      const int64_t offset = (position - chunk.first) * channels();
      if (!exact.window(layer).write(exact.slot(position), rows.key + offset, rows.value + offset))
        throw_not_finite(layer, chunk, position, position + 1);
    }
  }

  // ---- attention ------------------------------------------------------------------------------------------------------

  StoredTokens stored_tokens(int layer, const Chunk& chunk) {
    const RopeTables& tables = rope_tables(chunk.rope_len);
    const RotateLayer& rotate_layer = layers_[layer];
    const auto& pages = chunk.sequence->pages[layer];
    return {model().n_kv_heads, model().head_dim,
            [this, &tables, &rotate_layer, &pages](int64_t block, float* key, int64_t stride, float* value, int64_t value_head_stride) {
              std::vector<float> angles(static_cast<size_t>(model().head_dim) * kTokenBlock);
              float* cos = angles.data();
              float* sin = angles.data() + angles.size() / 2;
              tables.block(block, static_cast<float>(model().rope.attention_factor()), cos, sin);
              const RotatePageLayout& layout = rotate_layer.layout;
              for (int group = 0; group < layout.n_rotation_groups(); ++group)
                rotate_load({&rotate_layer, pages[block / kBlocksPerPage]->bytes, group, static_cast<int>(block % kBlocksPerPage), cos, sin,
                             key + int64_t{group} * layout.group_channels() * stride, stride,
                             value + int64_t{group} * layout.heads_per_group * value_head_stride, value_head_stride});
            }};
  }

  // Positions and slots of the tokens of a store that lie in first .. end - 1.
  static std::pair<std::vector<int64_t>, std::vector<int64_t>> sinks_between(const LayerSinks& sinks, int64_t first, int64_t end) {
    std::vector<int64_t> positions;
    std::vector<int64_t> slots;
    for (size_t slot = 0; slot < sinks.slots().size(); ++slot) {
      if (sinks.slots()[slot] < first || sinks.slots()[slot] >= end) continue;
      positions.push_back(sinks.slots()[slot]);
      slots.push_back(static_cast<int64_t>(slot));
    }
    return {positions, slots};
  }

  // The chunk sees itself exactly, the past as it is stored.
  at::Tensor prefill_attention(int layer, const Chunk& chunk, const at::Tensor& q_in, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v) {
    const auto own = [&](const at::Tensor& x) { return x.narrow(0, chunk.row, chunk.n_tokens); };
    const auto compute = [&](const at::Tensor& x) { return own(x).to(q_in.scalar_type()); };
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
    add_stored(attention, stored_tokens(layer, chunk), 0, stored, excluded, chunk.first, chunk.n_tokens, rep_, visible);
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

  void add_slots(ops::TileAttention& attention, const ExactStore& store, const std::vector<int64_t>& positions, const std::vector<int64_t>& slots,
                 int64_t first_query, int64_t n_queries, Visibility visible) const {
    if (positions.empty()) return;
    const auto [k_t, v] = store.load(slots);
    add_exact(attention, k_t, v, at::tensor(positions, at::kLong), first_query, n_queries, rep_, visible);
  }

  // Every query sees stored keys and values, its own too, but for sinks and, at distances below `recent`, exact ones.
  at::Tensor quantize_all_attention(int layer, const Chunk& chunk, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const int64_t n_tokens = chunk.n_tokens;
    const int64_t window = model().sliding_window;
    const auto own = [&](const at::Tensor& x) { return x.narrow(0, chunk.row, n_tokens); };
    // Exact means 16 bits, as the window has them.
    const at::Tensor k_t = own(k).to(at::kHalf).to(at::kFloat).permute({1, 2, 0});  // [n_kv_heads, head_dim, T]
    const at::Tensor v_heads = own(v).view({n_tokens, model().n_kv_heads, model().head_dim}).to(at::kHalf).to(at::kFloat).transpose(0, 1);
    const auto [sink_positions, sink_slots] = sinks_between(exact_of(chunk).sinks(layer), 0, n_tokens);
    std::vector<int64_t> excluded = sink_positions;
    std::sort(excluded.begin(), excluded.end());
    const StoredTokens tokens = stored_tokens(layer, chunk);
    const int64_t recent = options_.recent;
    const at::Tensor out = at::empty({n_tokens, model().n_heads, model().head_dim}, at::kFloat);
    for (int64_t first = 0; first < n_tokens; first += kTileTokens) {
      const int64_t count = std::min(kTileTokens, n_tokens - first);
      ops::TileAttention attention(ops::stack_query_heads(own(q).narrow(0, first, count), model().n_kv_heads));
      add_stored(attention, tokens, 0, n_tokens, excluded, first, count, rep_, {window, recent});
      add_slots(attention, exact_of(chunk).sinks(layer).store(), sink_positions, sink_slots, first, count, {window, recent});
      if (recent > 0) {
        const int64_t begin = std::max<int64_t>(0, first - recent + 1);
        const int64_t length = first + count - begin;
        add_exact(attention, k_t.narrow(2, begin, length), v_heads.narrow(1, begin, length), at::arange(begin, begin + length, at::kLong), first, count,
                  rep_, {window == 0 ? recent : std::min(window, recent), 0});
      }
      out.narrow(0, first, count).copy_(ops::unstack_query_heads(attention.finish(), count));
    }
    return out;
  }

  // What the decode of one sequence points to while the kernels run.
  struct DecodeTask {
    std::vector<const std::byte*> pages;
    std::vector<uint16_t> masks;
    std::vector<uint16_t> window_masks;
    std::vector<uint16_t> sink_masks;
    const float* q;  // [n_heads][head_dim], for exact keys
    std::vector<float> q_stored;  // the same with one more attention factor, for stored keys, whose RoPE has none; empty where it is 1
    const RopeTables* tables;
  };

  void decode_attention(int layer, const Step& step, const std::vector<size_t>& chunk_indices, const at::Tensor& q, const at::Tensor& out) {
    const RotateLayer& rotate_layer = layers_[layer];
    const RotatePageLayout& layout = rotate_layer.layout;
    const int head_dim = model().head_dim;
    const int64_t row_floats = int64_t{model().n_heads} * head_dim;
    std::vector<DecodeTask> tasks(chunk_indices.size());
    std::vector<SplitDecode::Item> items;
    for (size_t i = 0; i < tasks.size(); ++i) {
      const Chunk& chunk = step.chunks[chunk_indices[i]];
      DecodeTask& task = tasks[i];
      fill_task(layer, chunk, q.data_ptr<float>() + chunk.row * row_floats, task);
      const int group_heads = layout.heads_per_group * rep_;
      items.push_back({static_cast<int64_t>(task.pages.size()),
                       [this, &task, &rotate_layer, head_dim, group_heads](int group, int64_t begin, int64_t end, const kernels::SoftmaxState& state) {
                         const float* q_group = (task.q_stored.empty() ? task.q : task.q_stored.data()) + int64_t{group} * group_heads * head_dim;
                         rotate_decode({&rotate_layer,
                                        {task.pages.data() + begin, task.masks.data() + begin * kBlocksPerPage, static_cast<int>(end - begin)},
                                        group, rep_, q_group, task.tables->page_cos() + begin * head_dim / 2,
                                        task.tables->page_sin() + begin * head_dim / 2, task.tables->token_cos(), task.tables->token_sin(), state});
                       },
                       [this, layer, &chunk, &task](int group, const kernels::SoftmaxState& state) { decode_exact(layer, chunk, task, group, state); },
                       out.data_ptr<float>() + chunk.row * row_floats});
    }
    SplitDecode{layout.n_rotation_groups(), layout.heads_per_group * rep_, head_dim, int64_t{2} * kPageTokens * layout.group_channels()}.run(items);
  }

  void fill_task(int layer, const Chunk& chunk, const float* q, DecodeTask& task) {
    Exact& exact = exact_of(chunk);
    const int64_t oldest = model().sliding_window == 0 ? 0 : std::max<int64_t>(0, chunk.kv_len - model().sliding_window);
    const int64_t n_pages = (chunk.stored_len + kPageTokens - 1) / kPageTokens;
    for (int64_t page = 0; page < n_pages; ++page) task.pages.push_back(chunk.sequence->pages[layer][page]->bytes);
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
    const float factor = static_cast<float>(model().rope.attention_factor());
    if (factor != 1.0F) {
      const int64_t row_floats = int64_t{model().n_heads} * model().head_dim;
      task.q_stored.assign(q, q + row_floats);
      for (float& x : task.q_stored) x *= factor;
    }
    task.tables = &rope_tables(chunk.rope_len);
  }

  void decode_exact(int layer, const Chunk& chunk, const DecodeTask& task, int group, const kernels::SoftmaxState& state) const {
    const int head_dim = model().head_dim;
    const int heads_per_group = layers_[layer].layout.heads_per_group;
    const auto attend = [&](const ExactStore& store, const std::vector<uint16_t>& masks) {
      if (masks.empty()) return;
      const std::byte* page = store.page();
      for (int head = 0; head < heads_per_group; ++head) {
        const int kv_head = group * heads_per_group + head;
        const kernels::SoftmaxState part{state.max + head * rep_, state.sum + head * rep_, state.acc + int64_t{head} * rep_ * head_dim};
        kernels::decode_plain({store.layout(), {&page, masks.data(), 1}, kv_head, rep_, task.q + int64_t{kv_head} * rep_ * head_dim, part});
      }
    };
    attend(exact_of(chunk).window(layer), task.window_masks);
    attend(exact_of(chunk).sinks(layer).store(), task.sink_masks);
  }

  RotateOptions options_;
  std::vector<std::vector<uint16_t>> key_groups_;
  std::vector<RotateLayer> layers_;
  int rep_;
  std::map<int64_t, RopeTables> tables_;
  std::vector<Undo> undo_;         // of the open step
  std::vector<Leaving> leaving_;   // of the open step, by chunk
};

}  // namespace

std::unique_ptr<KvCache> make_rotate_cache(const KvSpec& spec, const KvModel& model, const RotateOptions& options,
                                           std::vector<std::vector<uint16_t>> key_groups) {
  return std::make_unique<RotateCache>(spec, model, options, rotate_layout(options, model), std::move(key_groups));
}

}  // namespace rotunda::kv::rotate
