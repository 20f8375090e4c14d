#pragma once

#include <cuda_runtime.h>

#include "kernels/attention/paged_decode.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sixteen_bit.cuh"
#include "kernels/cuda/warp.cuh"

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
  // Of no meaning to who copies:
  int first = 0;                    ///< attended tokens are among first .. tokens - 1 of the unit
  int tokens = 0;
  const uint16_t* masks = nullptr;  ///< of the unit's blocks, or null
};

/// What the units of one (sequence, kv head), pages or exact tokens, have in common.
struct alignas(16) UnitsOf {
  const uint16_t* masks;  ///< of the first unit's blocks, or null
  int first_token;
  int stored_len;
};

/// How many units there are of what.
struct UnitList {
  const int32_t* units_before;  ///< of PagedDecode
  int batch;
  int n_kv_heads;
  int exact_blocks;
  int exact_pieces;

  explicit __device__ UnitList(const PagedDecode& p)
      : units_before(p.units_before), batch(p.batch), n_kv_heads(p.n_kv_heads), exact_blocks(p.exact_blocks), exact_pieces(p.exact_pieces) {}

  /// Of the sequences before this one, of one kv head.
  __device__ __forceinline__ int before(int seq) const { return units_before[seq] + seq * exact_blocks * (exact_pieces - 1); }
  /// Of exact tokens, of one kv head of a sequence.
  __device__ __forceinline__ int of_exact() const { return exact_blocks * exact_pieces; }
  __device__ __forceinline__ int all() const { return before(batch) * n_kv_heads; }
};

/// A place in the flat list of units; walks forward. What it can look up it does not keep: registers are scarce.
/// @tparam kFetches whether its units are copied, not attended to
template <int kUnitTokens, int kPageTokens, bool kFetches>
class UnitCursor {
 public:
  __device__ UnitCursor(const PagedDecode& p, int unit) : p_(p) {
    // The last sequence that begins at or before the unit.
    int low = 0;
    int high = p.batch - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (UnitList(p).before(middle) * p.n_kv_heads <= unit) low = middle;
      else high = middle - 1;
    }
    enter(low);
    const int within = unit - UnitList(p).before(low) * p.n_kv_heads;
    const int of_head = end() - unit_;
    head_ = within / of_head;
    unit_ += within % of_head;
    fetch();
  }
  explicit __device__ UnitCursor(const UnitCursor<kUnitTokens, kPageTokens, !kFetches>& other)
      : p_(other.p_), seq_(other.seq_), head_(other.head_), unit_(other.unit_), pages_end_(other.pages_end_) {
    fetch();
  }

  __device__ int seq() const { return seq_; }
  __device__ int head() const { return head_; }
  __device__ bool exact() const { return unit_ >= pages_end_; }
  /// Units up to the next change of sequence, head or kind.
  __device__ int left_of_kind() const { return (exact() ? end() : pages_end_) - unit_; }

  __device__ UnitsOf units() const {
    if (exact()) return {p_.exact_masks + int64_t{seq_} * p_.exact_blocks, 0, 0};
    const uint16_t* const masks = p_.page_masks == nullptr ? nullptr : p_.page_masks + slot() * p_.mask_stride;
    return {masks, p_.first_token == nullptr ? 0 : p_.first_token[seq_], p_.stored_len[seq_]};
  }

  __device__ UnitAt to_copy() const {
    if (exact()) return {p_.exact + slot() * p_.exact_stride, seq_, head_, 0, unit_ - pages_end_};
    const auto page = static_cast<uint64_t>(static_cast<unsigned>(page_)) * static_cast<unsigned>(p_.page_bytes);
    return {p_.pool + page, seq_, head_, page_of(unit_), unit_ - page_of(unit_) * kPieces};
  }
  template <bool kExact>
  __device__ UnitAt to_attend(const UnitsOf& units) const {
    if constexpr (kExact) {
      const int piece = unit_ - pages_end_;
      return {nullptr, seq_, head_, 0, piece, 0, 16, units.masks + (p_.exact_pieces == 1 ? piece : piece % p_.exact_blocks)};
    }
    const int first = unit_ * kUnitTokens;
    return {nullptr, seq_, head_, page_of(unit_), unit_ - page_of(unit_) * kPieces, units.first_token - first,
            min(kUnitTokens, units.stored_len - first), units.masks == nullptr ? nullptr : units.masks + first / 16};
  }

  __device__ void advance() {
    if (++unit_ < pages_end_) {
      if (unit_ - page_of(unit_) * kPieces == 0) fetch();
      return;
    }
    if (unit_ < end()) return;
    unit_ = first_unit();
    if (++head_ == p_.n_kv_heads) {
      head_ = 0;
      int next = seq_ + 1;
      while (next < p_.batch && UnitList(p_).before(next + 1) == UnitList(p_).before(next)) ++next;
      if (next == p_.batch) return;
      enter(next);
    }
    fetch();
  }

 private:
  friend class UnitCursor<kUnitTokens, kPageTokens, !kFetches>;
  static constexpr int kPieces = kPageTokens / kUnitTokens;

  __device__ void enter(int seq) {
    seq_ = seq;
    unit_ = first_unit();
    pages_end_ = unit_ + UnitList(p_).before(seq + 1) - UnitList(p_).before(seq) - UnitList(p_).of_exact();
  }
  __device__ int end() const { return pages_end_ + UnitList(p_).of_exact(); }
  __device__ int first_unit() const { return p_.first_token == nullptr ? 0 : p_.first_token[seq_] / kUnitTokens; }
  __device__ int64_t slot() const { return p_.slot == nullptr ? seq_ : p_.slot[seq_]; }
  static __device__ int page_of(int unit) { return static_cast<int>(static_cast<unsigned>(unit) / kPieces); }
  /// The page's number is asked for when the cursor comes to it and needed when it is next looked at: its latency is hidden.
  __device__ void fetch() {
    if (kFetches && !exact()) page_ = p_.block_table[int64_t{seq_} * p_.table_stride + page_of(unit_)];
  }

  const PagedDecode& p_;
  int seq_ = 0;
  int head_ = 0;
  int unit_ = 0;  ///< units before a sliding window count, exact tokens follow the pages
  int pages_end_ = 0;  ///< of the (sequence, kv head)
  int32_t page_ = 0;
};

