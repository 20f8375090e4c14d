#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention/decode_attention.h"
#include "kv/kv_cache.h"
#include "kv/page_pool.h"

namespace rotunda::kv {

/// Tokens of a page. 128 = 8 blocks: one page is the unit of sharing, and large enough that walking the table costs nothing.
inline constexpr int kPageTokens = 128;
inline constexpr int kBlocksPerPage = kPageTokens / kernels::kTokenBlock;

/// What a sequence keeps beside its pages, all layers.
class PagedCacheExtra {
 public:
  virtual ~PagedCacheExtra() = default;
  virtual std::unique_ptr<PagedCacheExtra> clone() const = 0;
  virtual void truncate(int64_t kv_len) = 0;
  /// Adds window_bytes and sink_bytes.
  virtual void add_usage(KvUsage& usage) const = 0;
  virtual void export_to(ops::TensorBundle& bundle) const = 0;
  /// @throws Error{kUser} where a tensor is missing or does not fit.
  virtual void import_from(const ops::TensorBundle& bundle, int64_t kv_len) = 0;
};

/// What formats that store tokens in pages share: sequences, page tables, copy on write, the life of a step, positions and
/// RoPE angles, sizes, saving. A format adds what it keeps beside the pages (PagedCacheExtra) and the attention of one layer.
class PagedCache : public KvCache {
 public:
  const KvSpec& spec() const override { return spec_; }
  const KvModel& model() const override { return model_; }

  SeqId create() override;
  SeqId fork(SeqId seq) override;
  void truncate(SeqId seq, int64_t kv_len) override;
  void release(SeqId seq) override;
  int64_t kv_len(SeqId seq) const override;

  void begin_step(const std::vector<SeqChunk>& chunks, StepKind kind) override;
  at::Tensor attend(int layer, const AttendInput& in) override;
  at::Tensor keys_to_code(int layer, const AttendInput& in) const override;
  void end_step() override;
  void abort_step() override;

  KvUsage usage() const override;
  ops::TensorBundle export_sequence(SeqId seq) const override;
  SeqId import_sequence(const ops::TensorBundle& bundle) override;

 protected:
  struct Sequence {
    int64_t kv_len = 0;
    int64_t stored_len = 0;  ///< tokens 0 .. stored_len - 1 are in pages; the rest only beside them
    std::vector<Page*> pages;                ///< a page holds its tokens for every layer, see layer_page()
    std::unique_ptr<PagedCacheExtra> extra;  ///< may be null
  };

  /// One chunk of the open step.
  struct Chunk {
    Sequence* sequence;
    SeqId seq;
    int64_t row;         ///< its first token among the step's
    int64_t n_tokens;
    int64_t first;       ///< position of its first token = kv_len before the step
    int64_t kv_len;      ///< after the step
    int64_t stored_len;  ///< after the step
    int64_t rope_len;
    bool is_prompt;
    size_t pages_before;  ///< to undo
  };

  struct Step {
    StepKind kind;
    std::vector<Chunk> chunks;
    int64_t n_tokens = 0;
    at::Tensor cos, sin;  ///< [T, head_dim / 2] fp32, attention factor in
  };

  /// @param page_bytes of one layer   @param codes_bytes_per_token, scale_bytes_per_token of one layer: page_bytes / kPageTokens without padding
  /// @param memory where pages lie
  PagedCache(KvSpec spec, KvModel model, int64_t page_bytes, int64_t codes_bytes_per_token, int64_t scale_bytes_per_token,
             std::unique_ptr<PageMemory> memory = host_page_memory());
  ~PagedCache() override;

