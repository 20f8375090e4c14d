#pragma once

#include <cuda_runtime.h>

#include "kernels/attention/paged_decode.h"
#include "kernels/cuda/ptx.cuh"

/// The skeleton of decode attention on GPUs; what a page holds is a codec's affair. A unit comes in two pieces, keys and then values, each
/// in a stage of shared memory of its own. A codec is a struct of static functions and constants:
///   kUnitTokens                 tokens of a unit
///   kStageBytes                 of the larger piece
///   kMaxWarps                   of a block: with more of them a thread has too few registers
///   Query                       what registers hold of the query of a (sequence, kv head)
///   Weights                     what registers hold of a unit between its keys and its values
///   load_query(p, seq, head)    -> Query; with kScratchBytes, shared memory of a warp that outlives units: (p, seq, head, scratch)
///   copy<kValues>(p, stage, at) starts the copies of a piece
///   attend_keys(p, stage, at, query, state) -> Weights   the stage is the codec's to scribble on
///   add_values(stage, weights, state)
///   write_out(state, to, row)   the state's outputs as [heads][row elements]
/// Every warp works for itself: a pipeline of kStages stages of its own, no barrier until its share is done.
namespace rotunda::kernels {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffU;
inline constexpr float kLog2e = 1.44269504088896340736F;

/// Running softmax of one warp. Lane 4 g + t answers for query heads t and, in the second set, 4 + t; which channels its outputs are,
/// the codec knows. Scores are in units of log 2.
template <int kHeadDim, int kSets>
struct WarpState {
  float max[kSets];
  float sum[kSets];                ///< of this lane's tokens; those of the lanes with the same t add up to the sum
  float out[kSets][kHeadDim / 8];  ///< weighted values of all the warp's tokens

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      max[s] = -INFINITY;
      sum[s] = 0;
#pragma unroll
      for (float& x : out[s]) x = 0;
    }
  }
};

/// The largest (sum) over the lanes with the same t.
__device__ __forceinline__ float max_over_rows(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 4));
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 8));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 16));
}
__device__ __forceinline__ float sum_over_rows(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 4);
  x += __shfl_xor_sync(kAllLanes, x, 8);
  return x + __shfl_xor_sync(kAllLanes, x, 16);
}

/// A unit, found.
struct UnitAt {
  const std::byte* bytes;  ///< of the page, or of the sequence's exact tokens
  int seq;
  int head;               ///< kv head
  int page;               ///< within the sequence; of no meaning for exact tokens
  int piece;              ///< unit within the page, or block of exact tokens
  int first;              ///< attended tokens are among first .. tokens - 1 of the unit
  int tokens;
  const uint16_t* masks;  ///< of the unit's blocks, or null
};

/// Units of the sequences before this one, of one kv head.
__device__ __forceinline__ int units_before(const PagedDecode& p, int seq) {
  return p.units_before[seq] + seq * p.exact_blocks * (p.exact_pieces - 1);
}
/// Units that exact tokens make, of one kv head of a sequence.
__device__ __forceinline__ int exact_units(const PagedDecode& p) { return p.exact_blocks * p.exact_pieces; }