/// thing / size, for up to 2^20 sizes: a division in few instructions.
__device__ __forceinline__ int divide(int thing, int size) {
  // Right but for one up or down.
  const int near = static_cast<int>(static_cast<float>(thing) * ptx::reciprocal_approximate(static_cast<float>(size)));
  const int rest = thing - near * size;
  return near + (rest >= size ? 1 : 0) - (rest < 0 ? 1 : 0);
}

/// A row of things cut into up to 2^20 shares, in order; the first ones are one larger where it does not come out even.
struct EvenCut {
  int size;    ///< of the smaller shares
  int larger;  ///< so many shares are one larger

  __device__ EvenCut(int things, int shares) : size(things / shares), larger(things - shares * size) {}
  __device__ int begin(int share) const { return share * size + min(share, larger); }
  __device__ int owner(int thing) const {
    const int of_larger = larger * (size + 1);
    const bool in_larger = thing < of_larger;
    return (in_larger ? 0 : larger) + divide(thing - (in_larger ? 0 : of_larger), in_larger ? size + 1 : size);
  }
};

/// How the list of units is cut: evenly into blocks, then into warps, so that few units are spread over many blocks. (2^31 units would be
/// terabytes of pages.)
struct WorkSplit {
  int units;
  int blocks;
  int warps;  ///< of a block
  EvenCut of_blocks;

  __device__ WorkSplit(const UnitList& list, int n_blocks, int warps_per_block)
      : units(list.all()), blocks(n_blocks), warps(warps_per_block), of_blocks(units, n_blocks) {}

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
  int pair = 0;        ///< seq * n_kv_heads + head

