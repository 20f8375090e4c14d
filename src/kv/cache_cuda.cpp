#include "kv/cache_cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/attention/exact_tokens_cuda.h"
#include "kernels/attention/store_pair.h"
#include "kv/exact_places_cuda.h"
#include "kv/page_memory_cuda.h"
#include "kv/paged_cache.h"
#include "kv/stored_attention.h"
#include "ops/launch_cuda.h"

namespace rotunda::kv {

namespace {

using ops::check_launch;
using ops::current_stream;
using ops::element_type;
using ops::on_gpu;

using kernels::kTokenBlock;
using kernels::StorePair;

constexpr int64_t kPairTokens = 32;
// Queries of a tile where attention is not LibTorch's flash kernel, and keys: scores stay within some hundred megabytes.
constexpr int64_t kQueryTile = 512;
constexpr int64_t kKeyTile = 4096;

class CacheCuda final : public PagedCache {
 public:
  CacheCuda(const KvSpec& spec, const KvModel& model, const std::optional<ExactOptions>& exact, std::unique_ptr<PageCodecCuda> codec,
            std::unique_ptr<PageMemoryCuda> memory, std::byte* pool_base)
      : PagedCache(spec, model, codec->layer_bytes(), codec->codes_bytes_per_token(), codec->scale_bytes_per_token(), std::move(memory)),
        pool_base_(pool_base),
        windowed_(exact.has_value()),
        exact_(exact.value_or(ExactOptions{.recent = 0, .sinks = 0})),
        codec_(std::move(codec)),
        places_(std::make_shared<ExactPlacesCuda>(model, exact_)),
        refused_(at::zeros({model.n_layers}, on_gpu(at::kInt))) {
    ROTUNDA_ASSERT(layer_page_bytes() == codec_->layer_bytes(), "layer_bytes ", codec_->layer_bytes(), " is no multiple of 64");
    kernels::PagedDecode shape;
    shape.n_q = rep();
    shape.head_dim = model.head_dim;
    decodes_ = codec_->has_decode();
    if (decodes_) grid_ = codec_->decode_grid(shape);
  }

  bool wants_hidden() const override { return exact_.sinks > 0; }

  uint64_t graph_epoch() const override {
    // A step that makes sinks launches other kernels than the rest; where that is seldom it is not worth a graph.
    const bool usual = !decode_.changes_sinks || exact_.sink_select == SinkSelect::kRunning;
    if (!decodes_ || !usual || decode_.rows == 0 || !decode_.only) return 0;
    return (places_->epoch() << 32) + 2 * tables_epoch_ + (decode_.changes_sinks ? 2 : 1);
  }

  void check_step() override {
    const at::Tensor refused = refused_.cpu();
    for (int layer = 0; layer < model().n_layers; ++layer) {
      if (refused.const_data_ptr<int32_t>()[layer] == 0) continue;
      refused_.zero_();
      throw_user_error(concat(spec().format, ": a key or value of layer ", model().layer_id(layer),
                              " is NaN, infinite or beyond the format's range"));
    }
  }

 private:
  // ---- what a sequence has beside its pages ------------------------------------------------------------------------

  class Place final : public PagedCacheExtra {
   public:
    /// @param windowed whether there is anything to save
    Place(std::shared_ptr<ExactPlacesCuda> places, bool windowed, int64_t window_slots)
        : places_(std::move(places)), windowed_(windowed), number_(places_->take()), rope_lens_(static_cast<size_t>(window_slots)) {}
    Place(const Place& other)
        : places_(other.places_), windowed_(other.windowed_), number_(places_->copy(other.number_)), rope_lens_(other.rope_lens_) {}
    Place& operator=(const Place&) = delete;
    ~Place() override { places_->give_back(number_); }

    std::unique_ptr<PagedCacheExtra> clone() const override { return std::make_unique<Place>(*this); }
    void truncate(int64_t kv_len) override { places_->truncate(number_, kv_len); }
    void add_usage(KvUsage& usage) const override {
      usage.window_bytes += places_->window_bytes();
      usage.sink_bytes += places_->sink_bytes();
    }
    void export_to(ops::TensorBundle& bundle) const override {
      if (!windowed_) return;
      bundle.tensors["window_rope_lens"] = at::tensor(rope_lens_, at::kLong);
      places_->export_to(number_, bundle.meta_int("rotunda.stored_len"), bundle.meta_int("rotunda.kv_len"), bundle);
    }
    void import_from(const ops::TensorBundle& bundle, int64_t kv_len) override {
      if (!windowed_) return;
      const int64_t n_slots = static_cast<int64_t>(rope_lens_.size());
      const at::Tensor lens = bundle.get("window_rope_lens", at::kLong, {n_slots}).contiguous();
      rope_lens_.assign(lens.const_data_ptr<int64_t>(), lens.const_data_ptr<int64_t>() + n_slots);
      places_->import_from(number_, bundle, bundle.meta_int("rotunda.stored_len"), kv_len);
    }

    int64_t number() const { return number_; }
    /// The sequence length that a window token's RoPE was reckoned with.
    int64_t& rope_len(int64_t position) { return rope_lens_[static_cast<size_t>(position) % rope_lens_.size()]; }

   private:
    std::shared_ptr<ExactPlacesCuda> places_;
    bool windowed_;
    int64_t number_;
    std::vector<int64_t> rope_lens_;
  };

  // ---- a step ------------------------------------------------------------------------------------------------------

