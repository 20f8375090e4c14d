#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/decode_attention_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/highway.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/half.h"
#include "kernels/attention/decode_attention.h"
#include "kernels/attention/softmax-inl.h"
#include "kernels/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace rotunda::kernels {
namespace HWY_NAMESPACE {
namespace {

template <ElementType kType>
HWY_INLINE LaneVec LoadElements(const std::byte* at) {
  const LaneTag d;
  if constexpr (kType == ElementType::kFp32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(at));
  } else if constexpr (kType == ElementType::kBf16) {
    const hn::RebindToUnsigned<LaneTag> du;
    const hn::Rebind<uint16_t, LaneTag> d16;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(at)))));
  } else {
    const hn::Rebind<hwy::float16_t, LaneTag> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(at)));
  }
}

/// Scores of kHeads query heads against one block of keys.
/// @param q [kHeads][head_dim]  @param scores [kHeads] rows, `stride` apart
/// @param next what is read after this block, as many bytes, fetched meanwhile: the processor's own prefetcher begins anew with each
/// head, page and change between keys and values
template <ElementType kType, int kHeads>
HWY_INLINE void BlockScores(const std::byte* keys, const float* HWY_RESTRICT q, int head_dim, uint16_t mask, const std::byte* next,
                            float* HWY_RESTRICT scores, int64_t stride) {
  const LaneTag d;
  constexpr int kBytes = element_bytes(kType);
  // A sum waits 4 cycles for the one before it: few heads need several sums each to keep both multipliers busy.
  constexpr int kSums = kHeads == 1 ? 8 : kHeads == 2 ? 4 : 2;
  const LaneVec none = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
    LaneVec sum[kHeads * kSums];
    HWY_UNROLL(8)
    for (int i = 0; i < kHeads * kSums; ++i) sum[i] = hn::Zero(d);
    const std::byte* at = keys + lane * kBytes;
    for (int c = 0; c < head_dim; c += kSums) {
      if (lane == 0) {
        HWY_UNROLL(8)
        for (int o = 0; o < kSums * kTokenBlock * kBytes; o += 64) hwy::Prefetch(next + c * kTokenBlock * kBytes + o);
      }
      HWY_UNROLL(8)
      for (int k = 0; k < kSums; ++k) {
        const LaneVec key = LoadElements<kType>(at);
        at += kTokenBlock * kBytes;
        HWY_UNROLL(4)
        for (int h = 0; h < kHeads; ++h) {
          sum[h * kSums + k] = hn::MulAdd(key, hn::Set(d, q[h * head_dim + c + k]), sum[h * kSums + k]);
        }
      }
    }
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      LaneVec total = sum[h * kSums];
      HWY_UNROLL(8)
      for (int k = 1; k < kSums; ++k) total = hn::Add(total, sum[h * kSums + k]);
      hn::Store(IfAttended(mask, lane, total, none), d, scores + h * stride + lane);
    }
  }
}

/// acc += weights * values for kVectors vectors of channels of kHeads query heads, over the attended tokens of one block.
template <ElementType kType, int kHeads, int kVectors>
HWY_INLINE void BlockValues(const std::byte* values, int64_t row_bytes, uint16_t mask, const std::byte* next,
                            const float* HWY_RESTRICT weights, int64_t stride, float* HWY_RESTRICT acc, int head_dim) {
  const LaneTag d;
  constexpr int kBytes = element_bytes(kType);
  LaneVec sum[kHeads * kVectors];
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) sum[h * kVectors + v] = hn::LoadU(d, acc + h * head_dim + v * kLanes);
  }
  // Tokens left out may hold anything, NaN too: their rows are not read.
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int t = std::countr_zero(left);
    const std::byte* const row = values + t * row_bytes;
    HWY_UNROLL(4)
    for (int o = 0; o < kVectors * kLanes * kBytes; o += 64) hwy::Prefetch(next + t * row_bytes + o);
    LaneVec weight[kHeads];
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) weight[h] = hn::Set(d, weights[h * stride + t]);
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      const LaneVec value = LoadElements<kType>(row + v * kLanes * kBytes);
      HWY_UNROLL(4)
      for (int h = 0; h < kHeads; ++h) sum[h * kVectors + v] = hn::MulAdd(value, weight[h], sum[h * kVectors + v]);
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[h * kVectors + v], d, acc + h * head_dim + v * kLanes);
  }
}


