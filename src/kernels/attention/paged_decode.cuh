#pragma once

#include <cuda_runtime.h>

#include "kernels/attention/paged_decode.h"
#include "kernels/cuda/ptx.cuh"

/// The skeleton of decode attention on GPUs; what a page holds is a codec's affair. A codec is a struct of static functions and constants:
///   kUnitTokens                 tokens of a unit
///   kStageBytes                 shared memory of one unit
///   Query                       what registers hold of the query of a (sequence, kv head)
///   load_query(p, seq, head)    -> Query; with kScratchBytes, shared memory of a warp that outlives units: (p, seq, head, scratch)
///   copy(p, stage, at)          starts the copies of one unit
///   attend(p, stage, at, query, state)   takes one unit into the state; the stage is the codec's to scribble on
///   write_out(state, to)        the state's outputs as [heads][head_dim]
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
  int head;                ///< kv head
  int page;                ///< within the sequence; of no meaning for exact tokens
  int piece;               ///< unit within the page, or block of exact slots
  int first;               ///< attended tokens are among first .. tokens - 1 of the unit
  int tokens;
  const uint16_t* masks;   ///< of the unit's blocks, or null
};

/// Units of the sequences before this one, of one kv head.
__device__ __forceinline__ int64_t units_before(const PagedDecode& p, int seq) {
  return p.units_before[seq] + int64_t{seq} * p.exact_blocks * (p.exact_pieces - 1);
}

/// A place in the flat list of units; walks forward.
template <int kUnitTokens, int kPageTokens>
class UnitCursor {
 public:
  __device__ UnitCursor(const PagedDecode& p, int64_t unit) : p_(p) {
    // The last sequence that begins at or before the unit.
    int low = 0;
    int high = p.batch - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (units_before(p, middle) * p.n_kv_heads <= unit) low = middle;
      else high = middle - 1;
    }
    enter(low);
    const int64_t within = unit - units_before(p, low) * p.n_kv_heads;
    head_ = static_cast<int>(within / units_);
    unit_ = static_cast<int>(within % units_);
    fetch();
  }

  __device__ int seq() const { return seq_; }
  __device__ int head() const { return head_; }
  __device__ int unit() const { return unit_; }
  __device__ bool exact() const { return unit_ >= page_units(); }
  /// Units of this (sequence, kv head) in pages.
  __device__ int page_units() const { return units_ - p_.exact_blocks * p_.exact_pieces; }
  __device__ int units() const { return units_; }
  /// Units up to the next change of sequence, head or kind.
  __device__ int left_of_kind() const { return (exact() ? units_ : page_units()) - unit_; }

  __device__ UnitAt at() const {
    if (exact()) {
      const int piece = unit_ - page_units();
      const uint16_t* const masks = p_.exact_masks + int64_t{seq_} * p_.exact_blocks + piece % p_.exact_blocks;
      return {p_.exact + slot_ * p_.exact_stride, head_, 0, piece, 0, 16, masks};
    }
    const int piece = first_piece() + unit_;
    const uint16_t* masks = nullptr;
    if (p_.page_masks != nullptr) masks = p_.page_masks + slot_ * p_.mask_stride + int64_t{piece} * (kUnitTokens / 16);
    return {p_.pool + page_ * p_.page_bytes, head_,
            piece / kPieces,                 piece % kPieces,
            first_ - piece * kUnitTokens,    min(kUnitTokens, stored_ - piece * kUnitTokens),
            masks};
  }

  __device__ void advance(int n = 1) {
    unit_ += n;
    if (unit_ >= units_) {
      unit_ = 0;
      if (++head_ == p_.n_kv_heads) {
        head_ = 0;
        int next = seq_ + 1;
        while (next < p_.batch && units_before(p_, next + 1) == units_before(p_, next)) ++next;
        if (next < p_.batch) enter(next);
        else units_ = 0;
      }
    }
    fetch();
  }

 private:
  static constexpr int kPieces = kPageTokens / kUnitTokens;

  __device__ void enter(int seq) {
    seq_ = seq;
    units_ = static_cast<int>(units_before(p_, seq + 1) - units_before(p_, seq));
    stored_ = p_.stored_len[seq];
    first_ = p_.first_token == nullptr ? 0 : p_.first_token[seq];
    slot_ = p_.slot == nullptr ? seq : p_.slot[seq];
  }
  /// Of the sequence: the one that unit 0 is.
  __device__ int first_piece() const { return first_ / kUnitTokens; }
  /// The page's number is asked for when the cursor moves and needed when it is next looked at: its latency is hidden.
  __device__ void fetch() {
    if (units_ > 0 && !exact()) page_ = p_.block_table[int64_t{seq_} * p_.table_stride + (first_piece() + unit_) / kPieces];
  }

  const PagedDecode& p_;
  int seq_ = 0;
  int head_ = 0;
  int unit_ = 0;
  int units_ = 0;
  int stored_ = 0;
  int first_ = 0;
  int64_t slot_ = 0;
  int64_t page_ = 0;
};