  /// What the kernels read of a step's chunks of one token, on the GPU at addresses that stay.
  struct Decode {
    int rows = 0;               ///< chunks of one token
    bool only = false;          ///< all chunks are, so rows are the step's
    bool changes_sinks = false;
    bool leaves = false;        ///< there is a window, so a token may go from it to pages
    at::Tensor index;           ///< [rows] int64 which of the step's tokens they are; undefined where `only`
    int64_t stride = 0;         ///< of the block table
    // Into tables_, all int32 or fp32 there.
    const int32_t *place, *position, *stored_len, *first_token, *choose, *units_before, *block_table, *leaving;
    at::Tensor pairs, leaving_pairs;          ///< [rows, 4] int32
    at::Tensor cos, sin, leaving_cos, leaving_sin;  ///< [rows, head_dim / 2] fp32
    at::Tensor positions, leaving_positions;         ///< [rows] int32
  };

  /// The same of a chunk of several tokens.
  struct Prefill {
    const Chunk* chunk;
    at::Tensor cos, sin;            ///< [n_tokens, head_dim / 2] fp32
    at::Tensor table;               ///< [pages] int32, of what is in pages before the step (quantize-all, one token: after it)
    at::Tensor past_cos, past_sin, past_positions;  ///< of the tokens of these pages
    at::Tensor positions;  ///< [n_tokens] int64
    at::Tensor leaving_places, leaving_positions, leaving_pairs, leaving_cos, leaving_sin;
    at::Tensor new_pairs;           ///< of the chunk's own tokens that go to pages
    int64_t n_leaving = 0;
    int64_t first_new = 0;          ///< the first of its own tokens that does
    int64_t end_new = 0;
  };

  static Place& place_of(const Chunk& chunk) { return static_cast<Place&>(*chunk.sequence->extra); }
  int rep() const { return model().n_heads / model().n_kv_heads; }
  int64_t channels() const { return model().kv_channels(); }
  bool has_window() const { return exact_.recent > 0; }
  /// Whether tokens of the chunk may become sinks by the layer's input.
  bool chooses_sinks(const Chunk& chunk) const {
    return exact_.sinks > 0 && (exact_.sink_select == SinkSelect::kRunning || chunk.is_prompt);
  }
  PagesCuda pages() const { return {pool_base_, model().n_layers * layer_page_bytes()}; }
  int32_t page_number(const Page* page) const { return static_cast<int32_t>((page->bytes - pool_base_) / (model().n_layers * layer_page_bytes())); }

  int64_t stored_len_after(const Sequence& sequence, int64_t kv_len) const override {
    return std::max(sequence.stored_len, kv_len - exact_.recent);
  }
  std::unique_ptr<PagedCacheExtra> make_extra() const override {
    return std::make_unique<Place>(places_, windowed_, (exact_.recent + kTokenBlock - 1) / kTokenBlock * kTokenBlock);
  }
  std::map<std::string, std::string> saved_settings() const override {
    auto settings = codec_->saved_settings();
    if (windowed_) {
      settings["rotunda.recent"] = std::to_string(exact_.recent);
      if (exact_.n_first > 0) settings["rotunda.n_first"] = std::to_string(exact_.n_first);
    }
    return settings;
  }

  void on_begin_step(const Step& step) override {
    saved_.clear();
    prefills_.clear();
    decode_ = {};
    std::vector<const Chunk*> singles;
    std::vector<int64_t> rows;
    for (const Chunk& chunk : step.chunks) {
      places_->reserve_tokens(chunk.kv_len);
      const bool single = decodes_ && step.kind == StepKind::kGenerate && chunk.n_tokens == 1;
      if (single) singles.push_back(&chunk), rows.push_back(chunk.row);
      if (!single) prefills_.push_back(prepare_prefill(step, chunk));
    }
    for (const Chunk& chunk : step.chunks) {
      if (chunk.n_tokens > 1 || chooses_sinks(chunk) || chunk.first < exact_.n_first || !decodes_)
        saved_.push_back(places_->save(place_of(chunk).number(), chunk.n_tokens > 1 || !decodes_));
    }
    if (!singles.empty()) prepare_decode(step, singles, rows);
  }

  void on_end_step(const Step& step) override {
    check_step();
    saved_.clear();
    if (!has_window()) return;
    for (const Chunk& chunk : step.chunks)
      for (int64_t position = std::max(chunk.first, chunk.stored_len); position < chunk.kv_len; ++position)
        place_of(chunk).rope_len(position) = chunk.rope_len;
  }

  void on_abort_step(const Step&) override {
    for (const ExactPlacesCuda::Saved& saved : saved_) places_->restore(saved);
    saved_.clear();
    refused_.zero_();
    // Who goes on may do so on another stream, and the tables on the host are about to be written again.
    c10::cuda::getCurrentCUDAStream().synchronize();
  }

  // Tokens first .. end - 1 by pairs of blocks; the first has row `row`.
  std::vector<StorePair> store_pairs(const Chunk& chunk, int64_t first, int64_t end, int64_t row) const {
    std::vector<StorePair> made;
    for (int64_t low = first; low < end;) {
      const int64_t high = std::min(end, (low / kPairTokens + 1) * kPairTokens);
      const uint32_t tokens = (high - low == kPairTokens ? ~0U : (1U << (high - low)) - 1U) << (low % kPairTokens);
      made.push_back({page_number(chunk.sequence->pages[static_cast<size_t>(low / kPageTokens)]),
                      static_cast<int32_t>(low % kPageTokens / kPairTokens), static_cast<int32_t>(row + low - first), tokens});
      low = high;
    }
    return made;
  }