/// A place in the flat list of units; walks forward. What it can look up it does not keep: registers are scarce.
template <int kUnitTokens, int kPageTokens>
class UnitCursor {
 public:
  __device__ UnitCursor(const PagedDecode& p, int unit) : p_(p) {
    // The last sequence that begins at or before the unit.
    int low = 0;
    int high = p.batch - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (units_before(p, middle) * p.n_kv_heads <= unit) low = middle;
      else high = middle - 1;
    }
    enter(low);
    const int within = unit - units_before(p, low) * p.n_kv_heads;
    const int of_head = end_ - unit_;
    head_ = within / of_head;
    unit_ += within % of_head;
    fetch();
  }

  __device__ int seq() const { return seq_; }
  __device__ int head() const { return head_; }
  __device__ bool exact() const { return unit_ >= end_of_pages(); }
  /// Units up to the next change of sequence, head or kind.
  __device__ int left_of_kind() const { return (exact() ? end_ : end_of_pages()) - unit_; }

  __device__ UnitAt at() const {
    if (exact()) {
      const int piece = unit_ - end_of_pages();
      const uint16_t* const masks = p_.exact_masks + int64_t{seq_} * p_.exact_blocks + piece % p_.exact_blocks;
      return {p_.exact + slot() * p_.exact_stride, seq_, head_, 0, piece, 0, 16, masks};
    }
    const uint16_t* masks = nullptr;
    if (p_.page_masks != nullptr) masks = p_.page_masks + slot() * p_.mask_stride + int64_t{unit_} * (kUnitTokens / 16);
    const int first = p_.first_token == nullptr ? 0 : p_.first_token[seq_] - unit_ * kUnitTokens;
    // Only the last unit can be short.
    const int tokens = unit_ + 1 == end_of_pages() ? min(kUnitTokens, p_.stored_len[seq_] - unit_ * kUnitTokens) : kUnitTokens;
    const std::byte* const page = p_.pool + int64_t{page_} * static_cast<int>(p_.page_bytes);
    return {page, seq_, head_, page_of(unit_), unit_ - page_of(unit_) * kPieces, first, tokens, masks};
  }

  __device__ void advance() {
    if (++unit_ >= end_) {
      unit_ = first_unit();
      if (++head_ == p_.n_kv_heads) {
        head_ = 0;
        int next = seq_ + 1;
        while (next < p_.batch && units_before(p_, next + 1) == units_before(p_, next)) ++next;
        if (next == p_.batch) return;
        enter(next);
      }
    }
    fetch();
  }

 private:
  static constexpr int kPieces = kPageTokens / kUnitTokens;

  __device__ void enter(int seq) {
    seq_ = seq;
    unit_ = first_unit();
    end_ = unit_ + units_before(p_, seq + 1) - units_before(p_, seq);
  }
  __device__ int first_unit() const { return p_.first_token == nullptr ? 0 : p_.first_token[seq_] / kUnitTokens; }
  __device__ int end_of_pages() const { return end_ - exact_units(p_); }
  __device__ int64_t slot() const { return p_.slot == nullptr ? seq_ : p_.slot[seq_]; }
  static __device__ int page_of(int unit) { return static_cast<int>(static_cast<unsigned>(unit) / kPieces); }
  /// The page's number is asked for when the cursor moves and needed when it is next looked at: its latency is hidden.
  __device__ void fetch() {
    if (!exact()) page_ = p_.block_table[int64_t{seq_} * p_.table_stride + page_of(unit_)];
  }

  const PagedDecode& p_;
  int seq_ = 0;
  int head_ = 0;
  int unit_ = 0;  ///< units before a sliding window count, exact tokens follow the pages
  int end_ = 0;   ///< of the (sequence, kv head)
  int32_t page_ = 0;
};

/// A row of things cut into shares, in order; the first ones are one larger where it does not come out even.
struct EvenCut {
  int size;    ///< of the smaller shares
  int larger;  ///< so many shares are one larger

  __device__ EvenCut(int things, int shares) : size(things / shares), larger(things - shares * size) {}
  __device__ int begin(int share) const { return share * size + min(share, larger); }
  __device__ int owner(int thing) const {
    const int of_larger = larger * (size + 1);
    return thing < of_larger ? thing / (size + 1) : larger + (thing - of_larger) / size;
  }
};

/// How the list of units is cut: evenly into blocks, then into warps, so that few units are spread over many blocks. (2^31 units would be
/// terabytes of pages.)
struct WorkSplit {
  int units;
  int blocks;
  int warps;  ///< of a block
  EvenCut of_blocks;

  __device__ WorkSplit(const PagedDecode& p, int n_blocks, int warps_per_block)
      : units(units_before(p, p.batch) * p.n_kv_heads), blocks(n_blocks), warps(warps_per_block), of_blocks(units, n_blocks) {}

  struct Share {
    int begin;
    int end;
  };
  __device__ Share share(int block, int warp) const {
    const int first = of_blocks.begin(block);
    const EvenCut of_warps(of_blocks.begin(block + 1) - first, warps);
    return {first + of_warps.begin(warp), first + of_warps.begin(warp + 1)};
  }
  /// The share that holds a unit.
  __device__ Share share_of(int unit) const {
    const int block = of_blocks.owner(unit);
    const int first = of_blocks.begin(block);
    return share(block, EvenCut(of_blocks.begin(block + 1) - first, warps).owner(unit - first));
  }
};