  __device__ PartSlots(const UnitList& list, const WorkSplit& split, int of_pair) : pair(of_pair) {
    const int seq = pair / list.n_kv_heads;
    const int head = pair % list.n_kv_heads;
    const int of_seq = list.before(seq + 1) - list.before(seq);
    const int begin = list.before(seq) * list.n_kv_heads + head * of_seq;
    const int end = begin + of_seq;
    const int segment = 2 * pair;
    open_slot = slot_of_open(list, split.blocks, segment);
    add(split, 0, begin, end - list.of_exact(), segment);
    add(split, 1, end - list.of_exact(), end, segment + 1);
  }

  // The segment's number and the block's rise along the list, and never neither: their sum names a part.
  static __device__ int slot_of_block(int block, int segment) { return block + segment; }
  static __device__ int slot_of_open(const UnitList& list, int n_blocks, int segment) {
    return n_blocks + 2 * list.batch * list.n_kv_heads + segment;
  }

  __device__ int count() const { return blocks[0] + open[0] + blocks[1] + open[1]; }
  __device__ int slot(int i) const {
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

/// Parts of one query head, in shared or global memory: lane i of a warp knows where part i lies.
struct PartsOfHead {
  static constexpr int kMost = 16;  ///< more take registers that there are not
  int count;              ///< at least 1; lanes from here on know the last part
  const float2* softmax;  ///< maximum and sum
  const float4* row;      ///< weighted values
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
    return chunk * kWarp + static_cast<int>(threadIdx.x % (kHeadDim < 128 ? kHeadDim / 4 : kWarp));
  }
};

/// Adds parts, in their order. Once in the program and short: it runs at the end of a kernel, where every instruction is fetched for the
/// first time, and what it does first is to ask for all that it wants to read.
template <int kHeadDim>
__device__ __noinline__ MergedHead<kHeadDim> add_parts(MergedHead<kHeadDim> merged, PartsOfHead parts) {
  using Merged = MergedHead<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  constexpr int kTogether = PartsOfHead::kMost / Merged::kChunks;
  const auto row = reinterpret_cast<uint64_t>(parts.row);
  float2 softmax = ptx::load_shared_by_all(parts.softmax);
#pragma unroll 1
  for (int from = 0; from < parts.count; from += kTogether) {
    float4 rows[kTogether][Merged::kChunks];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const auto* const at = reinterpret_cast<const float4*>(__shfl_sync(kAllLanes, row, from + i));
#pragma unroll
      for (int c = 0; c < Merged::kChunks; ++c) rows[i][c] = ptx::load_shared_by_all(at + Merged::place(c));
    }
    if (from == 0) {
      if (lane >= parts.count) softmax = make_float2(-INFINITY, 0);
      float top = fmaxf(merged.max, softmax.x);
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
      const float base = top == -INFINITY ? 0.0F : top;
      const float keep = ptx::exp2_approximate(merged.max - base);
      softmax.x = ptx::exp2_approximate(softmax.x - base);  // from here on the part's weight
      float sum = softmax.x * softmax.y;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      merged.max = top;
      merged.sum = fmaf(merged.sum, keep, sum);
#pragma unroll
      for (float4& x : merged.out) x = make_float4(x.x * keep, x.y * keep, x.z * keep, x.w * keep);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float weight = __shfl_sync(kAllLanes, softmax.x, from + i);
#pragma unroll
      for (int c = 0; c < Merged::kChunks; ++c) {
        float4& x = merged.out[c];
        const float4 y = rows[i][c];
        x = make_float4(fmaf(weight, y.x, x.x), fmaf(weight, y.y, x.y), fmaf(weight, y.z, x.z), fmaf(weight, y.w, x.w));
      }
    }
  }
  return merged;
}