  static at::Tensor to_gpu(const std::vector<StorePair>& pairs) {
    const at::Tensor host = at::empty({static_cast<int64_t>(pairs.size()), 4}, at::kInt);
    static_assert(sizeof(StorePair) == 16);
    if (!pairs.empty()) std::memcpy(host.mutable_data_ptr<int32_t>(), pairs.data(), pairs.size() * sizeof(StorePair));
    return host.to(at::kCUDA);
  }

  // ---- chunks of several tokens ------------------------------------------------------------------------------------

  Prefill prepare_prefill(const Step& step, const Chunk& chunk) {
    Prefill made;
    made.chunk = &chunk;
    made.cos = step.cos.narrow(0, chunk.row, chunk.n_tokens).to(at::kCUDA);
    made.sin = step.sin.narrow(0, chunk.row, chunk.n_tokens).to(at::kCUDA);
    const bool all = step.kind == StepKind::kQuantizeAll;
    // One token alone is appended before it looks around, as a decode kernel has it.
    const int64_t in_pages = all ? chunk.kv_len : chunk.n_tokens == 1 ? chunk.stored_len : chunk.sequence->stored_len;
    const int64_t n_pages = (in_pages + kPageTokens - 1) / kPageTokens;
    std::vector<int32_t> numbers;
    for (int64_t i = 0; i < n_pages; ++i) numbers.push_back(page_number(chunk.sequence->pages[static_cast<size_t>(i)]));
    made.table = at::tensor(numbers, at::kInt).to(at::kCUDA);
    made.positions = at::arange(chunk.first, chunk.kv_len, on_gpu(at::kLong));
    made.past_positions = at::arange(n_pages * kPageTokens, on_gpu(at::kLong));
    if (n_pages > 0) std::tie(made.past_cos, made.past_sin) = model().rope.cos_sin(made.past_positions, chunk.rope_len);

    made.first_new = all ? 0 : std::max(chunk.first, chunk.sequence->stored_len);
    made.end_new = std::max(made.first_new, all ? chunk.kv_len : chunk.stored_len);
    made.new_pairs = to_gpu(store_pairs(chunk, made.first_new, made.end_new, 0));
    const int64_t leaving_end = all ? 0 : std::min(chunk.stored_len, chunk.first);
    made.n_leaving = std::max<int64_t>(0, leaving_end - chunk.sequence->stored_len);
    if (made.n_leaving > 0) {
      const int64_t first = chunk.sequence->stored_len;
      made.leaving_pairs = to_gpu(store_pairs(chunk, first, leaving_end, 0));
      made.leaving_positions = at::arange(first, leaving_end, on_gpu(at::kInt));
      made.leaving_places = at::full({made.n_leaving}, place_of(chunk).number(), on_gpu(at::kInt));
      std::tie(made.leaving_cos, made.leaving_sin) = window_angles(chunk, first, leaving_end);
    }
    return made;
  }

  // What tokens of the window were turned by: each by the length of its own step, which only `dynamic` RoPE looks at.
  std::pair<at::Tensor, at::Tensor> window_angles(const Chunk& chunk, int64_t first, int64_t end) const {
    std::vector<int64_t> positions, rope_lens;
    for (int64_t position = first; position < end; ++position) {
      positions.push_back(position);
      rope_lens.push_back(place_of(chunk).rope_len(position));
    }
    const auto [cos, sin] = angles_at(positions, rope_lens);
    return {cos.to(at::kCUDA), sin.to(at::kCUDA)};
  }

  at::Tensor attend_layer(int layer, const Step& step, const AttendInput& in) override {
    if (decode_.only) return attend_decode(layer, in.q, in.k, in.v, in.hidden);
    const at::Tensor out = at::empty({step.n_tokens, model().n_heads, model().head_dim}, on_gpu(model().dtype));
    for (const Prefill& prefill : prefills_) {
      const Chunk& chunk = *prefill.chunk;
      const auto own = [&](const at::Tensor& x) { return x.narrow(0, chunk.row, chunk.n_tokens); };
      const at::Tensor k = ops::apply_rope(codec_->before_rope(own(in.k)).to(at::kFloat), prefill.cos, prefill.sin).contiguous();
      const at::Tensor v = own(in.v).to(at::kFloat).contiguous();
      const at::Tensor q = ops::apply_rope(own(in.q).to(at::kFloat), prefill.cos, prefill.sin);
      const at::Tensor hidden = in.hidden.defined() ? own(in.hidden) : in.hidden;
      if (step.kind == StepKind::kQuantizeAll) {
        append(layer, prefill, hidden, k, v);
        out.narrow(0, chunk.row, chunk.n_tokens).copy_(quantize_all_attention(layer, prefill, q, k, v));
      } else if (chunk.n_tokens == 1) {
        append(layer, prefill, hidden, k, v);
        const auto [keys, values] = past(layer, prefill, chunk.kv_len, chunk.stored_len, model().dtype);
        out.narrow(0, chunk.row, 1).copy_(causal_attention(q, keys.transpose(0, 1), values.transpose(0, 1)));
      } else {
        out.narrow(0, chunk.row, chunk.n_tokens).copy_(prefill_attention(layer, prefill, q, k, v));
        append(layer, prefill, hidden, k, v);
      }
    }
    if (decode_.rows > 0) {
      const auto own = [&](const at::Tensor& x) { return x.defined() ? x.index_select(0, decode_.index) : x; };
      out.index_copy_(0, decode_.index, attend_decode(layer, own(in.q), own(in.k), own(in.v), own(in.hidden)));
    }
    return out;
  }