/// The parts of one (sequence, kv head), in the order of the units. It has two segments of the list: its pages, and its exact tokens. Of a
/// segment every block hands in one part, of all its warps whose shares end there, and one more comes from the warp whose share goes on
/// behind it.
struct PartSlots {
  int first[2] = {};   ///< slot of the first block's part; the next blocks' follow
  int blocks[2] = {};  ///< that hand in a part
  int open[2] = {};    ///< 1: there is a part of the warp whose share goes on
  int open_slot = 0;   ///< of the pages; that of the exact tokens is the next

  __device__ PartSlots(const PagedDecode& p, const WorkSplit& split, int seq, int head) {
    const int of_seq = units_before(p, seq + 1) - units_before(p, seq);
    const int begin = units_before(p, seq) * p.n_kv_heads + head * of_seq;
    const int end = begin + of_seq;
    const int segment = 2 * (seq * p.n_kv_heads + head);
    open_slot = slot_of_open(p, split, segment);
    add(split, 0, begin, end - exact_units(p), segment);
    add(split, 1, end - exact_units(p), end, segment + 1);
  }

  // The segment's number and the block's rise along the list, and never neither: their sum names a part.
  static __device__ int slot_of_block(int block, int segment) { return block + segment; }
  static __device__ int slot_of_open(const PagedDecode& p, const WorkSplit& split, int segment) {
    return split.blocks + 2 * p.batch * p.n_kv_heads + segment;
  }

  __device__ int count() const { return blocks[0] + open[0] + blocks[1] + open[1]; }
  __device__ int64_t slot(int i) const {
    if (i < blocks[0]) return first[0] + i;
    i -= blocks[0];
    if (i < open[0]) return open_slot;
    i -= open[0];
    return i < blocks[1] ? first[1] + i : open_slot + 1;
  }

 private:
  __device__ void add(const WorkSplit& split, int kind, int begin, int end, int segment) {
    if (end <= begin) return;
    const WorkSplit::Share share = split.share_of(end - 1);
    open[kind] = share.end > end ? 1 : 0;
    const int ended = open[kind] != 0 ? share.begin : end;  // here the last share ends that ends in the segment
    if (ended <= begin) return;
    const int first_block = split.of_blocks.owner(begin);
    first[kind] = slot_of_block(first_block, segment);
    blocks[kind] = split.of_blocks.owner(ended - 1) - first_block + 1;
  }
};

/// Where the parts lie in the workspace.
template <int kHeadDim, int kSets>
struct PartsView {
  static constexpr int kHeads = 4 * kSets;
  int* counters;    ///< [batch * n_kv_heads] parts that have arrived
  float2* softmax;  ///< [slots][kHeads] maximum and sum
  float* out;       ///< [slots][kHeads][kHeadDim]

  __device__ PartsView(const PagedDecode& p, int blocks) {
    counters = reinterpret_cast<int*>(p.workspace);
    const int64_t slots = blocks + 4 * int64_t{p.batch} * p.n_kv_heads;
    std::byte* at = p.workspace + (int64_t{p.batch} * p.n_kv_heads * 4 + 255) / 256 * 256;
    softmax = reinterpret_cast<float2*>(at);
    out = reinterpret_cast<float*>(at + slots * kHeads * 8);
  }
};

/// What a warp has merged of one query head: lane i has channels 4 i .. 4 i + 3 of every 128.
template <int kHeadDim>
struct MergedHead {
  static constexpr int kChunks = (kHeadDim + 127) / 128;
  float max = -INFINITY;
  float sum = 0;
  float4 out[kChunks] = {};

  /// The lane's place in a row, in float4; narrow heads have rows for half of the lanes, the others do the same again.
  static __device__ __forceinline__ int place(int chunk) {
    return chunk * kWarp + static_cast<int>(threadIdx.x) % (kHeadDim < 128 ? kHeadDim / 4 : kWarp);
  }