/// Merges all parts of query head h of a (sequence, kv head) and writes its output. One warp, always in the same order of operations,
/// whoever does it.
template <int kHeadDim, int kSets>
__device__ __forceinline__ void merge_parts(const PagedDecode& p, const PartsView<kHeadDim, kSets>& parts, const PartSlots& slots, int h) {
  using Merged = MergedHead<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int count = slots.count();
  Merged merged;
#pragma unroll 1
  for (int from = 0; from < count; from += PartsOfHead::kMost) {
    const int64_t row = slots.slot(min(from + lane, count - 1)) * PartsView<kHeadDim, kSets>::kHeads + h;
    merged = add_parts<kHeadDim>(merged, {min(count - from, PartsOfHead::kMost), parts.softmax + row,
                                          reinterpret_cast<const float4*>(parts.out + row * kHeadDim)});
  }
  const float factor = merged.sum > 0 ? 1.0F / merged.sum : 0.0F;
  const int64_t row = (int64_t{slots.pair} * p.n_q + h) * (kHeadDim / 4);
#pragma unroll
  for (int c = 0; c < Merged::kChunks; ++c) {
    const float4 x = make_float4(merged.out[c].x * factor, merged.out[c].y * factor, merged.out[c].z * factor, merged.out[c].w * factor);
    const int64_t at = row + Merged::place(c);
    switch (p.out_type) {
      case ElementType::kFp32: static_cast<float4*>(p.out)[at] = x; break;
      case ElementType::kBf16: static_cast<uint2*>(p.out)[at] = four_of<__nv_bfloat16>(x); break;
      case ElementType::kFp16: static_cast<uint2*>(p.out)[at] = four_of<__half>(x); break;
    }
  }
}

