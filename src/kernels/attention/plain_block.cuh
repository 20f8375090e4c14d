#pragma once

#include "kernels/attention/paged_decode.cuh"
#include "kernels/cuda/sixteen_bit.cuh"

namespace rotunda::kernels {

/// Codec of a block of 16 tokens as PlainPageLayout has it: keys [head_dim][16], values [16][head_dim], both 16-bit floats of type T.
/// Keys and values are the left operands of the tensor cores' products, transposed as they come out of shared memory, so that tokens
/// (channels) are rows and the few query heads are the eight columns. A head has two columns: what T holds of the query (the
/// probability) and what that leaves over, so that only keys and values are of 16 bits.
/// @tparam kOfPage pages of kPageTokens; otherwise the exact tokens beside packed pages
/// @tparam kHeads kv heads that one of PagedDecode's stands for; the unit's head is one of them all the same
template <typename T, int kHeadDim, int kSets, bool kOfPage, int kPageTokens, int kHeads = 1>
struct PlainBlock {
  static constexpr int kUnitTokens = 16;
  static constexpr int kStageBytes = 16 * kHeadDim * 2;
  static constexpr int kMaxWarps = kSets == 1 && kHeadDim <= 128 ? 16 : 12;
  static constexpr int kSteps = kHeadDim / 16;
  using Convert = SixteenBit<T>;
  using State = WarpState<kHeadDim, kSets>;

  struct Query {
    uint32_t b[kSets][kSteps][2];
  };

  struct Weights {
    uint32_t b[kSets][2];  ///< probabilities of tokens 2t, 2t + 1 and 8 + 2t, 9 + 2t for column g
    float keep[kSets];     ///< what is left of the sums so far
  };

  static __device__ Query load_query(const PagedDecode& p, int seq, int head) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
    Query query;
    const int n_q = p.n_q / kHeads;
    const float* const base = (kOfPage ? p.q_pages : p.q_exact) + (int64_t{seq} * p.n_kv_heads * kHeads + head) * n_q * kHeadDim;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int h = 4 * s + g / 2;
      const float scale = h < n_q ? kLog2e : 0.0F;
      const float* const q = base + (h < n_q ? h : 0) * kHeadDim;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 x = *reinterpret_cast<const float2*>(q + 16 * k + 8 * half + 2 * t);
          query.b[s][k][half] = pack_two<T>(x.x * scale, x.y * scale, g % 2 != 0);
        }
      }
    }
    return query;
  }

  // 16-byte pieces lie where neighbouring rows of a matrix fall into different banks.
  static __device__ __forceinline__ int key_place(int piece) { return piece ^ (piece >> 3 & 1); }
  static __device__ __forceinline__ int value_place(int token, int piece) { return token * (kHeadDim / 8) + (piece ^ (token & 7)); }

  template <bool kValues>
  static __device__ __forceinline__ void copy(const PagedDecode& p, std::byte* stage, const UnitAt& at) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int blocks = kOfPage ? kPageTokens / 16 : p.exact_blocks;
    // Pages have less than 2^31 bytes.
    const int block = (at.head + (kValues ? p.n_kv_heads * kHeads : 0)) * blocks + at.piece;
    const std::byte* const from = at.bytes + static_cast<unsigned>(block * kStageBytes);
    constexpr int kRow = kHeadDim / 8;
    const int first = kValues ? value_place(lane / kRow, lane % kRow) : key_place(lane);
#pragma unroll
    for (int i = 0; i < kStageBytes / 16 / kWarp; ++i) {
      // The places of (32 i + lane): what i brings in changes no other bit.
      const int place = i * kWarp + (kValues ? first ^ (i * (kWarp / kRow) & 7) : first);
      ptx::copy_16_async(stage + 16 * place, from + 16 * (i * kWarp + lane));
    }
  }

  static __device__ __forceinline__ Weights attend_keys(const PagedDecode&, const std::byte* stage, const UnitAt& at, const Query& query,
                                                        State& state) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int matrix = lane / 8;
    const int row = lane % 8;
    float scores[kSets][4] = {};
    const std::byte* const keys = stage + 16 * key_place(2 * (matrix / 2 * 8 + row) + matrix % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      ptx::load_matrices_transposed(a, keys + 16 * 32 * k);
#pragma unroll
      for (int s = 0; s < kSets; ++s) ptx::mma(scores[s], a, query.b[s][k][0], query.b[s][k][1], T());
    }
    unsigned attended = at.tokens >= 16 ? 0xffffU : (1U << at.tokens) - 1;
    if (at.first > 0) attended &= 0xffffU << at.first;
    if (at.masks != nullptr) attended &= *at.masks;
    Weights weights;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float first = (attended >> g & 1U) != 0 ? scores[s][0] + scores[s][1] : -INFINITY;
      const float second = (attended >> (g + 8) & 1U) != 0 ? scores[s][2] + scores[s][3] : -INFINITY;
      const float top = fmaxf(state.max[s], max_over_rows(fmaxf(first, second)));
      const float base = top == -INFINITY ? 0.0F : top;
      weights.keep[s] = ptx::exp2_approximate(state.max[s] - base);
      const float p0 = ptx::exp2_approximate(first - base);
      const float p1 = ptx::exp2_approximate(second - base);
      state.max[s] = top;
      state.sum[s] = state.sum[s] * weights.keep[s] + p0 + p1;
      weights.b[s][0] = ptx::transpose_matrix(both_columns(p0));
      weights.b[s][1] = ptx::transpose_matrix(both_columns(p1));
    }
    return weights;
  }

  static __device__ __forceinline__ void add_values(const std::byte* stage, const Weights& weights, State& state) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int matrix = lane / 8;
    const int row = lane % 8;
    const int first = value_place(matrix / 2 * 8 + row, matrix % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      ptx::load_matrices_transposed(a, stage + 16 * (first ^ 2 * k));
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        float sum[4] = {};
        ptx::mma(sum, a, weights.b[s][0], weights.b[s][1], T());
        state.out[s][2 * k] = fmaf(state.out[s][2 * k], weights.keep[s], sum[0] + sum[1]);
        state.out[s][2 * k + 1] = fmaf(state.out[s][2 * k + 1], weights.keep[s], sum[2] + sum[3]);
      }
    }
  }

  /// A probability as T in the low half, what that leaves over in the high half.
  static __device__ __forceinline__ uint32_t both_columns(float x) {
    const T high = Convert::round(x);
    return Convert::bits(high) | Convert::bits(Convert::round(x - Convert::widen(high))) << 16;
  }

  static __device__ __forceinline__ void write_out(const State& state, float* to, int row) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int g = lane / 4;
    const int t = lane % 4;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        to[(4 * s + t) * row + 16 * k + g] = state.out[s][2 * k];
        to[(4 * s + t) * row + 16 * k + 8 + g] = state.out[s][2 * k + 1];
      }
    }
  }
};

}  // namespace rotunda::kernels