  __device__ __forceinline__ void add(float2 softmax, const float4 (&row)[kChunks]) {
    const float top = fmaxf(max, softmax.x);
    const float base = top == -INFINITY ? 0.0F : top;
    const float keep = ptx::exp2_approximate(max - base);
    const float weight = ptx::exp2_approximate(softmax.x - base);
    max = top;
    sum = fmaf(sum, keep, weight * softmax.y);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      out[c].x = fmaf(out[c].x, keep, weight * row[c].x);
      out[c].y = fmaf(out[c].y, keep, weight * row[c].y);
      out[c].z = fmaf(out[c].z, keep, weight * row[c].z);
      out[c].w = fmaf(out[c].w, keep, weight * row[c].w);
    }
  }

  /// Writes the outputs times `factor`.
  __device__ __forceinline__ void write(float* to, float factor) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      reinterpret_cast<float4*>(to)[place(c)] =
          make_float4(out[c].x * factor, out[c].y * factor, out[c].z * factor, out[c].w * factor);
  }
};

/// Merges all parts of one query head h and writes its output. One warp, always in the same order of operations, whoever does it.
template <int kHeadDim, int kSets>
__device__ void merge_parts(const PagedDecode& p, const PartsView<kHeadDim, kSets>& parts, const PartSlots& slots, int seq, int head,
                            int h) {
  using Merged = MergedHead<kHeadDim>;
  constexpr int kTogether = 8;  // parts whose loads are under way at the same time
  Merged merged;
  const int count = slots.count();
  for (int from = 0; from < count; from += kTogether) {
    float2 softmax[kTogether];
    float4 rows[kTogether][Merged::kChunks];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int64_t row = slots.slot(min(from + i, count - 1)) * PartsView<kHeadDim, kSets>::kHeads + h;
      softmax[i] = __ldcg(parts.softmax + row);
#pragma unroll
      for (int c = 0; c < Merged::kChunks; ++c)
        rows[i][c] = __ldcg(reinterpret_cast<const float4*>(parts.out + row * kHeadDim) + Merged::place(c));
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (from + i < count) merged.add(softmax[i], rows[i]);
  }
  merged.write(p.out + ((int64_t{seq} * p.n_kv_heads + head) * p.n_q + h) * kHeadDim, merged.sum > 0 ? 1.0F / merged.sum : 0.0F);
}

/// Says that one more of `parts` parts of a (sequence, kv head) is written. One thread, after a barrier of those who wrote it.
/// @return whether it was the last one; then a barrier lets others read them
__device__ __forceinline__ bool arrive(int* counter, int parts) {
  const bool last = ptx::add_one(counter) + 1 == parts;
  if (last) *counter = 0;  // for the next launch
  return last;
}

/// The kernel's body: Pages and Exact are codecs.
template <typename Pages, typename Exact, int kHeadDim, int kSets, int kWarps, int kStages, int kPageTokens>
class PagedDecodeKernel {
  static constexpr int kHeads = 4 * kSets;
  static constexpr int kStageBytes = Pages::kStageBytes > Exact::kStageBytes ? Pages::kStageBytes : Exact::kStageBytes;
  /// A warp's part as it lies in shared memory in the end: softmax, then outputs, whose rows begin eight banks apart.
  static constexpr int kPartRow = kHeadDim + 8;
  static constexpr int kPartBytes = kHeads * (8 + kPartRow * 4);
  static constexpr int kScratchBytes = [] {
    if constexpr (requires { Pages::kScratchBytes; }) return Pages::kScratchBytes;
    else return 0;
  }();
  static constexpr int kUsedBytes = kStages * kStageBytes + kScratchBytes;
  static constexpr int kWarpBytes = kUsedBytes > kPartBytes ? kUsedBytes : kPartBytes;
  static_assert(kStageBytes % 128 == 0 && kStages >= 2);

  using Cursor = UnitCursor<Pages::kUnitTokens, kPageTokens>;
  using State = WarpState<kHeadDim, kSets>;
  using Parts = PartsView<kHeadDim, kSets>;

 public:
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kSharedBytes = kWarps * (kWarpBytes + 8);