  // Sinks, then whatever leaves the window (or never enters it) to the pages, then the window.
  void append(int layer, const Prefill& prefill, const at::Tensor& hidden, const at::Tensor& k, const at::Tensor& v) {
    const Chunk& chunk = *prefill.chunk;
    const kernels::ExactTokens exact = places_->view();
    const int place = static_cast<int>(place_of(chunk).number());
    update_sinks(layer, chunk, hidden, k, v);
    const at::Tensor refused = refused_.narrow(0, layer, 1);
    const auto store = [&](const at::Tensor& key, const at::Tensor& value, const at::Tensor& pairs, const at::Tensor& cos, const at::Tensor& sin,
                           const at::Tensor& positions) {
      const at::Tensor rows = key.view({1, -1, model().n_kv_heads, model().head_dim});
      codec_->store(layer, codec_->packable(layer, rows, cos, sin, positions), value.view({1, -1, channels()}), pairs, pages(), refused);
    };
    if (prefill.n_leaving > 0) {
      const at::Tensor key = at::empty({prefill.n_leaving, channels()}, on_gpu(at::kFloat));
      const at::Tensor value = at::empty_like(key);
      check_launch(kernels::read_window_cuda(exact, layer, 1, prefill.leaving_places.const_data_ptr<int32_t>(),
                                             prefill.leaving_positions.const_data_ptr<int32_t>(), static_cast<int>(prefill.n_leaving),
                                             key.mutable_data_ptr<float>(), value.mutable_data_ptr<float>(), current_stream()),
                   "read_window");
      store(key, value, prefill.leaving_pairs, prefill.leaving_cos, prefill.leaving_sin, prefill.leaving_positions);
    }
    if (prefill.first_new < prefill.end_new) {
      const int64_t from = prefill.first_new - chunk.first;
      const int64_t count = prefill.end_new - prefill.first_new;
      store(k.narrow(0, from, count), v.narrow(0, from, count), prefill.new_pairs, prefill.cos.narrow(0, from, count),
            prefill.sin.narrow(0, from, count), prefill.positions.narrow(0, from, count));
    }
    if (!has_window()) return;
    const int64_t first = std::max(chunk.first, chunk.stored_len);
    const int64_t offset = (first - chunk.first) * channels();
    check_launch(kernels::write_window_cuda(exact, layer, place, first, chunk.kv_len - first, k.const_data_ptr<float>() + offset,
                                            v.const_data_ptr<float>() + offset, refused.mutable_data_ptr<int32_t>(), current_stream()),
                 "write_window");
  }

  void update_sinks(int layer, const Chunk& chunk, const at::Tensor& hidden, const at::Tensor& k, const at::Tensor& v) {
    const bool choose = chooses_sinks(chunk);
    if (!choose && chunk.first >= exact_.n_first) return;
    const int64_t place = place_of(chunk).number();
    const at::Tensor entries = places_->entries()[place][layer];
    if (choose) {
      // As LayerSinks::choose: any of the n largest entries belongs to one of the n tokens with the largest maxima.
      const at::Tensor running = places_->magnitudes()[place][layer];
      const auto [low, high] = at::aminmax(hidden, /*dim=*/1);
      const at::Tensor candidates = std::get<1>(at::maximum(high, -low).topk(std::min<int64_t>(exact_.sinks, chunk.n_tokens)));
      const at::Tensor flat = hidden.index_select(0, candidates).abs().to(at::kFloat).flatten();
      const auto [values, indices] = flat.topk(std::min<int64_t>(exact_.sinks, flat.numel()));
      const at::Tensor positions = candidates.index_select(0, indices.div(hidden.size(1), "floor")) + chunk.first;
      const auto [sorted, order] = at::cat({running, values}).sort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
      entries.copy_(at::cat({entries, positions}).index_select(0, order.narrow(0, 0, exact_.sinks)));
      running.copy_(sorted.narrow(0, 0, exact_.sinks));
    }
    check_launch(kernels::update_sinks_cuda(places_->view(), layer, static_cast<int>(place), entries.const_data_ptr<int64_t>(), exact_.sinks,
                                            exact_.n_first, chunk.first, chunk.n_tokens, k.const_data_ptr<float>(), v.const_data_ptr<float>(),
                                            refused_.mutable_data_ptr<int32_t>() + layer, current_stream()),
                 "update_sinks");
  }

  /// Keys after RoPE and values of positions 0 .. n - 1 as the cache has them, exact tokens exact: [n_kv_heads, n, head_dim] each.
  /// @param window_first window tokens from here on stand for those of pages; n: none do
  std::pair<at::Tensor, at::Tensor> past(int layer, const Prefill& prefill, int64_t n, int64_t window_first, at::ScalarType dtype) const {
    const int64_t rows = std::max<int64_t>(prefill.table.size(0) * kPageTokens, n);
    at::Tensor k, v;
    if (prefill.table.size(0) > 0) std::tie(k, v) = codec_->load(layer, pages(), prefill.table, prefill.past_cos, prefill.past_sin, prefill.past_positions, dtype);
    const auto padded = [&](const at::Tensor& x) {
      const at::Tensor whole = at::empty({model().n_kv_heads, rows, model().head_dim}, on_gpu(dtype));
      if (x.defined()) whole.narrow(1, 0, x.size(1)).copy_(x);
      return whole;
    };
    if (!k.defined() || k.size(1) < rows) k = padded(k), v = padded(v);
    check_launch(kernels::overlay_exact_cuda(places_->view(), layer, static_cast<int>(place_of(*prefill.chunk).number()), window_first, n,
                                             k.mutable_data_ptr(), v.mutable_data_ptr(), rows, element_type(dtype), current_stream()),
                 "overlay_exact");
    return {k.narrow(1, 0, n), v.narrow(1, 0, n)};
  }