/// Where the parts lie in the workspace.
template <int kHeadDim, int kSets>
struct PartsView {
  static constexpr int kHeads = 4 * kSets;
  int* counters;    ///< [batch * n_kv_heads] parts that have arrived
  float2* softmax;  ///< [parts][kHeads] maximum and sum; sum 0: nothing there
  float* out;       ///< [parts][kHeads][kHeadDim]

  __device__ PartsView(const PagedDecode& p, int all_warps) {
    counters = reinterpret_cast<int*>(p.workspace);
    const int64_t parts = all_warps + 2 * int64_t{p.batch} * p.n_kv_heads;
    std::byte* at = p.workspace + (int64_t{p.batch} * p.n_kv_heads * 4 + 255) / 256 * 256;
    softmax = reinterpret_cast<float2*>(at);
    out = reinterpret_cast<float*>(at + parts * kHeads * 8);
  }
};

/// First unit of a warp's share; shares differ by one unit at most.
__device__ __forceinline__ int64_t share_begin(int64_t units, int warp, int warps) { return units * warp / warps; }
/// The warp whose share holds a unit.
__device__ __forceinline__ int share_owner(int64_t units, int64_t unit, int warps) {
  return static_cast<int>(((unit + 1) * warps - 1) / units);
}

/// The parts of one (sequence, kv head): of its pages, then of its exact tokens. A part's slot is its warp plus its segment's number, which
/// rises along the list of units.
struct PartSlots {
  int page_first = 0;
  int page_count = 0;
  int exact_first = 0;
  int exact_count = 0;

  __device__ PartSlots(const PagedDecode& p, int seq, int head, int64_t units, int warps) {
    const int segment = 2 * (seq * p.n_kv_heads + head);
    const int64_t of_seq = units_before(p, seq + 1) - units_before(p, seq);
    const int64_t begin = units_before(p, seq) * p.n_kv_heads + head * of_seq;
    const int64_t end = begin + of_seq;
    const int64_t middle = end - p.exact_blocks * p.exact_pieces;
    if (middle > begin) {
      page_first = share_owner(units, begin, warps) + segment;
      page_count = share_owner(units, middle - 1, warps) + segment - page_first + 1;
    }
    if (end > middle) {
      exact_first = share_owner(units, middle, warps) + segment + 1;
      exact_count = share_owner(units, end - 1, warps) + segment + 1 - exact_first + 1;
    }
  }
  __device__ int count() const { return page_count + exact_count; }
  __device__ int64_t slot(int i) const { return i < page_count ? page_first + i : exact_first + i - page_count; }
};

/// Merges all parts of one (sequence, kv head) and writes its outputs. One warp.
template <int kHeadDim, int kSets>
__device__ void merge_parts(const PagedDecode& p, const PartsView<kHeadDim, kSets>& parts, int seq, int head, const PartSlots& slots) {
  constexpr int kHeads = 4 * kSets;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int count = slots.count();
  for (int h = 0; h < p.n_q; ++h) {
    float top = -INFINITY;
    for (int i = lane; i < count; i += kWarp) {
      const float2 part = __ldcg(parts.softmax + slots.slot(i) * kHeads + h);
      if (part.y > 0) top = fmaxf(top, part.x);
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    float sum = 0;
    constexpr int kPerLane = kHeadDim / kWarp;
    float acc[kPerLane];
#pragma unroll
    for (float& x : acc) x = 0;
    for (int from = 0; from < count; from += kWarp) {
      float weight = 0;
      if (from + lane < count) {
        const float2 part = __ldcg(parts.softmax + slots.slot(from + lane) * kHeads + h);
        if (part.y > 0) {
          weight = ptx::exp2_approximate(part.x - top);
          sum += weight * part.y;
        }
      }
      for (unsigned left = __ballot_sync(kAllLanes, weight > 0); left != 0; left &= left - 1) {
        const int i = __ffs(static_cast<int>(left)) - 1;
        const float w = __shfl_sync(kAllLanes, weight, i);
        const float* const row = parts.out + (slots.slot(from + i) * kHeads + h) * kHeadDim;
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) acc[c] += w * __ldcg(row + c * kWarp + lane);
      }
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const float inverse = sum > 0 ? 1.0F / sum : 0.0F;
    float* const to = p.out + ((int64_t{seq} * p.n_kv_heads + head) * p.n_q + h) * kHeadDim;
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) to[c * kWarp + lane] = acc[c] * inverse;
  }
}

