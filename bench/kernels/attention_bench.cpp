// Decode attention of one layer of Llama-3-8B's shape (32 query heads, 8 kv heads, head dimension 128), one new token:
// our kernels over pages beside LibTorch's scaled_dot_product_attention and beside a plain read of the same bytes.
// Each kernel is checked against its reference first; a wrong kernel is not timed.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/attention/decode_attention.h"
#include "kernels/attention/decode_attention_ref.h"
#include "kv/grouped/kernels/grouped_codec.h"
#include "kv/grouped/kernels/grouped_codec_ref.h"
#include "kv/house/kernels/house_codec.h"
#include "kv/house/kernels/house_codec_ref.h"
#include "kv/rotate/kernels/rotate_codec.h"
#include "kv/rotate/kernels/rotate_codec_ref.h"

namespace rotunda {
namespace {

using kernels::ElementType;
using kv::rotate::RotateLayer;
using kv::rotate::RotatePageLayout;
using kv::rotate::ZeroPoint;

constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kHeadDim = 128;
constexpr int kRep = kHeads / kKvHeads;
constexpr int kChannels = kKvHeads * kHeadDim;
constexpr int kBlocks = 8;
constexpr int kPageTokens = kBlocks * 16;
constexpr int kRotated = 4;  // heads of one rotation

struct Free {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Bytes = std::unique_ptr<std::byte, Free>;

Bytes allocate(int64_t size) {
  Bytes bytes(static_cast<std::byte*>(::operator new(size, std::align_val_t{64})));
  std::memset(bytes.get(), 0, size);
  return bytes;
}

std::vector<float> normal_rows(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = normal(random);
  return x;
}

struct Pages {
  std::vector<Bytes> owned;
  std::vector<const std::byte*> pointers;
  std::vector<uint16_t> masks;
  int64_t bytes = 0;

  Pages(int n_pages, int64_t page_bytes) : masks(static_cast<size_t>(n_pages) * kBlocks, 0xffff), bytes(n_pages * page_bytes) {
    for (int i = 0; i < n_pages; ++i) {
      owned.push_back(allocate(page_bytes));
      pointers.push_back(owned.back().get());
    }
  }
  kernels::PageRun run(int first, int last) const { return {pointers.data() + first, masks.data() + first * kBlocks, last - first}; }
};

struct State {
  std::vector<float> max, sum, acc;
  explicit State(int n_q) : max(n_q, -std::numeric_limits<float>::infinity()), sum(n_q), acc(static_cast<size_t>(n_q) * kHeadDim) {}
  kernels::SoftmaxState view() { return {max.data(), sum.data(), acc.data()}; }
};

std::vector<float> queries() {
  std::vector<float> q = normal_rows(int64_t{kHeads} * kHeadDim, 7);
  for (float& x : q) x /= std::sqrt(static_cast<float>(kHeadDim));
  return q;
}

/// Runs `kernel(group, first page, last page, state)` for every (head group, part of the pages) on all threads and merges the parts.
template <typename Kernel>
std::vector<float> run_split(int n_groups, int n_pages, const Kernel& kernel) {
  const int n_q = kHeads / n_groups;
  const int threads = at::get_num_threads();
  // A few pieces per thread, so that a late thread costs little; not more than there are pages.
  const int parts = std::max(1, std::min(n_pages, (2 * threads + n_groups - 1) / n_groups));
  std::vector<State> states(static_cast<size_t>(n_groups) * parts, State(n_q));
  at::parallel_for(0, n_groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int part = static_cast<int>(i % parts);
      kernel(static_cast<int>(i / parts), n_pages * part / parts, n_pages * (part + 1) / parts, states[i].view());
    }
  });
  std::vector<float> out(static_cast<size_t>(kHeads) * kHeadDim);
  for (int group = 0; group < n_groups; ++group) {
    State& into = states[static_cast<size_t>(group) * parts];
    for (int part = 1; part < parts; ++part) kernels::merge_softmax(into.view(), states[static_cast<size_t>(group) * parts + part].view(), n_q, kHeadDim);
    kernels::finish_softmax(into.view(), n_q, kHeadDim, out.data() + static_cast<int64_t>(group) * n_q * kHeadDim);
  }
  return out;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::fabs(static_cast<double>(a[i]) - b[i]));
  return largest;
}