  // The chunk sees itself exactly, the past as it is stored. @return [n_tokens, n_heads, head_dim]
  at::Tensor prefill_attention(int layer, const Prefill& prefill, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
    const Chunk& chunk = *prefill.chunk;
    const at::ScalarType dtype = model().dtype;
    const auto whole = [&](const at::Tensor& old, const at::Tensor& own) {  // [first + n_tokens, n_kv_heads, head_dim]
      const at::Tensor now = codec_->within_chunk(own.view({chunk.n_tokens, model().n_kv_heads, model().head_dim})).to(dtype);
      return old.defined() ? at::cat({old.transpose(0, 1), now}) : now;
    };
    at::Tensor old_k, old_v;
    if (chunk.first > 0) std::tie(old_k, old_v) = past(layer, prefill, chunk.first, chunk.sequence->stored_len, dtype);
    return causal_attention(q, whole(old_k, k), whole(old_v, v));
  }

  // The last query sees the last key. @param q [n, n_heads, head_dim] fp32   @param keys, values [T, n_kv_heads, head_dim] in the model's dtype
  at::Tensor causal_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values) const {
    const at::ScalarType dtype = model().dtype;
    const int64_t window = model().sliding_window;
    if (dtype != at::kFloat && model().head_dim % 8 == 0 && model().head_dim <= 256) {
      const auto [left, right] = window > 0 ? std::pair<std::optional<int64_t>, std::optional<int64_t>>(window - 1, 0)
                                            : std::pair<std::optional<int64_t>, std::optional<int64_t>>();
      return std::get<0>(at::_flash_attention_forward(q.to(dtype).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), std::nullopt, std::nullopt,
                                                      q.size(0), keys.size(0), /*dropout_p=*/0.0, /*is_causal=*/true,
                                                      /*return_debug_mask=*/false, std::optional<double>(model().softmax_scale), left, right))
          .squeeze(0);
    }
    return tiled_attention(q, keys.size(0) - q.size(0), [&](ops::TileAttention& attention, int64_t first, int64_t count) {
      add_tiles(attention, keys.transpose(0, 1), values.transpose(0, 1), first, count, {window, 0});
    });
  }

  // Every query sees stored keys and values, its own too, but for sinks and, at distances below `recent`, exact ones.
  at::Tensor quantize_all_attention(int layer, const Prefill& prefill, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
    const int64_t n = prefill.chunk->n_tokens;
    const int64_t window = model().sliding_window;
    const int64_t recent = exact_.recent;
    const auto [stored_k, stored_v] = past(layer, prefill, n, n, at::kFloat);
    // Exact means 16 bits, as the window has them.
    const auto exact = [&](const at::Tensor& x) {
      return x.view({n, model().n_kv_heads, model().head_dim}).to(at::kHalf).to(at::kFloat).transpose(0, 1);
    };
    const at::Tensor exact_k = exact(k);
    const at::Tensor exact_v = exact(v);
    return tiled_attention(q, 0, [&, stored_k = stored_k, stored_v = stored_v](ops::TileAttention& attention, int64_t first, int64_t count) {
      add_tiles(attention, stored_k, stored_v, first, count, {window, recent});
      if (recent > 0) add_tiles(attention, exact_k, exact_v, first, count, {window == 0 ? recent : std::min(window, recent), 0});
    });
  }

  /// Attention of q [n, n_heads, head_dim] fp32 (positions from `position` on) tile by tile of queries.
  /// @param add (attention, first, count): adds keys and values for queries at positions first .. first + count - 1
  template <typename Add>
  at::Tensor tiled_attention(const at::Tensor& q, int64_t position, const Add& add) const {
    std::vector<at::Tensor> outs;
    for (int64_t first = 0; first < q.size(0); first += kQueryTile) {
      const int64_t count = std::min(kQueryTile, q.size(0) - first);
      ops::TileAttention attention(ops::stack_query_heads(q.narrow(0, first, count) * model().softmax_scale, model().n_kv_heads));
      add(attention, position + first, count);
      outs.push_back(ops::unstack_query_heads(attention.finish(), count));
    }
    return at::cat(outs);
  }

  /// @param k, v [n_kv_heads, T, head_dim] of positions 0 .. T - 1
  void add_tiles(ops::TileAttention& attention, const at::Tensor& k, const at::Tensor& v, int64_t first_query, int64_t n_queries,
                 Visibility visible) const {
    const int64_t end = std::min(k.size(1), first_query + n_queries - visible.lag);
    const int64_t begin = visible.window == 0 ? 0 : std::max<int64_t>(0, first_query - visible.window + 1);
    for (int64_t tile = begin; tile < end; tile += kKeyTile) {
      const int64_t count = std::min(kKeyTile, end - tile);
      attention.add(k.narrow(1, tile, count).to(at::kFloat).transpose(1, 2), v.narrow(1, tile, count).to(at::kFloat),
                    visibility_mask(tile, count, first_query, n_queries, rep(), visible, k.device()));
    }
  }