/// kHeads query heads of the kv head, from `first` on, over one page.
template <ElementType kType, int kHeads>
HWY_NOINLINE void Page(const PlainDecodeParams& p, int page, int first, float* HWY_RESTRICT scores) {
  const LaneTag d;
  const PlainPageLayout& layout = p.layout;
  const int head_dim = layout.head_dim;
  const std::byte* const bytes = p.run.pages[page];
  const uint16_t* const masks = p.run.masks + int64_t{page} * layout.blocks_per_page;
  const int64_t tokens = layout.page_tokens();
  const LaneVec none = hn::Set(d, -std::numeric_limits<float>::infinity());
  const auto keys_of = [&](int block) { return bytes + layout.key_block_offset(p.kv_head, block); };
  const auto values_of = [&](int block) { return bytes + layout.value_row_offset(p.kv_head, int64_t{block} * kTokenBlock); };
  // The block after the last key block is the first value block; the one after that the next page's first key block, if it is wanted.
  const auto attended_from = [&](int block) {
    while (block < layout.blocks_per_page && masks[block] == 0) ++block;
    return block;
  };
  for (int block = 0; block < layout.blocks_per_page; ++block) {
    float* const to = scores + block * kTokenBlock;
    if (masks[block] == 0) {
      for (int h = 0; h < kHeads; ++h) {
        for (int lane = 0; lane < kTokenBlock; lane += kLanes) hn::Store(none, d, to + h * tokens + lane);
      }
      continue;
    }
    const int after = attended_from(block + 1);
    const std::byte* const next = after < layout.blocks_per_page ? keys_of(after) : values_of(attended_from(0));
    BlockScores<kType, kHeads>(keys_of(block), p.q + int64_t{first} * head_dim, head_dim, masks[block], next, to, tokens);
  }
  for (int h = 0; h < kHeads; ++h) {
    SoftmaxStep(scores + h * tokens, static_cast<int>(tokens), p.state.max + first + h, p.state.sum + first + h,
                p.state.acc + int64_t{first + h} * head_dim, head_dim);
  }
  const int64_t row_bytes = int64_t{head_dim} * element_bytes(kType);
  constexpr int kVectors = kLanes >= 8 ? 4 : 2;
  float* const acc = p.state.acc + int64_t{first} * head_dim;
  for (int block = 0; block < layout.blocks_per_page; ++block) {
    if (masks[block] == 0) continue;
    const float* const weights = scores + block * kTokenBlock;
    const std::byte* const values = values_of(block);
    const int after = attended_from(block + 1);
    const std::byte* next = values;
    if (after < layout.blocks_per_page) {
      next = values_of(after);
    } else if (page + 1 < p.run.n_pages && masks[layout.blocks_per_page] != 0) {
      next = p.run.pages[page + 1] + layout.key_block_offset(p.kv_head, 0);
    }
    int c = 0;
    for (; c + kVectors * kLanes <= head_dim; c += kVectors * kLanes) {
      BlockValues<kType, kHeads, kVectors>(values + c * element_bytes(kType), row_bytes, masks[block], next + c * element_bytes(kType), weights,
                                           tokens, acc + c, head_dim);
    }
    for (; c < head_dim; c += kLanes) {
      BlockValues<kType, kHeads, 1>(values + c * element_bytes(kType), row_bytes, masks[block], next + c * element_bytes(kType), weights, tokens,
                                    acc + c, head_dim);
    }
  }
}

template <ElementType kType>
void Run(const PlainDecodeParams& p) {
  static thread_local Scratch scratch;
  const int per_page = p.layout.blocks_per_page;
  float* const scores = scratch.floats(4 * p.layout.page_tokens());
  for (int page = 0; page < p.run.n_pages; ++page) {
    uint32_t any = 0;
    for (int block = 0; block < per_page; ++block) any |= p.run.masks[int64_t{page} * per_page + block];
    if (any == 0) continue;
    int first = 0;
    for (; first + 4 <= p.n_q; first += 4) Page<kType, 4>(p, page, first, scores);
    if (p.n_q - first == 3) Page<kType, 3>(p, page, first, scores);
    if (p.n_q - first == 2) Page<kType, 2>(p, page, first, scores);
    if (p.n_q - first == 1) Page<kType, 1>(p, page, first, scores);
  }
}

void DecodePlain(const PlainDecodeParams& p) {
  switch (p.layout.type) {
    case ElementType::kFp32: return Run<ElementType::kFp32>(p);
    case ElementType::kBf16: return Run<ElementType::kBf16>(p);
    case ElementType::kFp16: return Run<ElementType::kFp16>(p);
  }
}

template <ElementType kType>
void Load(const PlainPageLayout& layout, const std::byte* page, int head, int block, float* key_out, int64_t out_stride, float* value_out) {
  const LaneTag d;
  constexpr int kBytes = element_bytes(kType);
  const std::byte* const keys = page + layout.key_block_offset(head, block);
  for (int c = 0; c < layout.head_dim; ++c) {
    for (int lane = 0; lane < kTokenBlock; lane += kLanes) {
      hn::StoreU(LoadElements<kType>(keys + (int64_t{c} * kTokenBlock + lane) * kBytes), d, key_out + c * out_stride + lane);
    }
  }
  // The rows of a block are contiguous.
  const std::byte* const values = page + layout.value_row_offset(head, int64_t{block} * kTokenBlock);
  for (int64_t i = 0; i < int64_t{kTokenBlock} * layout.head_dim; i += kLanes) {
    hn::StoreU(LoadElements<kType>(values + i * kBytes), d, value_out + i);
  }
}