/// Says that `arrived` parts of a (sequence, kv head) are written; whoever says it last merges them.
template <int kHeadDim, int kSets>
__device__ void arrive(const PagedDecode& p, const PartsView<kHeadDim, kSets>& parts, int seq, int head, int arrived, int64_t units,
                       int warps) {
  const PartSlots slots(p, seq, head, units, warps);
  __syncwarp();
  int last = 0;
  if (threadIdx.x % kWarp == 0) {
    int* const counter = parts.counters + seq * p.n_kv_heads + head;
    __threadfence();
    last = atomicAdd(counter, arrived) + arrived == slots.count();
    if (last) *counter = 0;  // for the next launch
    __threadfence();
  }
  if (__shfl_sync(kAllLanes, last, 0) != 0) merge_parts(p, parts, seq, head, slots);
}

/// The kernel's body: Pages and Exact are codecs.
template <typename Pages, typename Exact, int kHeadDim, int kSets, int kWarps, int kStages, int kPageTokens>
class PagedDecodeKernel {
  static constexpr int kHeads = 4 * kSets;
  static constexpr int kStageBytes = Pages::kStageBytes > Exact::kStageBytes ? Pages::kStageBytes : Exact::kStageBytes;
  /// A warp's part as it lies in shared memory in the end: softmax, then outputs.
  static constexpr int kPartBytes = kHeads * (8 + kHeadDim * 4);
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
  static constexpr int kSharedBytes = kWarps * kWarpBytes + kWarps * 4;

  /// @param shared kSharedBytes, 128-byte aligned
  static __device__ void run(const PagedDecode& p, std::byte* shared) {
    const int warp_in_block = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t units = units_before(p, p.batch) * p.n_kv_heads;
    // Every worker has a unit at least, and few units are spread over many blocks.
    const int blocks = static_cast<int>(gridDim.x);
    const int per_block = static_cast<int>(min((units + blocks - 1) / blocks, int64_t{kWarps}));
    const int warps = static_cast<int>(min(units, int64_t{blocks} * per_block));
    const int warp = warp_in_block < per_block ? static_cast<int>(blockIdx.x) * per_block + warp_in_block : warps;
    const Parts parts(p, blocks * kWarps);
    std::byte* const mine = shared + warp_in_block * kWarpBytes;
    int* const segments = reinterpret_cast<int*>(shared + kWarps * kWarpBytes);

    // A segment: what one (sequence, kv head) has of one kind.
    int segment = -1;
    if (warp < warps) {
      const int64_t begin = share_begin(units, warp, warps);
      const int64_t end = share_begin(units, warp + 1, warps);
      Pipeline pipeline(p, begin, end, mine);
      State state;
      state.reset();
      for (int64_t left = end - begin; left > 0;) {
        const Cursor& here = pipeline.here;
        const bool exact = here.exact();
        const int seq = here.seq();
        const int head = here.head();
        const int n = static_cast<int>(left < here.left_of_kind() ? left : here.left_of_kind());
        segment = 2 * (seq * p.n_kv_heads + head) + (exact ? 1 : 0);
        if (exact) pipeline.template attend<Exact>(n, state);
        else pipeline.template attend<Pages>(n, state);
        left -= n;
        const int64_t slot = warp + segment;
        if (left > 0) {
          write_part(state, exact, parts.softmax + slot * kHeads, parts.out + slot * kHeads * kHeadDim);
          arrive(p, parts, seq, head, 1, units, warps);
          state.reset();
        } else {
          ptx::wait_copies<0>();
          __syncwarp();
          write_part(state, exact, reinterpret_cast<float2*>(mine), reinterpret_cast<float*>(mine + kHeads * 8));
        }
      }
    }
    if (threadIdx.x % kWarp == 0) segments[warp_in_block] = segment;
    __syncthreads();
    // Neighbouring warps that ended in the same segment hand in one part together: the first of them does.
    if (segment < 0 || (warp_in_block > 0 && segments[warp_in_block - 1] == segment)) return;
    int run = 1;
    while (warp_in_block + run < kWarps && segments[warp_in_block + run] == segment) ++run;
    combine(parts, mine, run, warp + segment);
    arrive(p, parts, segment / 2 / p.n_kv_heads, segment / 2 % p.n_kv_heads, run, units, warps);
  }