  /// How many tokens are in pages once the sequence has grown to `kv_len`; at least sequence.stored_len.
  virtual int64_t stored_len_after(const Sequence& sequence, int64_t kv_len) const = 0;
  /// Called before a sequence forgets all but its first `kv_len` tokens, its pages still there. @return how many tokens stay in pages
  virtual int64_t on_truncate(SeqId, Sequence& sequence, int64_t kv_len) const { return std::min(sequence.stored_len, kv_len); }
  virtual std::unique_ptr<PagedCacheExtra> make_extra() const { return nullptr; }
  /// Called once all pages of the step are there.
  virtual void on_begin_step(const Step&) {}
  /// One layer. q, k, v are [T, heads, head_dim] in the model's dtype, contiguous, before RoPE. @return [T, n_heads, head_dim]
  virtual at::Tensor attend_layer(int layer, const Step& step, const AttendInput& in) = 0;
  /// As keys_to_code(); the default: keys after RoPE. @return [T, kv_channels] fp32, the caller's own
  virtual at::Tensor layer_keys_to_code(int layer, const Step& step, const AttendInput& in) const;
  virtual void on_end_step(const Step&) {}
  virtual void on_abort_step(const Step&) {}
  /// Settings that a saved sequence must share with the cache that reads it, beyond model shape and spec.
  virtual std::map<std::string, std::string> saved_settings() const { return {}; }

  const Sequence& sequence(SeqId seq) const;
  PagePool& pool() { return pool_; }
  /// The part of a page that belongs to one layer.
  std::byte* layer_page(const Page* page, int layer) const { return page->bytes + layer * layer_page_bytes_; }
  std::byte* layer_page(const Chunk& chunk, int layer, int64_t page) const {
    return layer_page(chunk.sequence->pages[static_cast<size_t>(page)], layer);
  }
  int64_t layer_page_bytes() const { return layer_page_bytes_; }
  /// RoPE angles of tokens, on the host: as few calls as their lengths allow.
  /// @param positions, rope_lens [T], T > 0   @return cos and sin as Step has them
  std::pair<at::Tensor, at::Tensor> angles_at(const std::vector<int64_t>& positions, const std::vector<int64_t>& rope_lens) const;

 private:
  void check_no_step(const char* what) const;
  /// Throws where a layer's input does not fit the open step.
  void check_input(int layer, const AttendInput& in) const;
  /// For the calls that change it; @throws as sequence().
  Sequence& own(SeqId seq);
  /// What the metadata of a saved sequence says of the cache that it fits.
  std::map<std::string, std::string> saved_header() const;
  void drop_pages(Sequence& sequence, int64_t keep_tokens);
  int64_t new_pages_wanted(const Chunk& chunk, int64_t tokens_in_pages) const;

  KvSpec spec_;
  KvModel model_;
  int64_t layer_page_bytes_;
  PagePool pool_;
  int64_t codes_bytes_per_token_;
  int64_t scale_bytes_per_token_;
  std::map<SeqId, Sequence> sequences_;
  SeqId next_seq_ = 0;
  std::unique_ptr<Step> step_;
};

/// Which of the tokens first .. end - 1 (positions) are attended, as the masks of blocks 0 .. n_blocks - 1, block b holding positions
/// 16 b .. 16 b + 15.
std::vector<uint16_t> block_masks(int64_t n_blocks, int64_t first, int64_t end);

/// Runs a decode kernel over (sequence, head group) pairs, each cut along its pages so that all threads have work, and merges the parts.
struct SplitDecode {
  struct Item {
    int64_t n_pages;  ///< 0: this item has only its extra part
    std::function<void(int group, int64_t page_begin, int64_t page_end, const kernels::SoftmaxState&)> pages;
    std::function<void(int group, const kernels::SoftmaxState&)> extra;  ///< may be empty
    float* out;  ///< [n_groups * heads_per_item][head_dim]
  };
  int n_groups;         ///< head groups of an item
  int heads_per_group;  ///< query heads of a group
  int head_dim;
  int64_t page_cost;    ///< elements per page and group, to judge whether threads pay

  void run(const std::vector<Item>& items) const;
};

}  // namespace rotunda::kv