void LoadPlain(const PlainPageLayout& layout, const std::byte* page, int head, int block, float* key_out, int64_t out_stride,
               float* value_out) {
  switch (layout.type) {
    case ElementType::kFp32: return Load<ElementType::kFp32>(layout, page, head, block, key_out, out_stride, value_out);
    case ElementType::kBf16: return Load<ElementType::kBf16>(layout, page, head, block, key_out, out_stride, value_out);
    case ElementType::kFp16: return Load<ElementType::kFp16>(layout, page, head, block, key_out, out_stride, value_out);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace rotunda::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace rotunda::kernels {
namespace {

/// Writes one element; tells whether it was finite before and is after.
template <ElementType kType>
bool store_element(float x, std::byte* at) {
  const bool finite = std::isfinite(x);
  if constexpr (kType == ElementType::kFp32) {
    std::memcpy(at, &x, 4);
    return finite;
  } else if constexpr (kType == ElementType::kBf16) {
    const uint16_t bits = to_bfloat16(x).bits;
    std::memcpy(at, &bits, 2);
    return finite && (bits & 0x7f80u) != 0x7f80u;
  } else {
    const uint16_t bits = to_half(x).bits;
    std::memcpy(at, &bits, 2);
    return finite && (bits & 0x7c00u) != 0x7c00u;
  }
}

template <ElementType kType>
bool store(const PlainPageLayout& layout, const float* key, const float* value, int64_t row_stride, int64_t first, int64_t n_tokens,
           std::byte* page) {
  constexpr int kBytes = element_bytes(kType);
  const int head_dim = layout.head_dim;
  bool good = true;
  for (int64_t i = 0; i < n_tokens; ++i) {
    const int64_t t = first + i;
    for (int head = 0; head < layout.n_kv_heads; ++head) {
      const float* const k = key + i * row_stride + int64_t{head} * head_dim;
      const float* const v = value + i * row_stride + int64_t{head} * head_dim;
      std::byte* const keys = page + layout.key_block_offset(head, static_cast<int>(t / kTokenBlock)) + t % kTokenBlock * kBytes;
      std::byte* const values = page + layout.value_row_offset(head, t);
      for (int c = 0; c < head_dim; ++c) good &= store_element<kType>(k[c], keys + int64_t{c} * kTokenBlock * kBytes);
      for (int c = 0; c < head_dim; ++c) good &= store_element<kType>(v[c], values + int64_t{c} * kBytes);
    }
  }
  return good;
}

}  // namespace

HWY_EXPORT(DecodePlain);
HWY_EXPORT(LoadPlain);

void decode_plain(const PlainDecodeParams& params) { HWY_DYNAMIC_DISPATCH(DecodePlain)(params); }

void load_plain(const PlainPageLayout& layout, const std::byte* page, int head, int block, float* key_out, int64_t out_stride,
                float* value_out) {
  HWY_DYNAMIC_DISPATCH(LoadPlain)(layout, page, head, block, key_out, out_stride, value_out);
}

bool store_plain(const PlainPageLayout& layout, const float* key, const float* value, int64_t row_stride, int64_t first,
                 int64_t n_tokens, std::byte* page) {
  switch (layout.type) {
    case ElementType::kFp32: return store<ElementType::kFp32>(layout, key, value, row_stride, first, n_tokens, page);
    case ElementType::kBf16: return store<ElementType::kBf16>(layout, key, value, row_stride, first, n_tokens, page);
    case ElementType::kFp16: return store<ElementType::kFp16>(layout, key, value, row_stride, first, n_tokens, page);
  }
  return false;
}

void merge_softmax(const SoftmaxState& into, const SoftmaxState& from, int n_q, int head_dim) {
  for (int h = 0; h < n_q; ++h) {
    if (from.sum[h] == 0.0F) continue;  // nothing seen; both maxima may be -inf
    const float top = std::max(into.max[h], from.max[h]);
    const float mine = into.sum[h] == 0.0F ? 0.0F : std::exp(into.max[h] - top);
    const float theirs = std::exp(from.max[h] - top);
    into.max[h] = top;
    into.sum[h] = into.sum[h] * mine + from.sum[h] * theirs;
    float* const acc = into.acc + int64_t{h} * head_dim;
    const float* const other = from.acc + int64_t{h} * head_dim;
    for (int c = 0; c < head_dim; ++c) acc[c] = acc[c] * mine + other[c] * theirs;
  }
}

void finish_softmax(const SoftmaxState& state, int n_q, int head_dim, float* out) {
  for (int h = 0; h < n_q; ++h) {
    const float factor = state.sum[h] == 0.0F ? 0.0F : 1.0F / state.sum[h];
    for (int c = 0; c < head_dim; ++c) out[int64_t{h} * head_dim + c] = state.acc[int64_t{h} * head_dim + c] * factor;
  }
}

}  // namespace rotunda::kernels
#endif  // HWY_ONCE
