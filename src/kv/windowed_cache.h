#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention/decode_attention.h"
#include "kv/kv_options.h"
#include "kv/paged_cache.h"
#include "kv/stored_attention.h"

namespace rotunda::kv {

class ExactStore;
class LayerSinks;

/// What packed formats share: packed pages, and beside them, in fp16, the newest tokens (a ring of slots, the window)
/// and the sinks. A token is packed when it leaves the window; a sink keeps its packed copy too, which attention masks.
/// Where tokens share a scale (ExactOptions::pack_group) they leave the window together, and come back to it together where a
/// sequence is cut off in their middle.
///
/// In the window and among the sinks keys are kept after RoPE (with its attention factor) and values as given; queries
/// meet them after RoPE, times the softmax scale. What a key looks like in a page is the format's affair: it fills in
/// the hooks below. Values of all tokens, exact and packed, stand in one basis, the one they are given in.
///
/// The hooks are called only while a step is open (stored_tokens() also where a sequence is cut off within a pack_group); those
/// marked "threads" from several threads at once.
class WindowedCache : public PagedCache {
 public:
  ~WindowedCache() override;

  /// Where sinks are chosen by the entries of the layer's input.
  bool wants_hidden() const override { return exact_.sinks > 0; }

 protected:
  /// @param page_bytes of one layer; the rest as PagedCache
  WindowedCache(KvSpec spec, KvModel model, const ExactOptions& exact, int64_t page_bytes,
                int64_t codes_bytes_per_token, int64_t scale_bytes_per_token);

  // ---- what a format fills in --------------------------------------------------------------------------------------

  /// The new keys of one layer, all chunks of the step. T tokens.
  struct NewKeys {
    /// [T, n_kv_heads, head_dim] fp32, contiguous: after RoPE, attention factor in.
    at::Tensor turned;
    /// [T, kv_channels] fp32, contiguous: rows for store(). Undefined: make_packable() makes them of `turned`.
    at::Tensor packable;
  };
  /// Brings the keys of one layer into these forms. The default applies RoPE and leaves the rest to make_packable(); a
  /// format whose fused projections give keys in another basis, or that packs keys before RoPE, overrides it.
  /// @param k [T, n_kv_heads, head_dim] as AttendInput::k
  virtual NewKeys new_keys(const Step& step, const at::Tensor& k) const;

  /// Makes rows for store() out of keys after RoPE, in place. Tokens that leave the window come this way, and new ones
  /// where new_keys() gave no packable rows. Threads.
  /// @param first position of the first token; first .. first + n_tokens - 1 lie in one block of 16, or are a pack_group of 32
  /// @param keys [n_tokens][kv_channels] fp32 as NewKeys::turned; a token of the window has been through fp16
  virtual void make_packable(int layer, const Chunk& chunk, int64_t first, int64_t n_tokens, float* keys) const = 0;

  /// Packs tokens into one block of 16; other tokens of the block stay as they are. Threads, each with other pairs of
  /// blocks 2 i and 2 i + 1 of a page, so that the two may share a word. A pack_group comes whole: 16 tokens are a block, 32 a pair.
  /// @param page the page's bytes   @param block within the page; of a pair the first
  /// @param first within the block; first + n_tokens <= 16, or 0 and 32 for a pair
  /// @param key [n_tokens][kv_channels] packable rows   @param value [n_tokens][kv_channels] fp32, as given
  /// @return false where an element is not finite or the format cannot hold it; the tokens' bytes are then unspecified
  virtual bool store(int layer, std::byte* page, int block, int first, int n_tokens, const float* key,
                     const float* value) const = 0;

  /// The chunk's sequence as it stands in pages, for prefill and quantize-all: keys in the basis and with the factor of
  /// NewKeys::turned, values in the basis given. Its load_block runs on threads, until the layer's attention is done.
  virtual StoredTokens stored_tokens(int layer, const Chunk& chunk) const = 0;

  /// kv heads that page_attention() takes at once; divides n_kv_heads.
  virtual int kv_heads_per_group() const = 0;

  /// Decode attention of one head group over a run of packed pages: adds to `state`. Threads, each with another state.
  /// @param group of n_kv_heads / kv_heads_per_group()   @param page_begin the run's first page within the sequence
  /// @param run pages and masks of the tokens to attend to
  /// @param state of kv_heads_per_group() * rep() query heads
  using PageAttention = std::function<void(int group, int64_t page_begin, const kernels::PageRun& run,
                                           const kernels::SoftmaxState& state)>;
  /// Prepares the decode of one token over its sequence's pages, once per layer and chunk: what it makes of the query,
  /// the function returned owns.
  /// @param chunk of one token; it and `q` outlive the function
  /// @param q [n_heads][head_dim] fp32 after RoPE with its attention factor, times the softmax scale
  virtual PageAttention page_attention(int layer, const Chunk& chunk, const float* q) const = 0;