 private:
  /// One warp's stages: units are copied kStages - 1 ahead of the one that is attended to.
  struct Pipeline {
    const PagedDecode& p;
    std::byte* const stages;
    Cursor here;
    Cursor ahead;
    int64_t to_copy;
    int stage = 0;

    __device__ Pipeline(const PagedDecode& params, int64_t begin, int64_t end, std::byte* memory)
        : p(params), stages(memory), here(params, begin), ahead(here), to_copy(end - begin) {
      for (int i = 0; i < kStages - 1; ++i) copy_next(i);
    }

    /// Starts the copies of the unit ahead; an empty group where there is none keeps count.
    __device__ __forceinline__ void copy_next(int into) {
      if (to_copy > 0) {
        std::byte* const to = stages + into * kStageBytes;
        if (ahead.exact()) Exact::copy(p, to, ahead.at());
        else Pages::copy(p, to, ahead.at());
        if (--to_copy > 0) ahead.advance();
      }
      ptx::commit_copies();
    }

    template <typename Codec>
    __device__ __forceinline__ typename Codec::Query load_query() const {
      const int seq = here.seq();
      const int head = here.head();
      if constexpr (requires { Codec::kScratchBytes; }) return Codec::load_query(p, seq, head, stages + kStages * kStageBytes);
      else return Codec::load_query(p, seq, head);
    }

    template <typename Codec>
    __device__ __forceinline__ void attend(int n, State& state) {
      typename Codec::Query query = load_query<Codec>();
      for (int i = 0; i < n; ++i) {
        ptx::wait_copies<kStages - 2>();
        __syncwarp();  // everyone's copies are there, and everyone is done with the stage that is filled next
        copy_next(stage == 0 ? kStages - 1 : stage - 1);
        Codec::attend(p, stages + stage * kStageBytes, here.at(), query, state);
        here.advance();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
    }
  };

  /// A warp's state as a part: maxima and sums, and outputs as [heads][head_dim].
  static __device__ __forceinline__ void write_part(const State& state, bool exact, float2* softmax, float* out) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float sum = sum_over_rows(state.sum[s]);
      if (lane < 4) softmax[4 * s + lane] = make_float2(state.max[s], sum);
    }
    if (exact) Exact::write_out(state, out);
    else Pages::write_out(state, out);
  }

  /// Merges the parts of `run` neighbouring warps from `first` on into the first one's slot; the others' slots say that nothing is there.
  static __device__ void combine(const Parts& parts, const std::byte* first, int run, int64_t slot) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    float2* const softmax = parts.softmax + slot * kHeads;
    for (int h = 0; h < kHeads; ++h) {
      float top = -INFINITY;
      for (int i = 0; i < run; ++i) top = fmaxf(top, reinterpret_cast<const float2*>(first + i * kWarpBytes)[h].x);
      float sum = 0;
      float acc[kHeadDim / kWarp] = {};
      for (int i = 0; i < run; ++i) {
        const float2 part = reinterpret_cast<const float2*>(first + i * kWarpBytes)[h];
        const float weight = part.y > 0 ? ptx::exp2_approximate(part.x - top) : 0.0F;
        sum += weight * part.y;
        const float* const row = reinterpret_cast<const float*>(first + i * kWarpBytes + kHeads * 8) + h * kHeadDim;
#pragma unroll
        for (int c = 0; c < kHeadDim / kWarp; ++c) acc[c] += weight * row[c * kWarp + lane];
      }
      float* const to = parts.out + (slot * kHeads + h) * kHeadDim;
#pragma unroll
      for (int c = 0; c < kHeadDim / kWarp; ++c) to[c * kWarp + lane] = acc[c];
      if (lane == 0) softmax[h] = make_float2(top, sum);
      if (lane > 0 && lane < run) softmax[lane * kHeads + h] = make_float2(-INFINITY, 0);
    }
  }
};

}  // namespace rotunda::kernels