  // ---- chunks of one token -----------------------------------------------------------------------------------------

  /// Numbers of one step on the host, sent to the GPU in one piece.
  class TableWriter {
   public:
    int64_t add(int64_t n) {
      const int64_t at = static_cast<int64_t>(words_.size());
      words_.resize(static_cast<size_t>(at + (n + 3) / 4 * 4));  // 16-byte pieces
      return at;
    }
    int32_t* at(int64_t place) { return words_.data() + place; }
    const std::vector<int32_t>& words() const { return words_; }

   private:
    std::vector<int32_t> words_;
  };

  void prepare_decode(const Step& step, const std::vector<const Chunk*>& chunks, const std::vector<int64_t>& rows) {
    const int n = static_cast<int>(chunks.size());
    const int64_t half = model().head_dim / 2;
    int64_t most_pages = 1;
    for (const Chunk* chunk : chunks) most_pages = std::max<int64_t>(most_pages, static_cast<int64_t>(chunk->sequence->pages.size()));
    // The stride changes seldom, because it is part of a captured graph.
    while (table_stride_ < most_pages) table_stride_ *= 2, ++tables_epoch_;

    TableWriter writer;
    const int64_t place = writer.add(n), position = writer.add(n), stored = writer.add(n), first_token = writer.add(n), choose = writer.add(n);
    const int64_t units = writer.add(n + 1), leaving = writer.add(n), pairs = writer.add(4 * n), leaving_pairs = writer.add(4 * n);
    const int64_t cos = writer.add(n * half), sin = writer.add(n * half), leaving_cos = writer.add(n * half), leaving_sin = writer.add(n * half);
    const int64_t table = writer.add(n * table_stride_);
    const int exact_blocks = places_->view().window_blocks + places_->view().sink_blocks;
    decode_ = {};
    std::vector<int64_t> leaving_rows, leaving_positions, leaving_rope_lens;
    const auto put_angles = [&](const at::Tensor& from, int64_t from_row, int64_t to, int64_t to_row) {
      std::memcpy(writer.at(to) + to_row * half, from.const_data_ptr<float>() + from_row * half, static_cast<size_t>(half) * sizeof(float));
    };
    for (int i = 0; i < n; ++i) {
      const Chunk& chunk = *chunks[static_cast<size_t>(i)];
      writer.at(place)[i] = static_cast<int32_t>(place_of(chunk).number());
      writer.at(position)[i] = static_cast<int32_t>(chunk.first);
      writer.at(stored)[i] = static_cast<int32_t>(chunk.stored_len);
      writer.at(first_token)[i] =
          model().sliding_window == 0 ? 0 : static_cast<int32_t>(std::max<int64_t>(0, chunk.kv_len - model().sliding_window));
      writer.at(choose)[i] = chooses_sinks(chunk);
      writer.at(units)[i + 1] = writer.at(units)[i] + kernels::paged_decode_units(chunk.stored_len, codec_->unit_tokens(), exact_blocks,
                                                                                           writer.at(first_token)[i]);
      decode_.changes_sinks = decode_.changes_sinks || chooses_sinks(chunk) || chunk.first < exact_.n_first;
      for (size_t page = 0; page < chunk.sequence->pages.size(); ++page)
        writer.at(table)[i * table_stride_ + static_cast<int64_t>(page)] = page_number(chunk.sequence->pages[page]);
      put_angles(step.cos, chunk.row, cos, i);
      put_angles(step.sin, chunk.row, sin, i);
      const auto put_pair = [&](int64_t token, bool there, int64_t to) {
        StorePair pair{0, 0, i, 0};
        if (there) pair = store_pairs(chunk, token, token + 1, i).front();
        std::memcpy(writer.at(to) + 4 * i, &pair, sizeof(pair));
      };
      // The token that leaves the window, or without a window the new one, goes to a page.
      const bool leaves = has_window() && chunk.sequence->stored_len < std::min(chunk.stored_len, chunk.first);
      writer.at(leaving)[i] = leaves ? static_cast<int32_t>(chunk.sequence->stored_len) : -1;
      put_pair(chunk.sequence->stored_len, leaves, leaving_pairs);
      put_pair(chunk.first, chunk.stored_len > chunk.first, pairs);
      if (leaves) {
        leaving_rows.push_back(i);
        leaving_positions.push_back(chunk.sequence->stored_len);
        leaving_rope_lens.push_back(place_of(chunk).rope_len(chunk.sequence->stored_len));
      }
    }
    if (!leaving_rows.empty()) {
      const auto [c, s] = angles_at(leaving_positions, leaving_rope_lens);
      for (size_t k = 0; k < leaving_rows.size(); ++k) {
        put_angles(c, static_cast<int64_t>(k), leaving_cos, leaving_rows[k]);
        put_angles(s, static_cast<int64_t>(k), leaving_sin, leaving_rows[k]);
      }
    }
    const int64_t n_words = static_cast<int64_t>(writer.words().size());
    if (!tables_.defined() || tables_.size(0) < n_words) {
      tables_ = at::empty({2 * n_words}, on_gpu(at::kInt));
      host_tables_ = at::empty({2 * n_words}, at::TensorOptions().dtype(at::kInt).pinned_memory(true));
      ++tables_epoch_;
    }
    std::memcpy(host_tables_.mutable_data_ptr<int32_t>(), writer.words().data(), writer.words().size() * sizeof(int32_t));
    tables_.narrow(0, 0, n_words).copy_(host_tables_.narrow(0, 0, n_words), /*non_blocking=*/true);

    const int32_t* const base = tables_.const_data_ptr<int32_t>();
    decode_.rows = n;
    decode_.only = static_cast<size_t>(n) == step.chunks.size();
    if (!decode_.only) decode_.index = at::tensor(rows, at::kLong).to(at::kCUDA);
    decode_.leaves = has_window();
    decode_.stride = table_stride_;
    decode_.place = base + place, decode_.position = base + position, decode_.stored_len = base + stored;
    decode_.first_token = base + first_token, decode_.choose = base + choose, decode_.units_before = base + units;
    decode_.block_table = base + table, decode_.leaving = base + leaving;
    decode_.pairs = tables_.narrow(0, pairs, 4 * n).view({n, 4});
    decode_.leaving_pairs = tables_.narrow(0, leaving_pairs, 4 * n).view({n, 4});
    decode_.positions = tables_.narrow(0, position, n);
    decode_.leaving_positions = tables_.narrow(0, leaving, n);
    const auto floats = [&](int64_t at) { return tables_.narrow(0, at, n * half).view(at::kFloat).view({n, half}); };
    decode_.cos = floats(cos), decode_.sin = floats(sin), decode_.leaving_cos = floats(leaving_cos), decode_.leaving_sin = floats(leaving_sin);
    codec_->prepare_decode(grid_, n, static_cast<int>(table_stride_));
    at::Tensor& workspace = workspaces_[n];
    if (!workspace.defined())
      workspace = at::zeros({kernels::paged_decode_workspace_bytes(grid_, n, model().n_kv_heads, rep(), model().head_dim)}, on_gpu(at::kByte));
  }