/// Says that `more` of `parts` parts of a (sequence, kv head) are written. One thread, after a barrier of those who wrote them.
/// @return whether all are; then a barrier lets others read them
__device__ __forceinline__ bool arrive(int* counter, int more, int parts) {
  const bool all = ptx::add(counter, more) + more == parts;
  if (all) *counter = 0;  // for the next launch
  return all;
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

  template <bool kFetches>
  using Cursor = UnitCursor<Pages::kUnitTokens, kPageTokens, kFetches>;
  using State = WarpState<kHeadDim, kSets>;
  using Parts = PartsView<kHeadDim, kSets>;

 public:
  static constexpr int kThreads = kWarps * kWarp;

 private:
  /// (Sequence, kv head)s of a warp's share that are brought to their end together.
  static constexpr int kPairs = 4;

  /// What the warps of a block tell each other, behind their stages.
  struct Board {
    UnitsOf units[kWarps];  ///< that each warp attends to
    PartSlots slots[kWarps][kPairs];
    int first[kWarps];          ///< segment with which the share begins
    int last[kWarps];           ///< segment in which it ends, or -1 where there is no share
    unsigned complete[kWarps];  ///< bit i: all parts of slots[warp][i] are there
  };

 public:
  static constexpr int kSharedBytes = kWarps * kWarpBytes + static_cast<int>(sizeof(Board));

  /// @param shared kSharedBytes, 128-byte aligned
  static __device__ void run(const PagedDecode& p, std::byte* shared) {
    const int warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    Board& board = *reinterpret_cast<Board*>(shared + kWarps * kWarpBytes);
    {
      const WorkSplit::Share share = work_split(UnitList(p)).share(static_cast<int>(blockIdx.x), warp);
      if (share.end > share.begin) attend_share(p, share, shared + warp * kWarpBytes, board);
      else if (lane == 0) board.first[warp] = board.last[warp] = -1;
    }
    __syncthreads();

    // Neighbouring warps that ended in the same segment hand in one part together: bit w says that such a run begins with warp w.
    const Parts parts(p, static_cast<int>(gridDim.x));
    const int ended = lane < kWarps ? board.last[lane] : -1;
    const unsigned there = __ballot_sync(kAllLanes, ended >= 0);
    const unsigned begins = __ballot_sync(kAllLanes, ended >= 0 && (lane == 0 || board.last[lane - 1] != ended));
    int turn = warp;  // whose turn it is: work on runs and heads goes round
    for (unsigned left = begins; left != 0; left &= left - 1) {
      const int first = __ffs(static_cast<int>(left)) - 1;
      const unsigned next = left & (left - 1);
      const int end = next != 0 ? __ffs(static_cast<int>(next)) - 1 : __popc(there);
      const int slot = PartSlots::slot_of_block(static_cast<int>(blockIdx.x), board.last[first]);
#pragma unroll 1
      for (int h = 0; h < p.n_q; ++h) {
        if (turn == 0) combine(parts, shared + first * kWarpBytes, end - first, slot, h);
        turn = turn == 0 ? kWarps - 1 : turn - 1;
      }
    }
    __syncthreads();

    // Whoever hands in the last part of a (sequence, kv head) merges all of them.
    int most = ended < 0 ? 0 : ended / 2 - board.first[lane] / 2 + 1;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    for (int from = 0; from < most; from += kPairs) {
      if (from > 0) {
        __syncthreads();  // the slots of the round before have been read
        if (board.last[warp] >= 0) find_slots(UnitList(p), board.first[warp] / 2 + from, board.last[warp] / 2, board.slots[warp]);
      }
      arrive_all(parts, board, (begins >> warp & 1U) != 0, from);
      __syncthreads();
      for (unsigned some = __ballot_sync(kAllLanes, lane < kWarps && board.complete[lane] != 0); some != 0; some &= some - 1) {
        const int of = __ffs(static_cast<int>(some)) - 1;
        for (unsigned left = board.complete[of]; left != 0; left &= left - 1) {
          const PartSlots& slots = board.slots[of][__ffs(static_cast<int>(left)) - 1];
#pragma unroll 1
          for (int h = 0; h < p.n_q; ++h) {
            if (turn == 0) merge_parts(p, parts, slots, h);
            turn = turn == 0 ? kWarps - 1 : turn - 1;
          }
        }
      }
    }
  }

 private:
  /// Made anew where it is needed, so that it takes no registers while units are attended to.
  static __device__ __forceinline__ WorkSplit work_split(const UnitList& list) { return {list, static_cast<int>(gridDim.x), kWarps}; }

  /// One warp's stages: pieces are copied kStages - 1 ahead of the one that is attended to.
  struct Pipeline {
    const PagedDecode& p;
    std::byte* const stages;
    Cursor<false> here;
    Cursor<true> ahead;
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
        if (ahead.exact()) Exact::template copy<kValues>(p, to, ahead.to_copy());
        else Pages::template copy<kValues>(p, to, ahead.to_copy());
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

    /// @param units of the warp's shared memory
    template <typename Codec, bool kExact>
    __device__ __forceinline__ void attend(int n, const UnitsOf& units, State& state) {
      typename Codec::Query query = load_query<Codec>();
      for (int i = 0; i < n; ++i) {
        std::byte* const keys = next_piece<false>();
        const typename Codec::Weights weights = Codec::attend_keys(p, keys, here.template to_attend<kExact>(units), query, state);
        Codec::add_values(next_piece<true>(), weights, state);
        here.advance();
      }
    }
  };

  /// The parts of (sequence, kv head)s first .. last, at most kPairs of them, one lane each.
  static __device__ __noinline__ void find_slots(UnitList list, int first, int last, PartSlots* to) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    if (lane < kPairs && first + lane <= last) to[lane] = PartSlots(list, work_split(list), first + lane);
  }

  /// One warp says which parts it has handed in, of its (sequence, kv head)s from number `from` on; board.slots are theirs.
  /// @param begins whether it hands in the part of the run that it is in
  static __device__ __forceinline__ void arrive_all(const Parts& parts, Board& board, bool begins, int from) {
    const int warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int first = board.first[warp];
    const int last = board.last[warp];
    const int pair = first / 2 + from + lane;
    bool complete = false;
    if (last >= 0 && lane < kPairs && pair <= last / 2) {
      const PartSlots& slots = board.slots[warp][lane];
      int more = begins && pair == last / 2 ? 1 : 0;
      for (int kind = 0; kind < 2; ++kind) {
        const int segment = 2 * pair + kind;
        if (segment >= first && segment < last) more += slots.open[kind];
      }
      if (more > 0) complete = arrive(parts.counters + pair, more, slots.count());
    }
    const unsigned all = __ballot_sync(kAllLanes, complete);
    if (lane == 0) board.complete[warp] = all;
  }

  /// Attends to a warp's share. What it finds in the last segment is left in its shared memory, the rest lies where open parts lie.
  static __device__ __forceinline__ void attend_share(const PagedDecode& p, const WorkSplit::Share& share, std::byte* mine, Board& board) {
    const int warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    int left = share.end - share.begin;
    Pipeline pipeline(p, share.begin, left, mine);
    const Cursor<false>& here = pipeline.here;
    const auto segment_here = [&] { return 2 * (here.seq() * p.n_kv_heads + here.head()) + (here.exact() ? 1 : 0); };
    // What the end wants to know, while the first copies are under way.
    if (lane == 0) board.first[warp] = segment_here();
    find_slots(UnitList(p), here.seq() * p.n_kv_heads + here.head(), p.batch * p.n_kv_heads - 1, board.slots[warp]);
    State state;
    for (;;) {
      state.reset();
      const bool exact = here.exact();
      const int n = min(left, here.left_of_kind());
      const int segment = segment_here();
      if (lane == 0) board.units[warp] = here.units();
      __syncwarp();
      if (exact) pipeline.template attend<Exact, true>(n, board.units[warp], state);
      else pipeline.template attend<Pages, false>(n, board.units[warp], state);
      left -= n;
      if (left == 0) {
        ptx::wait_copies<0>();
        __syncwarp();
        write_part(state, exact, reinterpret_cast<float2*>(mine), reinterpret_cast<float*>(mine + kHeads * 8), kPartRow);
        if (lane == 0) board.last[warp] = segment;
        return;
      }
      const Parts parts(p, static_cast<int>(gridDim.x));
      const int64_t slot = PartSlots::slot_of_open(UnitList(p), static_cast<int>(gridDim.x), segment);
      write_part(state, exact, parts.softmax + slot * kHeads, parts.out + slot * kHeads * kHeadDim, kHeadDim);
    }
  }

  /// A warp's state as a part: maxima and sums, and outputs as [heads][row], in elements.
  static __device__ __forceinline__ void write_part(const State& state, bool exact, float2* softmax, float* out, int row) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float sum = sum_over_rows(state.sum[s]);
      if (lane < 4) softmax[4 * s + lane] = make_float2(state.max[s], sum);
    }
    if (exact) Exact::write_out(state, out, row);
    else Pages::write_out(state, out, row);
  }

  /// Merges what `run` neighbouring warps from `first` on have of query head h into one part. One warp.
  static __device__ __forceinline__ void combine(const Parts& parts, const std::byte* first, int run, int slot, int h) {
    using Merged = MergedHead<kHeadDim>;
    static_assert(kWarps <= PartsOfHead::kMost);
    const std::byte* const part = first + min(static_cast<int>(threadIdx.x % kWarp), run - 1) * kWarpBytes;
    const Merged merged = add_parts<kHeadDim>(Merged(), {run, reinterpret_cast<const float2*>(part) + h,
                                                         reinterpret_cast<const float4*>(part + kHeads * 8 + h * kPartRow * 4)});
    const int64_t row = int64_t{slot} * kHeads + h;
#pragma unroll
    for (int c = 0; c < Merged::kChunks; ++c) reinterpret_cast<float4*>(parts.out + row * kHeadDim)[Merged::place(c)] = merged.out[c];
    if (threadIdx.x % kWarp == 0) parts.softmax[row] = make_float2(merged.max, merged.sum);
  }
};

}  // namespace rotunda::kernels