// The plainest reader: one wide addition per 64 bytes, so that memory alone sets the time.
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3"))) uint64_t sum_words(const uint64_t* words, int64_t n) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += words[i];
  return sum;
}

// Reads n bytes once on all threads. `pieces` is counted outside: inside a parallel region the number of threads reads 1.
void read_all(const std::byte* data, int64_t n, int pieces) {
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    const int64_t chunk = n / 8 / pieces;
    benchmark::DoNotOptimize(sum_words(reinterpret_cast<const uint64_t*>(data) + begin * chunk, (end - begin) * chunk));
  });
}

/// GB/s of reading memory by the threads of this process, best of a few: what the share of bandwidth refers to.
double read_bandwidth() {
  static const double best = [] {
    const int64_t n = int64_t{128} << 20;
    const Bytes data = allocate(n);
    double fastest = std::numeric_limits<double>::infinity();
    const int pieces = 2 * at::get_num_threads();
    for (int repeat = 0; repeat < 12; ++repeat) {
      const auto start = std::chrono::steady_clock::now();
      read_all(data.get(), n, pieces);
      fastest = std::min(fastest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return static_cast<double>(n) / fastest * 1e-9;
  }();
  return best;
}

void count(benchmark::State& state, int64_t tokens, int64_t bytes) {
  const double seconds = 1e-9;
  state.counters["tokens"] = static_cast<double>(tokens);
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(bytes) * seconds, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["of_read"] =
      benchmark::Counter(static_cast<double>(bytes) * seconds / read_bandwidth(), benchmark::Counter::kIsIterationInvariantRate);
}

void BM_read(benchmark::State& state) {
  const int64_t tokens = state.range(0);
  const int64_t n = tokens * kChannels * 2 * 2;
  const Bytes data = allocate(n);
  const int pieces = 2 * at::get_num_threads();
  for (auto _ : state) {
    read_all(data.get(), n, pieces);
  }
  count(state, tokens, n);
}

void BM_decode_plain(benchmark::State& state, ElementType type) {
  const auto tokens = static_cast<int>(state.range(0));
  const kernels::PlainPageLayout layout{type, kKvHeads, kHeadDim, kBlocks};
  const int n_pages = tokens / kPageTokens;
  const Pages pages(n_pages, layout.page_bytes());
  const std::vector<float> key = normal_rows(int64_t{kPageTokens} * kChannels, 1);
  const std::vector<float> value = normal_rows(int64_t{kPageTokens} * kChannels, 2);
  for (int i = 0; i < n_pages; ++i) {
    if (!kernels::store_plain(layout, key.data() + i % 7, value.data() + i % 5, kChannels, 0, kPageTokens - 1, pages.owned[i].get())) return state.SkipWithError("store_plain");
  }
  const std::vector<float> q = queries();
  const auto with = [&](const auto& kernel, int pages_used) {
    return run_split(kKvHeads, pages_used, [&](int head, int first, int last, kernels::SoftmaxState into) {
      kernel(kernels::PlainDecodeParams{layout, pages.run(first, last), head, kRep, q.data() + int64_t{head} * kRep * kHeadDim, into});
    });
  };
  if (largest_difference(with(kernels::decode_plain, 4), with(kernels::decode_plain_ref, 4)) > 1e-5) return state.SkipWithError("differs from the reference");
  for (auto _ : state) benchmark::DoNotOptimize(with(kernels::decode_plain, n_pages));
  count(state, tokens, pages.bytes);
}

/// cos and sin of the first positions of pages and of the positions within a page, Llama 3's frequencies.
struct RopeTables {
  std::vector<float> page_cos, page_sin, token_cos, token_sin;

  explicit RopeTables(int n_pages) : token_cos(kPageTokens * kHalf), token_sin(kPageTokens * kHalf) {
    for (int i = 0; i < kHalf; ++i) {
      const double f = std::pow(500000.0, -i / static_cast<double>(kHalf));
      for (int t = 0; t < kPageTokens; ++t) {
        token_cos[(t / 16 * kHalf + i) * 16 + t % 16] = static_cast<float>(std::cos(t * f));
        token_sin[(t / 16 * kHalf + i) * 16 + t % 16] = static_cast<float>(std::sin(t * f));
      }
    }
    for (int page = 0; page < n_pages; ++page) {
      for (int i = 0; i < kHalf; ++i) {
        const double angle = page * kPageTokens * std::pow(500000.0, -i / static_cast<double>(kHalf));
        page_cos.push_back(static_cast<float>(std::cos(angle)));
        page_sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }

 private:
  static constexpr int kHalf = kHeadDim / 2;
};

struct Rotated {
  RotateLayer layer;
  std::vector<uint16_t> group;
  std::vector<float> key = normal_rows(int64_t{kPageTokens} * kChannels, 1);
  std::vector<float> value = normal_rows(int64_t{kPageTokens} * kChannels, 2);

  Rotated(int bits, ZeroPoint zero) : group(kChannels) {
    layer.layout = {bits, zero, kKvHeads, kHeadDim, kRotated, 128, kBlocks};
    std::vector<int> order(kChannels);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(5);
    std::shuffle(order.begin(), order.end(), random);
    for (int i = 0; i < kChannels; ++i) group[order[i]] = static_cast<uint16_t>(i / 128);
    layer.key_group = group.data();
    layer.key_hadamard = kernels::hadamard_plan(kRotated * kHeadDim);
  }
  Rotated(const Rotated&) = delete;
};

void BM_rotate_decode(benchmark::State& state, int bits, ZeroPoint zero) {
  const auto tokens = static_cast<int>(state.range(0));
  const Rotated r(bits, zero);
  const RotatePageLayout& layout = r.layer.layout;
  const int n_pages = tokens / kPageTokens;
  const Pages pages(n_pages, layout.page_bytes());
  for (int i = 0; i < n_pages; ++i) {
    for (int block = 0; block < kBlocks; ++block) {
      const int64_t row = int64_t{(block + i) % kBlocks} * 16 * kChannels;
      if (!kv::rotate::rotate_store({&r.layer, r.key.data() + row, r.value.data() + row, kChannels, block, 0, 16, pages.owned[i].get()})) {
        return state.SkipWithError("rotate_store");
      }
    }
  }
  constexpr int kHalf = kHeadDim / 2;
  const RopeTables rope(n_pages);
  const std::vector<float> q = queries();
  const auto with = [&](const auto& kernel, int pages_used) {
    return run_split(kKvHeads / kRotated, pages_used, [&](int group, int first, int last, kernels::SoftmaxState into) {
      kernel(kv::rotate::RotateDecodeParams{&r.layer, pages.run(first, last), group, kRep, q.data() + int64_t{group} * kRotated * kRep * kHeadDim,
                                            rope.page_cos.data() + first * kHalf, rope.page_sin.data() + first * kHalf, rope.token_cos.data(),
                                            rope.token_sin.data(), into});
    });
  };
  if (largest_difference(with(kv::rotate::rotate_decode, 2), with(kv::rotate::rotate_decode_ref, 2)) > 1e-5) {
    return state.SkipWithError("differs from the reference");
  }
  for (auto _ : state) benchmark::DoNotOptimize(with(kv::rotate::rotate_decode, n_pages));
  count(state, tokens, pages.bytes);
  state.counters["x_smaller"] = static_cast<double>(tokens) * kChannels * 4 / static_cast<double>(pages.bytes);
}

struct House {
  kv::house::HouseLayer layer;
  std::vector<float> feedback;
  std::vector<float> key = normal_rows(int64_t{kPageTokens} * kChannels, 1);
  std::vector<float> value = normal_rows(int64_t{kPageTokens} * kChannels, 2);

  explicit House(int bits) : feedback(normal_rows(int64_t{kChannels} * kHeadDim, 3)) {
    for (float& x : feedback) x = 0.05F * std::fabs(x);
    layer.layout = {bits, bits, kKvHeads, kHeadDim, kBlocks};
    layer.feedback = feedback.data();
    layer.hadamard = kernels::hadamard_plan(kHeadDim);
  }
  House(const House&) = delete;
};

/// @param n_pairs RoPE pairs that have a shift
void BM_house_decode(benchmark::State& state, int bits, int n_pairs) {
  const auto tokens = static_cast<int>(state.range(0));
  const House house(bits);
  const kv::house::HousePageLayout& layout = house.layer.layout;
  const int n_pages = tokens / kPageTokens;
  const Pages pages(n_pages, layout.page_bytes());
  for (int i = 0; i < n_pages; ++i) {
    for (int block = 0; block < kBlocks; ++block) {
      const int64_t row = int64_t{(block + i) % kBlocks} * 16 * kChannels;
      if (!kv::house::house_store({&house.layer, house.key.data() + row, house.value.data() + row, kChannels, block, 0, 16, pages.owned[i].get()})) {
        return state.SkipWithError("house_store");
      }
    }
  }
  const RopeTables rope(n_pages);
  std::vector<uint16_t> pairs(n_pairs);
  for (int i = 0; i < n_pairs; ++i) pairs[i] = static_cast<uint16_t>(kHeadDim / 2 - n_pairs + i);
  std::vector<float> a = normal_rows(int64_t{kHeads} * n_pairs, 4);
  std::vector<float> b = normal_rows(int64_t{kHeads} * n_pairs, 5);
  for (float& x : a) x *= 0.1F;
  for (float& x : b) x *= 0.1F;
  const std::vector<float> q = queries();
  const auto with = [&](const auto& kernel, int pages_used) {
    return run_split(kKvHeads, pages_used, [&](int head, int first, int last, kernels::SoftmaxState into) {
      const int64_t at = int64_t{head} * kRep * n_pairs;
      const kv::house::ShiftTerm shift{n_pairs, pairs.data(), a.data() + at, b.data() + at, rope.page_cos.data() + first * kHeadDim / 2,
                                       rope.page_sin.data() + first * kHeadDim / 2, rope.token_cos.data(), rope.token_sin.data()};
      kernel(kv::house::HouseDecodeParams{&house.layer, pages.run(first, last), head, kRep, q.data() + int64_t{head} * kRep * kHeadDim, shift, into});
    });
  };
  // The reference takes the query as it is, the kernel rounds it to 8 bits.
  if (largest_difference(with(kv::house::house_decode, 4), with(kv::house::house_decode_ref, 4)) > 5e-3) {
    return state.SkipWithError("differs from the reference");
  }
  for (auto _ : state) benchmark::DoNotOptimize(with(kv::house::house_decode, n_pages));
  count(state, tokens, pages.bytes);
  state.counters["x_smaller"] = static_cast<double>(tokens) * kChannels * 4 / static_cast<double>(pages.bytes);
}

using kv::grouped::GroupedCodec;
using kv::grouped::GroupedLayer;
using kv::grouped::GroupedSide;
using kv::grouped::Levels;
using kv::grouped::Rule;
using kv::grouped::ScaleType;

void BM_grouped_decode(benchmark::State& state, GroupedSide side, GroupedCodec codec) {
  const auto tokens = static_cast<int>(state.range(0));
  const GroupedLayer layer{{side, side, kKvHeads, kHeadDim, kBlocks}, codec, codec};
  const int n_pages = tokens / kPageTokens;
  const Pages pages(n_pages, layer.layout.page_bytes());
  const std::vector<float> key = normal_rows(int64_t{kPageTokens} * kChannels, 1);
  const std::vector<float> value = normal_rows(int64_t{kPageTokens} * kChannels, 2);
  for (int i = 0; i < n_pages; ++i) {
    for (int block = 0; block < kBlocks; ++block) {
      const int64_t row = int64_t{(block + i) % kBlocks} * 16 * kChannels;
      if (!kv::grouped::grouped_store({&layer, key.data() + row, value.data() + row, kChannels, block, 0, 16, pages.owned[i].get()})) {
        return state.SkipWithError("grouped_store");
      }
    }
  }
  const std::vector<float> q = queries();
  const auto with = [&](const auto& kernel, int pages_used) {
    return run_split(kKvHeads, pages_used, [&](int head, int first, int last, kernels::SoftmaxState into) {
      kernel(kv::grouped::GroupedDecodeParams{&layer, pages.run(first, last), head, kRep, q.data() + int64_t{head} * kRep * kHeadDim, into});
    });
  };
  // The reference takes the query as it is, the kernel rounds it to 8 bits.
  if (largest_difference(with(kv::grouped::grouped_decode, 2), with(kv::grouped::grouped_decode_ref, 2)) > 5e-3) {
    return state.SkipWithError("differs from the reference");
  }
  for (auto _ : state) benchmark::DoNotOptimize(with(kv::grouped::grouped_decode, n_pages));
  count(state, tokens, pages.bytes);
  state.counters["x_smaller"] = static_cast<double>(tokens) * kChannels * 4 / static_cast<double>(pages.bytes);
}

constexpr GroupedSide kInt2{2, kHeadDim, ScaleType::kFp16, 0, true};
constexpr GroupedSide kInt8{8, kHeadDim, ScaleType::kFp16, 0, true};
constexpr GroupedSide kBfp4{4, 32, ScaleType::kE8m0, 149, false};
constexpr GroupedSide kQ8{8, 32, ScaleType::kFp16, 0, false};
constexpr GroupedSide kFp8{8, kHeadDim, ScaleType::kFp16, 0, false};

enum class Arrangement { kStacked, kExpanded, kGqa };

void BM_sdpa(benchmark::State& state, at::ScalarType type, Arrangement arrangement) {
  const c10::InferenceMode guard;
  const int64_t tokens = state.range(0);
  const at::Tensor k = at::randn({1, kKvHeads, tokens, kHeadDim}).to(type);
  const at::Tensor v = at::randn({1, kKvHeads, tokens, kHeadDim}).to(type);
  const at::Tensor q = at::randn({1, kHeads, 1, kHeadDim}).to(type);
  const auto attend = [&](Arrangement how) {
    switch (how) {
      case Arrangement::kStacked: return at::scaled_dot_product_attention(q.view({1, kKvHeads, kRep, kHeadDim}), k, v).view({1, kHeads, 1, kHeadDim});
      case Arrangement::kExpanded: {
        const auto expand = [&](const at::Tensor& x) {
          return x.unsqueeze(2).expand({1, kKvHeads, kRep, tokens, kHeadDim}).reshape({1, kHeads, tokens, kHeadDim});
        };
        return at::scaled_dot_product_attention(q, expand(k), expand(v));
      }
      default: return at::scaled_dot_product_attention(q, k, v, {}, 0.0, false, {}, /*enable_gqa=*/true);
    }
  };
  if ((attend(arrangement).to(at::kFloat) - attend(Arrangement::kStacked).to(at::kFloat)).abs().max().item<float>() > 0.02F) {
    return state.SkipWithError("arrangements differ");
  }
  for (auto _ : state) benchmark::DoNotOptimize(attend(arrangement));
  count(state, tokens, tokens * kChannels * 2 * at::elementSize(type));
}

/// Stores `range(0)` tokens per call, walking through the blocks of a page.
void BM_rotate_store(benchmark::State& state, int bits, ZeroPoint zero) {
  const auto n = static_cast<int>(state.range(0));
  const Rotated r(bits, zero);
  const Bytes page = allocate(r.layer.layout.page_bytes());
  const Bytes want = allocate(r.layer.layout.page_bytes());
  kv::rotate::RotateStoreParams p{&r.layer, r.key.data(), r.value.data(), kChannels, 0, 0, n, page.get()};
  const bool good = kv::rotate::rotate_store(p);
  p.page = want.get();
  if (!good || !kv::rotate::rotate_store_ref(p) || std::memcmp(page.get(), want.get(), r.layer.layout.page_bytes()) != 0) {
    return state.SkipWithError("differs from the reference");
  }
  p.page = page.get();
  int64_t token = 0;
  for (auto _ : state) {
    p.block = static_cast<int>(token / 16 % kBlocks);
    p.first = static_cast<int>(token % 16);
    p.key = r.key.data() + token % kPageTokens * kChannels;
    p.value = r.value.data() + token % kPageTokens * kChannels;
    benchmark::DoNotOptimize(kv::rotate::rotate_store(p));
    token += n;
  }
  state.counters["us/token"] = benchmark::Counter(static_cast<double>(n) * 1e-6, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(n) * kChannels * 8e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void BM_house_store(benchmark::State& state, int bits) {
  const auto n = static_cast<int>(state.range(0));
  const House house(bits);
  const Bytes page = allocate(house.layer.layout.page_bytes());
  const Bytes want = allocate(house.layer.layout.page_bytes());
  kv::house::HouseStoreParams p{&house.layer, house.key.data(), house.value.data(), kChannels, 0, 0, n, page.get()};
  const bool good = kv::house::house_store(p);
  p.page = want.get();
  if (!good || !kv::house::house_store_ref(p) || std::memcmp(page.get(), want.get(), house.layer.layout.page_bytes()) != 0) {
    return state.SkipWithError("differs from the reference");
  }
  p.page = page.get();
  int64_t token = 0;
  for (auto _ : state) {
    p.block = static_cast<int>(token / 16 % kBlocks);
    p.first = static_cast<int>(token % 16);
    p.key = house.key.data() + token % kPageTokens * kChannels;
    p.value = house.value.data() + token % kPageTokens * kChannels;
    benchmark::DoNotOptimize(kv::house::house_store(p));
    token += n;
  }
  state.counters["us/token"] = benchmark::Counter(static_cast<double>(n) * 1e-6, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.counters["us/token/head"] =
      benchmark::Counter(static_cast<double>(n) * kKvHeads * 1e-6, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void BM_store_plain(benchmark::State& state, ElementType type) {
  const auto n = static_cast<int>(state.range(0));
  const kernels::PlainPageLayout layout{type, kKvHeads, kHeadDim, kBlocks};
  const std::vector<float> rows = normal_rows(int64_t{kPageTokens} * kChannels, 1);
  const Bytes page = allocate(layout.page_bytes());
  int64_t token = 0;
  for (auto _ : state) {
    const float* const row = rows.data() + token * kChannels;
    benchmark::DoNotOptimize(store_plain(layout, row, row, kChannels, token, n, page.get()));
    token = (token + n) % kPageTokens;
  }
  state.counters["us/token"] = benchmark::Counter(static_cast<double>(n) * 1e-6, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

/// One block of one rotation group to fp32, what prefill does for each tile.
void BM_rotate_load(benchmark::State& state, int bits) {
  const Rotated r(bits, ZeroPoint::kCode);
  const Bytes page = allocate(r.layer.layout.page_bytes());
  if (!kv::rotate::rotate_store({&r.layer, r.key.data(), r.value.data(), kChannels, 0, 0, 16, page.get()})) return state.SkipWithError("rotate_store");
  const std::vector<float> angle(kHeadDim / 2 * 16, 0.5F);
  std::vector<float> key(kRotated * kHeadDim * 16);
  std::vector<float> value(kRotated * kHeadDim * 16);
  for (auto _ : state) {
    kv::rotate::rotate_load({&r.layer, page.get(), 0, 0, angle.data(), angle.data(), key.data(), 16, value.data(), 16 * kHeadDim});
    benchmark::ClobberMemory();
  }
}

/// One block of one kv head to fp32.
void BM_house_load(benchmark::State& state, int bits) {
  const House house(bits);
  const Bytes page = allocate(house.layer.layout.page_bytes());
  if (!kv::house::house_store({&house.layer, house.key.data(), house.value.data(), kChannels, 0, 0, 16, page.get()})) return state.SkipWithError("house_store");
  std::vector<float> key(kHeadDim * 16);
  std::vector<float> value(kHeadDim * 16);
  for (auto _ : state) {
    kv::house::house_load({&house.layer, page.get(), 0, 0, nullptr, nullptr, key.data(), 16, value.data()});
    benchmark::ClobberMemory();
  }
}

void lengths(benchmark::internal::Benchmark* b) {
  b->Arg(4096)->Arg(8192)->Arg(32768)->Unit(benchmark::kMillisecond)->UseRealTime()->Repetitions(5)->ReportAggregatesOnly();
}

void counts(benchmark::internal::Benchmark* b) { b->Arg(1)->Arg(16)->Unit(benchmark::kMicrosecond)->Repetitions(5)->ReportAggregatesOnly(); }

BENCHMARK(BM_read)->Apply(lengths);
BENCHMARK_CAPTURE(BM_sdpa, bf16_stacked, at::kBFloat16, Arrangement::kStacked)->Apply(lengths);
BENCHMARK_CAPTURE(BM_sdpa, bf16_expanded, at::kBFloat16, Arrangement::kExpanded)->Apply(lengths);
BENCHMARK_CAPTURE(BM_sdpa, bf16_gqa, at::kBFloat16, Arrangement::kGqa)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode_plain, bf16, ElementType::kBf16)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode_plain, fp16, ElementType::kFp16)->Apply(lengths);
BENCHMARK_CAPTURE(BM_rotate_decode, 2bit, 2, ZeroPoint::kCode)->Apply(lengths);
BENCHMARK_CAPTURE(BM_rotate_decode, 2bit_minimum, 2, ZeroPoint::kMinimum)->Apply(lengths);
BENCHMARK_CAPTURE(BM_rotate_decode, 3bit, 3, ZeroPoint::kCode)->Apply(lengths);
BENCHMARK_CAPTURE(BM_rotate_decode, 4bit, 4, ZeroPoint::kCode)->Apply(lengths);
BENCHMARK_CAPTURE(BM_house_decode, rotunda2, 2, 0)->Apply(lengths);
BENCHMARK_CAPTURE(BM_house_decode, rotunda3, 3, 0)->Apply(lengths);
BENCHMARK_CAPTURE(BM_house_decode, rotunda4, 4, 0)->Apply(lengths);
BENCHMARK_CAPTURE(BM_house_decode, rotunda2_shift16, 2, 16)->Apply(lengths);
BENCHMARK_CAPTURE(BM_house_decode, rotunda2_shift64, 2, 64)->Apply(lengths);
BENCHMARK_CAPTURE(BM_grouped_decode, quarot2, kInt2, GroupedCodec{})->Apply(lengths);
BENCHMARK_CAPTURE(BM_grouped_decode, bfp4, kBfp4, GroupedCodec{.rule = Rule::kBlockFloat})->Apply(lengths);
BENCHMARK_CAPTURE(BM_grouped_decode, int8, kInt8, GroupedCodec{})->Apply(lengths);
BENCHMARK_CAPTURE(BM_grouped_decode, q8_0, kQ8, GroupedCodec{.rule = Rule::kLargestToTop})->Apply(lengths);
BENCHMARK_CAPTURE(BM_grouped_decode, fp8, kFp8, GroupedCodec{.levels = Levels::kE4m3, .rule = Rule::kLargestToTop})->Apply(lengths);
BENCHMARK_CAPTURE(BM_rotate_store, 2bit, 2, ZeroPoint::kCode)->Apply(counts);
BENCHMARK_CAPTURE(BM_rotate_store, 2bit_minimum, 2, ZeroPoint::kMinimum)->Apply(counts);
BENCHMARK_CAPTURE(BM_rotate_store, 3bit, 3, ZeroPoint::kCode)->Apply(counts);
BENCHMARK_CAPTURE(BM_rotate_store, 4bit, 4, ZeroPoint::kCode)->Apply(counts);
BENCHMARK_CAPTURE(BM_house_store, rotunda2, 2)->Apply(counts);
BENCHMARK_CAPTURE(BM_house_store, rotunda3, 3)->Apply(counts);
BENCHMARK_CAPTURE(BM_house_store, rotunda4, 4)->Apply(counts);
BENCHMARK_CAPTURE(BM_store_plain, bf16, ElementType::kBf16)->Apply(counts);
BENCHMARK_CAPTURE(BM_store_plain, fp16, ElementType::kFp16)->Apply(counts);
BENCHMARK_CAPTURE(BM_rotate_load, 2bit, 2)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(BM_house_load, rotunda2, 2)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace rotunda

BENCHMARK_MAIN();