  /// @return [rows, n_heads, head_dim] in the model's dtype
  at::Tensor attend_decode(int layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& hidden) {
    if (layer == 0 && decode_.leaves) store_leaving();
    const int n = decode_.rows;
    const kernels::ExactTokens exact = places_->view();
    const int exact_blocks = exact.window_blocks + exact.sink_blocks;
    const at::Tensor keys = codec_->before_rope(k);
    const auto by_rows = [](const at::Tensor& x) { return x.stride(2) == 1 && x.stride(1) == x.size(2) ? x : x.contiguous(); };
    const at::Tensor q_rows = by_rows(q), k_rows = by_rows(keys), v_rows = by_rows(v);
    const at::Tensor q_turned = at::empty({n, model().n_heads, model().head_dim}, on_gpu(at::kFloat));
    const at::Tensor masks = at::empty({n, std::max(exact_blocks, 1)}, on_gpu(at::kShort));
    kernels::DecodeAppend append;
    append.batch = n;
    append.n_q = rep();
    append.softmax_scale = static_cast<float>(model().softmax_scale);
    append.place = decode_.place, append.position = decode_.position, append.stored_len = decode_.stored_len;
    append.first_token = decode_.first_token, append.choose = decode_.choose;
    append.cos = decode_.cos.const_data_ptr<float>(), append.sin = decode_.sin.const_data_ptr<float>();
    append.q = q_rows.const_data_ptr(), append.q_stride = q_rows.stride(0);
    append.k = k_rows.const_data_ptr(), append.k_stride = k_rows.stride(0);
    append.v = v_rows.const_data_ptr(), append.v_stride = v_rows.stride(0);
    append.q_turned = q_turned.mutable_data_ptr<float>();
    at::Tensor q_rotated;
    if (codec_->rotates_queries()) {
      q_rotated = at::empty_like(q_turned);
      append.q_rotated = q_rotated.mutable_data_ptr<float>();
    }
    append.exact_masks = reinterpret_cast<uint16_t*>(masks.mutable_data_ptr<int16_t>());
    append.masks_later = decode_.changes_sinks;
    append.refused = refused_.mutable_data_ptr<int32_t>() + layer;
    at::Tensor k_turned, v_plain;
    if (!has_window() || decode_.changes_sinks) {
      k_turned = at::empty({1, n, model().n_kv_heads, model().head_dim}, on_gpu(at::kFloat));
      v_plain = at::empty({1, n, channels()}, on_gpu(at::kFloat));
      append.k_turned = k_turned.mutable_data_ptr<float>();
      append.v_plain = v_plain.mutable_data_ptr<float>();
    }
    const kernels::ElementType type = element_type(q_rows.scalar_type());
    check_launch(kernels::append_decode_cuda(exact, layer, append, type, current_stream()), "append_decode");
    if (decode_.changes_sinks) {
      const at::Tensor rows = hidden.defined() ? hidden.contiguous() : at::Tensor();
      check_launch(kernels::update_decode_sinks_cuda(exact, layer, append, type, rows.defined() ? rows.const_data_ptr() : nullptr,
                                                     model().hidden_size, model().hidden_size, places_->magnitudes().mutable_data_ptr<float>(),
                                                     places_->entries().mutable_data_ptr<int64_t>(), exact_.sinks, exact_.n_first, current_stream()),
                   "update_decode_sinks");
      check_launch(kernels::exact_masks_cuda(exact, layer, append, current_stream()), "exact_masks");
    }
    if (!has_window())
      codec_->store(layer, codec_->packable(layer, k_turned, decode_.cos, decode_.sin, decode_.positions), v_plain, decode_.pairs, pages(), refused_.narrow(0, layer, 1));

    kernels::PagedDecode p;
    p.batch = n;
    p.n_kv_heads = model().n_kv_heads;
    p.n_q = rep();
    p.head_dim = model().head_dim;
    p.q_exact = append.q_turned;
    p.q_pages = append.q_rotated;
    p.pool = pool_base_ + layer * layer_page_bytes();
    p.page_bytes = model().n_layers * layer_page_bytes();
    p.block_table = decode_.block_table;
    p.table_stride = static_cast<int>(decode_.stride);
    p.stored_len = decode_.stored_len;
    p.first_token = decode_.first_token;
    p.slot = decode_.place;
    p.page_masks = exact.sink_blocks > 0 ? exact.page_masks + layer * exact.n_places * exact.mask_stride : nullptr;
    p.mask_stride = exact.mask_stride;
    p.exact = exact.bytes + layer * exact.layer_stride;
    p.exact_stride = exact.place_stride;
    p.exact_blocks = exact_blocks;
    p.exact_masks = append.exact_masks;
    p.units_before = decode_.units_before;
    p.workspace = reinterpret_cast<std::byte*>(workspaces_.at(n).mutable_data_ptr<uint8_t>());
    const at::Tensor out = at::empty({n, model().n_heads, model().head_dim}, on_gpu(model().dtype));
    p.out = out.mutable_data_ptr();
    p.out_type = element_type(model().dtype);
    codec_->decode(layer, p, grid_);
    return out;
  }

