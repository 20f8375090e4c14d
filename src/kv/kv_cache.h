#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "kv/kv_spec.h"
#include "ops/rope.h"
#include "ops/tensor_bundle.h"

namespace rotunda::kv {

/// What a cache has to know of the model that it serves.
struct KvModel {
  int n_layers = 0;
  int n_heads = 0;     ///< query heads
  int n_kv_heads = 0;  ///< key/value heads; n_heads is a multiple
  int head_dim = 0;
  int hidden_size = 0;
  double softmax_scale = 0.0;
  int64_t sliding_window = 0;  ///< a token sees this many newest tokens, itself included; 0: all
  bool key_norm = false;       ///< a norm stands between the key projection and RoPE (Qwen3): keys cannot be fused
  at::ScalarType dtype = at::kFloat;  ///< of queries, keys, values and the result: kFloat, kBFloat16 or kHalf
  ops::Rope rope;
  at::Device device = at::kCPU;  ///< where the tensors of AttendInput, the result and the pages lie
  int64_t device_budget_bytes = 0;  ///< what weights and cache may take of a GPU's memory together; 0: all that it has
  std::vector<int> layer_ids = {};  ///< [n_layers] numbers in the whole model, where this is some layers of it; empty: all of it

  int kv_channels() const { return n_kv_heads * head_dim; }
  /// The number by which users know the layer.
  int layer_id(int layer) const { return layer_ids.empty() ? layer : layer_ids[static_cast<size_t>(layer)]; }
};

using SeqId = int32_t;

/// How the tokens of a step see each other.
enum class StepKind {
  /// As generation runs: the tokens of one step see each other exactly, and older ones as the cache stores them.
  kGenerate,
  /// For evaluation: every token sees the stored form of every key and value, its own too, except those that the format
  /// keeps exact (sinks; the newest `recent` tokens, reckoned back from the token that looks). The step holds a sequence's
  /// first tokens.
  kQuantizeAll,
};

/// The share of one sequence in a step.
struct SeqChunk {
  SeqId seq = -1;
  int64_t n_tokens = 0;
  bool is_prompt = false;  ///< tokens of the prompt: `sink_select=prompt` chooses sinks among these only
  int64_t rope_len = 0;    ///< length that `dynamic` RoPE reckons with; 0: the length after this step
};

/// One layer's new tokens, those of all chunks of the step one after the other; T in all.
struct AttendInput {
  at::Tensor q;       ///< [T, n_heads, head_dim] before RoPE, after a query norm
  at::Tensor k;       ///< [T, n_kv_heads, head_dim] before RoPE, after a key norm
  at::Tensor v;       ///< [T, n_kv_heads, head_dim]
  at::Tensor hidden;  ///< [T, hidden_size] the layer's input (residual stream); may be undefined unless wants_hidden()
};

/// Bytes really allocated, by what they hold.
struct KvUsage {
  int64_t codes_bytes = 0;   ///< codes (or 16/32-bit elements) of stored tokens
  int64_t scale_bytes = 0;   ///< scales and zero points of stored tokens
  int64_t window_bytes = 0;  ///< exact copies of the newest tokens
  int64_t sink_bytes = 0;    ///< exact copies of sinks
  int64_t slack_bytes = 0;   ///< room in pages in use that no token fills yet
  int64_t pool_free_bytes = 0;  ///< pages taken from the system and now unused
  int64_t elements = 0;      ///< key and value elements that the cache stands for: 2 * kv_len * channels * layers

  KvUsage& operator+=(const KvUsage& other) {
    codes_bytes += other.codes_bytes;
    scale_bytes += other.scale_bytes;
    window_bytes += other.window_bytes;
    sink_bytes += other.sink_bytes;
    slack_bytes += other.slack_bytes;
    pool_free_bytes += other.pool_free_bytes;
    elements += other.elements;
    return *this;
  }

  /// All of the above but the unused pages.
  int64_t cache_bytes() const { return codes_bytes + scale_bytes + window_bytes + sink_bytes + slack_bytes; }
  /// 8 * cache_bytes / elements; 0 for an empty cache.
  double bits_per_element() const { return elements == 0 ? 0.0 : 8.0 * static_cast<double>(cache_bytes()) / static_cast<double>(elements); }
};

/// Key-value cache of one model: any number of sequences over one pool of pages. Not thread-safe; inside a call it uses the
/// at::parallel_for pool.
///
/// A step: begin_step(chunks), then attend(layer, ...) once per layer in order, then end_step(). Until end_step nothing
/// counts: abort_step() (or an exception followed by it) leaves every sequence as it was.
class KvCache {
 public:
  virtual ~KvCache() = default;

  virtual const KvSpec& spec() const = 0;
  virtual const KvModel& model() const = 0;

  /// A new, empty sequence.
  virtual SeqId create() = 0;
  /// A sequence with the same content; full pages are shared until one of the two writes to them.
  virtual SeqId fork(SeqId seq) = 0;
  /// Forgets all but the first `kv_len` tokens. @throws Error{kUser} if the sequence is shorter.
  virtual void truncate(SeqId seq, int64_t kv_len) = 0;
  virtual void release(SeqId seq) = 0;
  virtual int64_t kv_len(SeqId seq) const = 0;

  /// Whether attend() needs AttendInput::hidden.
  virtual bool wants_hidden() const { return false; }

  /// Opens a step and takes the pages that it needs. @throws Error{kUser} for an unknown or repeated sequence or an empty
  /// chunk, Error{kWorld} naming the bytes where the pool cannot grow; then no step is open and nothing has changed.
  virtual void begin_step(const std::vector<SeqChunk>& chunks, StepKind kind = StepKind::kGenerate) = 0;
  /// Appends one layer's keys and values and attends over all that the sequence holds, causally.
  /// @return [T, n_heads, head_dim] in the model's dtype.
  /// @throws Error{kUser} where keys or values are not finite (naming layer and sequence).
  virtual at::Tensor attend(int layer, const AttendInput& in) = 0;
  /// The new keys of one layer as the format codes them (rotated, balanced, shifted, ... in its own order of channels), before they are
  /// rounded: for pictures of what is stored. Asked before the layer's attend(); changes nothing.
  /// @return [T, kv_channels] fp32; undefined where the cache does not tell
  virtual at::Tensor keys_to_code(int /*layer*/, const AttendInput& /*in*/) const { return {}; }
  /// Waits for what attend() has under way on a GPU. @throws what attend() throws where it does not wait
  virtual void check_step() {}
  /// @throws as check_step(); the step is then open still
  virtual void end_step() = 0;
  /// For recording a decode step (one token a sequence) as a CUDA graph: what attend() launches may be replayed for later steps with as
  /// many chunks, for which begin_step() has brought its tables to the device, as long as this number stays. 0: nothing may be recorded.
  virtual uint64_t graph_epoch() const { return 0; }
  virtual void abort_step() = 0;

  /// Of all sequences together; shared pages count once.
  virtual KvUsage usage() const = 0;

  /// All of one sequence, bit for bit, with the metadata that import_sequence checks.
  virtual ops::TensorBundle export_sequence(SeqId seq) const = 0;
  /// @throws Error{kUser} naming what does not fit this cache; then nothing has changed.
  virtual SeqId import_sequence(const ops::TensorBundle& bundle) = 0;
};

}  // namespace rotunda::kv