  /// The window's length, and n_first where there is one. A format that overrides it adds its own to these.
  std::map<std::string, std::string> saved_settings() const override;

  // ---- what a format may ask ---------------------------------------------------------------------------------------

  /// Positions first .. end - 1.
  struct TokenRange {
    int64_t first;
    int64_t end;
  };
  /// The tokens that this step moves from the window to pages; may be empty (end <= first).
  static TokenRange leaving_window(const Chunk& chunk);
  /// The sequence length that the RoPE of a token of the window was reckoned with.
  static int64_t rope_len_in_window(const Chunk& chunk, int64_t position);

  int64_t channels() const { return model().kv_channels(); }
  /// Query heads per kv head.
  int rep() const { return model().n_heads / model().n_kv_heads; }

 private:
  class Exact;        // what a sequence keeps in 16 bits
  struct Undo;        // what a layer of a sequence was before the open step touched it
  struct DecodeTask;  // what the decode of one sequence points to while the kernels run

  // A chunk's tokens, each [n_tokens][kv_channels] fp32.
  struct Rows {
    const float* packable;  // may be null
    const float* turned;    // keys after RoPE
    const float* value;
    Rows from(int64_t offset) const {
      return {packable == nullptr ? nullptr : packable + offset, turned + offset, value + offset};
    }
  };

  static Exact& exact_of(const Chunk& chunk);
  /// The tokens 0 .. n_tokens - 1 that are in whole groups.
  int64_t whole_groups(int64_t n_tokens) const { return n_tokens / exact_.pack_group * exact_.pack_group; }

  int64_t stored_len_after(const Sequence& sequence, int64_t kv_len) const final;
  int64_t on_truncate(SeqId seq, Sequence& sequence, int64_t kv_len) const final;
  std::unique_ptr<PagedCacheExtra> make_extra() const final;
  void on_end_step(const Step& step) final;
  void on_abort_step(const Step& step) final;
  at::Tensor attend_layer(int layer, const Step& step, const AttendInput& in) final;
  at::Tensor layer_keys_to_code(int layer, const Step& step, const AttendInput& in) const final;

  void prepare_undo(int layer, const Chunk& chunk);
  void append(int layer, const Chunk& chunk, const at::Tensor& hidden, const Rows& rows);
  void update_sinks(int layer, const Chunk& chunk, const at::Tensor& hidden, const Rows& rows, bool choose);
  void store_rows(int layer, const Chunk& chunk, int64_t first, int64_t end, const Rows& rows) const;
  int64_t store_leaving(int layer, const Chunk& chunk, const Rows& rows) const;
  void update_window(int layer, const Chunk& chunk, const Rows& rows) const;
  [[noreturn]] void throw_not_finite(int layer, const Chunk& chunk, int64_t first, int64_t end) const;

  at::Tensor prefill_attention(int layer, const Chunk& chunk, at::ScalarType dtype, const at::Tensor& q,
                               const at::Tensor& k, const at::Tensor& v) const;
  at::Tensor quantize_all_attention(int layer, const Chunk& chunk, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v) const;
  void add_slots(ops::TileAttention& attention, const ExactStore& store, const std::vector<int64_t>& positions,
                 const std::vector<int64_t>& slots, int64_t first_query, int64_t n_queries, Visibility visible) const;
  void decode_attention(int layer, const Step& step, const std::vector<size_t>& chunk_indices, const at::Tensor& q,
                        const at::Tensor& out) const;
  void fill_task(int layer, const Chunk& chunk, const float* q, DecodeTask& task) const;
  void decode_exact(int layer, const Chunk& chunk, const DecodeTask& task, int group,
                    const kernels::SoftmaxState& state) const;

  ExactOptions exact_;
  std::vector<Undo> undo_;  // of the open step
};

/// KvFormat::planned_bytes of a format whose cache is a WindowedCache.
/// @param page_bytes of one layer's page, as the constructor takes them
int64_t planned_windowed_bytes(const ExactOptions& exact, const KvModel& model, int64_t page_bytes, int64_t kv_len);

}  // namespace rotunda::kv