  // The tokens that leave their windows in this step, of all layers at once: they have been there since other steps.
  void store_leaving() {
    const int64_t n = decode_.rows;
    const at::Tensor key = at::empty({model().n_layers, n, model().n_kv_heads, model().head_dim}, on_gpu(at::kFloat));
    const at::Tensor value = at::empty({model().n_layers, n, channels()}, on_gpu(at::kFloat));
    check_launch(kernels::read_window_cuda(places_->view(), 0, model().n_layers, decode_.place, decode_.leaving, static_cast<int>(n),
                                           key.mutable_data_ptr<float>(), value.mutable_data_ptr<float>(), current_stream()),
                 "read_window");
    codec_->store(0, codec_->packable(0, key, decode_.leaving_cos, decode_.leaving_sin, decode_.leaving_positions), value, decode_.leaving_pairs, pages(), refused_);
  }

  at::Tensor layer_keys_to_code(int layer, const Step& step, const AttendInput& in) const override {
    const at::Tensor cos = step.cos.to(at::kCUDA);
    const at::Tensor sin = step.sin.to(at::kCUDA);
    const at::Tensor k = ops::apply_rope(codec_->before_rope(in.k).to(at::kFloat), cos, sin).contiguous();
    std::vector<at::Tensor> positions;
    for (const Chunk& chunk : step.chunks) positions.push_back(at::arange(chunk.first, chunk.kv_len, on_gpu(at::kLong)));
    return codec_->packable(layer, k.unsqueeze(0), cos, sin, at::cat(positions)).squeeze(0).view({step.n_tokens, channels()});
  }

  std::byte* pool_base_;
  bool windowed_;
  ExactOptions exact_;
  std::unique_ptr<PageCodecCuda> codec_;
  std::shared_ptr<ExactPlacesCuda> places_;
  at::Tensor refused_;  // [n_layers] int32
  bool decodes_ = false;
  kernels::PagedDecodeGrid grid_{};
  std::map<int, at::Tensor> workspaces_;  // by rows: the counters at their beginning are zero between launches
  at::Tensor tables_, host_tables_;
  int64_t table_stride_ = 16;
  uint64_t tables_epoch_ = 0;
  // Of the open step.
  Decode decode_;
  std::vector<Prefill> prefills_;
  std::vector<ExactPlacesCuda::Saved> saved_;
};

}  // namespace

std::unique_ptr<KvCache> make_cache_cuda(const KvSpec& spec, const KvModel& model, const std::optional<ExactOptions>& exact,
                                         std::unique_ptr<PageCodecCuda> codec) {
  if (exact)
    ROTUNDA_CHECK(exact->sinks + exact->n_first < kernels::kMostSinkSlots, spec.format, " on ", model.device, ": sinks=", exact->sinks,
                  " and first=", exact->n_first, " make ", exact->sinks + exact->n_first, " tokens, expected at most ", kernels::kMostSinkSlots - 1);
  auto memory = cuda_page_memory(model.device_budget_bytes);
  std::byte* const base = memory->base();
  return std::make_unique<CacheCuda>(spec, model, exact, std::move(codec), std::move(memory), base);
}

int64_t planned_cuda_bytes(const ExactOptions& exact, const KvModel& model, int64_t layer_bytes, int64_t kv_len) {
  const int64_t stored = std::max<int64_t>(0, kv_len - exact.recent);
  const int64_t pages = (stored + kPageTokens - 1) / kPageTokens;
  const auto blocks = [](int64_t slots) { return (slots + kTokenBlock - 1) / kTokenBlock; };
  const int64_t sinks = int64_t{exact.sinks} + exact.n_first;
  const int64_t exact_blocks = (exact.recent > 0 ? blocks(exact.recent + ExactPlacesCuda::kSpareSlots) : 0) + (sinks > 0 ? blocks(sinks + 1) : 0);
  return model.n_layers * (pages * PagePool(layer_bytes).page_bytes() + exact_blocks * kTokenBlock * model.kv_channels() * 4);
}

}  // namespace rotunda::kv