  /// @param shared kSharedBytes, 128-byte aligned
  static __device__ void run(const PagedDecode& p, std::byte* shared) {
    const int warp_in_block = static_cast<int>(threadIdx.x) / kWarp;
    int* const segments = reinterpret_cast<int*>(shared + kWarps * kWarpBytes);  // in which warps ended, or -1
    int* const last = segments + kWarps;

    const WorkSplit::Share share = work_split(p).share(static_cast<int>(blockIdx.x), warp_in_block);
    int segment = -1;
    if (share.end > share.begin) segment = attend_share(p, share, shared + warp_in_block * kWarpBytes);
    if (threadIdx.x % kWarp == 0) segments[warp_in_block] = segment;
    __syncthreads();

    const WorkSplit split = work_split(p);
    const Parts parts(p, split.blocks);
    // Neighbouring warps that ended in the same segment hand in one part together: bit w says that such a run begins with warp w.
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int ended = lane < kWarps ? segments[lane] : -1;
    const unsigned there = __ballot_sync(kAllLanes, ended >= 0);
    const unsigned begins = __ballot_sync(kAllLanes, ended >= 0 && (lane == 0 || segments[lane - 1] != ended));
    int turn = warp_in_block;  // whose turn it is: work on runs and heads goes round
    for (unsigned left = begins; left != 0; left &= left - 1) {
      const int first = __ffs(static_cast<int>(left)) - 1;
      const unsigned next = left & (left - 1);
      const int end = next != 0 ? __ffs(static_cast<int>(next)) - 1 : __popc(there);
      const int64_t slot = PartSlots::slot_of_block(static_cast<int>(blockIdx.x), segments[first]);
      for (int h = 0; h < p.n_q; ++h) {
        if (turn == 0) combine(parts, shared + first * kWarpBytes, end - first, slot, h);
        turn = turn == 0 ? kWarps - 1 : turn - 1;
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarps && (begins >> threadIdx.x & 1U) != 0) {
      const int of = segments[threadIdx.x] / 2;
      last[threadIdx.x] = arrive(parts.counters + of, PartSlots(p, split, of / p.n_kv_heads, of % p.n_kv_heads).count());
    }
    __syncthreads();
    for (unsigned left = begins; left != 0; left &= left - 1) {
      const int first = __ffs(static_cast<int>(left)) - 1;
      if (!last[first]) continue;
      const int seq = segments[first] / 2 / p.n_kv_heads;
      const int head = segments[first] / 2 % p.n_kv_heads;
      const PartSlots slots(p, split, seq, head);
      for (int h = 0; h < p.n_q; ++h) {
        if (turn == 0) merge_parts(p, parts, slots, seq, head, h);
        turn = turn == 0 ? kWarps - 1 : turn - 1;
      }
    }
  }

 private:
  /// Made anew where it is needed, so that it takes no registers while units are attended to.
  static __device__ __forceinline__ WorkSplit work_split(const PagedDecode& p) { return {p, static_cast<int>(gridDim.x), kWarps}; }

  /// One warp's stages: pieces are copied kStages - 1 ahead of the one that is attended to.
  struct Pipeline {
    const PagedDecode& p;
    std::byte* const stages;
    Cursor here;
    Cursor ahead;
    int to_copy;  ///< units
    int stage = 0;

    __device__ Pipeline(const PagedDecode& params, int begin, int units, std::byte* memory)
        : p(params), stages(memory), here(params, begin), ahead(here), to_copy(units) {
#pragma unroll
      for (int i = 0; i < kStages - 1; ++i) {
        if (i % 2 == 0) copy_next<false>(i);
        else copy_next<true>(i);
      }
    }

    /// Starts the copies of the piece ahead; an empty group where there is none keeps count.
    template <bool kValues>
    __device__ __forceinline__ void copy_next(int into) {
      if (to_copy > 0) {
        std::byte* const to = stages + into * kStageBytes;
        if (ahead.exact()) Exact::template copy<kValues>(p, to, ahead.at());
        else Pages::template copy<kValues>(p, to, ahead.at());
        if (kValues && --to_copy > 0) ahead.advance();
      }
      ptx::commit_copies();
    }

    /// Waits for the next piece, of keys or of values; the stage before it is filled again.
    template <bool kValues>
    __device__ __forceinline__ std::byte* next_piece() {
      ptx::wait_copies<kStages - 2>();
      __syncwarp();  // everyone's copies are there, and everyone is done with the stage that is filled next
      copy_next<kValues == (kStages % 2 != 0)>(stage == 0 ? kStages - 1 : stage - 1);
      std::byte* const piece = stages + stage * kStageBytes;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      return piece;
    }

    template <typename Codec>
    __device__ __forceinline__ typename Codec::Query load_query() const {
      if constexpr (requires { Codec::kScratchBytes; }) return Codec::load_query(p, here.seq(), here.head(), stages + kStages * kStageBytes);
      else return Codec::load_query(p, here.seq(), here.head());
    }

    template <typename Codec>
    __device__ __forceinline__ void attend(int n, State& state) {
      typename Codec::Query query = load_query<Codec>();
      for (int i = 0; i < n; ++i) {
        const typename Codec::Weights weights = Codec::attend_keys(p, next_piece<false>(), here.at(), query, state);
        Codec::add_values(next_piece<true>(), weights, state);
        here.advance();
      }
    }
  };

  /// Attends to a warp's share. What it finds in the last segment is left in its shared memory, the rest is handed in.
  /// @return the last segment's number
  static __device__ int attend_share(const PagedDecode& p, const WorkSplit::Share& share, std::byte* mine) {
    int left = share.end - share.begin;
    Pipeline pipeline(p, share.begin, left, mine);
    State state;
    for (;;) {
      state.reset();
      const Cursor& here = pipeline.here;
      const bool exact = here.exact();
      const int seq = here.seq();
      const int head = here.head();
      const int n = min(left, here.left_of_kind());
      const int segment = 2 * (seq * p.n_kv_heads + head) + (exact ? 1 : 0);
      if (exact) pipeline.template attend<Exact>(n, state);
      else pipeline.template attend<Pages>(n, state);
      left -= n;
      if (left == 0) {
        ptx::wait_copies<0>();
        __syncwarp();
        write_part(state, exact, reinterpret_cast<float2*>(mine), reinterpret_cast<float*>(mine + kHeads * 8), kPartRow);
        return segment;
      }
      const WorkSplit split = work_split(p);
      const Parts parts(p, split.blocks);
      const int64_t slot = PartSlots::slot_of_open(p, split, segment);
      write_part(state, exact, parts.softmax + slot * kHeads, parts.out + slot * kHeads * kHeadDim, kHeadDim);
      __syncwarp();
      const PartSlots slots(p, split, seq, head);
      int last = 0;
      if (threadIdx.x % kWarp == 0) last = arrive(parts.counters + seq * p.n_kv_heads + head, slots.count());
      if (__shfl_sync(kAllLanes, last, 0) == 0) continue;
      __syncwarp();
      for (int h = 0; h < p.n_q; ++h) merge_parts(p, parts, slots, seq, head, h);
    }
  }

  /// A warp's state as a part: maxima and sums, and outputs as [heads][row], in elements.
  static __device__ __forceinline__ void write_part(const State& state, bool exact, float2* softmax, float* out, int row) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float sum = sum_over_rows(state.sum[s]);
      if (lane < 4) softmax[4 * s + lane] = make_float2(state.max[s], sum);
    }
    if (exact) Exact::write_out(state, out, row);
    else Pages::write_out(state, out, row);
  }

  /// Merges what `run` neighbouring warps from `first` on have of query head h into one part. One warp.
  static __device__ void combine(const Parts& parts, const std::byte* first, int run, int64_t slot, int h) {
    using Merged = MergedHead<kHeadDim>;
    Merged merged;
#pragma unroll 4
    for (int i = 0; i < run; ++i) {
      const std::byte* const part = first + i * kWarpBytes;
      const auto* const row = reinterpret_cast<const float4*>(part + kHeads * 8 + h * kPartRow * 4);
      float4 chunks[Merged::kChunks];
#pragma unroll
      for (int c = 0; c < Merged::kChunks; ++c) chunks[c] = row[Merged::place(c)];
      merged.add(reinterpret_cast<const float2*>(part)[h], chunks);
    }
    merged.write(parts.out + (slot * kHeads + h) * kHeadDim, 1.0F);
    if (threadIdx.x % kWarp == 0) parts.softmax[slot * kHeads + h] = make_float2(merged.max, merged.sum);
  }
};

}  // namespace rotunda::kernels
