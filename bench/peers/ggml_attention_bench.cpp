// A peer of attention_bench: decode attention of llama.cpp (ggml's CPU backend) on one layer of Llama-3-8B's shape
// (32 query heads, 8 kv heads, head dimension 128), one new token, on 16-bit and on quantized caches; what storing a
// token costs it, and what its rotations around a quantized cache cost. Each graph is checked against double precision
// first; a wrong one is not timed. Built by scripts/bench_peers.sh, outside the CMake build.

#include <benchmark/benchmark.h>
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace rotunda {
namespace {

constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kHeadDim = 128;
constexpr int kRep = kHeads / kKvHeads;
constexpr int kChannels = kKvHeads * kHeadDim;
constexpr int kRepetitions = 15;
constexpr int64_t kEvictBytes = int64_t{128} << 20;  // four times this machine's L3

const int kThreads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));

bool failed = false;

void fail(benchmark::State& state, const std::string& what) {
  failed = true;
  state.SkipWithError(what.c_str());
}

/// One graph on the CPU backend: the caller makes tensors in `context`, then calls `build`.
class Graph {
 public:
  Graph()
      : backend_(ggml_backend_cpu_init()),
        context_(ggml_init({64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true})) {
    ggml_backend_cpu_set_n_threads(backend_.get(), kThreads);
  }
  ggml_context* context() const { return context_.get(); }

  /// Allocates every tensor and orders the operations that `outputs` need.
  void build(const std::vector<ggml_tensor*>& outputs) {
    buffer_.reset(ggml_backend_alloc_ctx_tensors(context(), backend_.get()));
    graph_ = ggml_new_graph(context());
    for (ggml_tensor* output : outputs) ggml_build_forward_expand(graph_, output);
  }
  bool compute() const { return ggml_backend_graph_compute(backend_.get(), graph_) == GGML_STATUS_SUCCESS; }

 private:
  ggml_backend_ptr backend_;
  ggml_context_ptr context_;
  ggml_backend_buffer_ptr buffer_;
  ggml_cgraph* graph_ = nullptr;
};

std::vector<float> normal_rows(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = normal(random);
  return x;
}

/// [rows, columns] fp32 as ggml's blocks of `type`.
std::vector<uint8_t> quantized(ggml_type type, const std::vector<float>& x, int64_t columns) {
  const int64_t rows = static_cast<int64_t>(x.size()) / columns;
  std::vector<uint8_t> blocks(rows * ggml_row_size(type, columns));
  ggml_quantize_chunk(type, x.data(), blocks.data(), 0, rows, columns, nullptr);
  return blocks;
}

std::vector<float> dequantized(ggml_type type, const void* blocks, int64_t count) {
  std::vector<float> x(count);
  if (type == GGML_TYPE_F32) {
    std::memcpy(x.data(), blocks, count * sizeof(float));
  } else {
    ggml_get_type_traits(type)->to_float(blocks, x.data(), count);
  }
  return x;
}

/// What ggml makes of `x` before it multiplies it with rows of `type`.
std::vector<float> rounded_for(ggml_type type, const std::vector<float>& x) {
  const ggml_type with = ggml_get_type_traits_cpu(type)->vec_dot_type;
  const auto count = static_cast<int64_t>(x.size());
  std::vector<uint8_t> blocks(ggml_row_size(with, count));
  ggml_get_type_traits_cpu(with)->from_float(x.data(), blocks.data(), count);
  return dequantized(with, blocks.data(), count);
}

std::vector<float> contents(const ggml_tensor* tensor) {
  return dequantized(tensor->type, tensor->data, ggml_nelements(tensor));
}

double nmse(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0, power = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    power += want[i] * want[i];
  }
  return error / power;  // NaN passes no bound
}

/// softmax(q k^T / sqrt(head_dim)) v in double. q [kHeads, kHeadDim], k and v [tokens, kChannels]; [kHeads, kHeadDim] out.
std::vector<double> attend(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v) {
  const auto tokens = static_cast<int64_t>(k.size()) / kChannels;
  std::vector<double> out(kHeads * kHeadDim), weight(tokens);
  for (int head = 0; head < kHeads; ++head) {
    const float* const query = q.data() + head * kHeadDim;
    const int64_t first = head / kRep * kHeadDim;
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t t = 0; t < tokens; ++t) {
      double dot = 0;
      for (int d = 0; d < kHeadDim; ++d) dot += static_cast<double>(query[d]) * k[t * kChannels + first + d];
      weight[t] = dot / std::sqrt(static_cast<double>(kHeadDim));
      largest = std::max(largest, weight[t]);
    }
    double sum = 0;
    for (double& w : weight) sum += w = std::exp(w - largest);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int d = 0; d < kHeadDim; ++d) out[head * kHeadDim + d] += weight[t] / sum * v[t * kChannels + first + d];
    }
  }
  return out;
}

/// Reads `words` once on all threads, the rate that memory alone allows.
void read_all(const std::vector<uint64_t>& words) {
  std::vector<std::jthread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&words, i] {
      const size_t chunk = words.size() / kThreads;
      uint64_t sum = 0;
      for (size_t j = i * chunk; j < (i + 1) * chunk; ++j) sum += words[j];
      benchmark::DoNotOptimize(sum);
    });
  }
}

double seconds_of(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// GB/s of reading memory by the threads of this process, best of a few: what the share of bandwidth refers to.
double read_bandwidth() {
  static const double best = [] {
    const std::vector<uint64_t> words(kEvictBytes / sizeof(uint64_t), 1);
    double fastest = std::numeric_limits<double>::infinity();
    for (int repeat = 0; repeat < 12; ++repeat) fastest = std::min(fastest, seconds_of([&] { read_all(words); }));
    return static_cast<double>(kEvictBytes) / fastest * 1e-9;
  }();
  return best;
}

enum class Path {
  kFlash,  // one flash attention node; the only path of a quantized V
  kPlain,  // two matrix products around a softmax, V stored transposed (`--flash-attn off`)
};

/// Largest nmse against the reference on the query as ggml rounds it. The fp16 cache sums V in fp16 on the flash path
/// (a random walk, one rounding a token); the plain path rounds the weights to the cache's type, by half an ulp at most;
/// all else is fp32.
double nmse_bound(ggml_type type, Path path) {
  if (path == Path::kPlain) return type == GGML_TYPE_F16 ? 0x1p-22 : 0x1p-16;
  return type == GGML_TYPE_F16 ? 1e-3 : 1e-9;
}

/// The cache of one layer, laid out as llama.cpp's unified cache (a row of all kv heads per token), and the attention
/// of one token over all of it.
class Layer {
 public:
  Layer(ggml_type type, Path path, int64_t tokens) : type_(type), path_(path), tokens_(tokens) {
    ggml_context* const c = graph_.context();
    const bool flash = path == Path::kFlash;
    key_ = ggml_new_tensor_2d(c, type, kChannels, tokens);
    value_ = flash ? ggml_new_tensor_2d(c, type, kChannels, tokens) : ggml_new_tensor_2d(c, type, tokens, kChannels);
    query_ = ggml_new_tensor_3d(c, GGML_TYPE_F32, kHeadDim, kHeads, 1);
    mask_ = ggml_new_tensor_4d(c, flash ? GGML_TYPE_F16 : GGML_TYPE_F32, tokens, 1, 1, 1);

    const size_t head_bytes = ggml_row_size(type, kHeadDim), row_bytes = ggml_row_size(type, kChannels);
    const float scale = 1 / std::sqrt(static_cast<float>(kHeadDim));
    ggml_tensor* const q = ggml_permute(c, query_, 0, 2, 1, 3);                                          // [128, 1, 32]
    ggml_tensor* const k = ggml_view_3d(c, key_, kHeadDim, tokens, kKvHeads, row_bytes, head_bytes, 0);  // [128, n, 8]
    if (flash) {
      ggml_tensor* const v = ggml_view_3d(c, value_, kHeadDim, tokens, kKvHeads, row_bytes, head_bytes, 0);
      out_ = ggml_flash_attn_ext(c, q, k, v, mask_, scale, 0, 0);
      ggml_prec_set_acc(out_, GGML_PREC_F32);
    } else {
      const size_t channel_bytes = ggml_row_size(type, tokens);
      ggml_tensor* const v =
          ggml_view_3d(c, value_, tokens, kHeadDim, kKvHeads, channel_bytes, channel_bytes * kHeadDim, 0);
      ggml_tensor* const scores = ggml_mul_mat(c, k, q);  // [n, 1, 32]
      ggml_prec_set_acc(scores, GGML_PREC_F32);
      out_ = ggml_mul_mat(c, v, ggml_soft_max_ext(c, scores, mask_, scale, 0));  // [128, 1, 32]
    }
    graph_.build({out_});
    std::memset(mask_->data, 0, ggml_nbytes(mask_));  // a single sequence: the newest token sees every cell
    fill_and_check();
  }

  bool right() const { return nmse_rounded_ <= nmse_bound(type_, path_); }
  bool compute() const { return graph_.compute(); }
  bool is(ggml_type type, Path path, int64_t tokens) const {
    return type == type_ && path == path_ && tokens == tokens_;
  }
  int64_t bytes() const { return static_cast<int64_t>(ggml_nbytes(key_) + ggml_nbytes(value_)); }
  /// Error of the output against double precision on the same cache and the unrounded query.
  double error() const { return nmse_; }
  double error_rounded() const { return nmse_rounded_; }

 private:
  void fill_and_check() {
    const int64_t count = tokens_ * kChannels;
    const std::vector<uint8_t> keys = quantized(type_, normal_rows(count, 1), kChannels);
    const std::vector<uint8_t> values = quantized(type_, normal_rows(count, 2), kChannels);
    const std::vector<float> q = normal_rows(int64_t{kHeads} * kHeadDim, 7);
    std::memcpy(key_->data, keys.data(), keys.size());
    std::memcpy(query_->data, q.data(), q.size() * sizeof(float));
    if (path_ == Path::kFlash) {
      std::memcpy(value_->data, values.data(), values.size());
    } else {  // 16-bit types alone
      const auto* const from = reinterpret_cast<const uint16_t*>(values.data());
      auto* const to = static_cast<uint16_t*>(value_->data);
      for (int64_t t = 0; t < tokens_; ++t) {
        for (int64_t d = 0; d < kChannels; ++d) to[d * tokens_ + t] = from[t * kChannels + d];
      }
    }
    if (!compute()) return;
    const std::vector<float> out = contents(out_), k = dequantized(type_, keys.data(), count),
                             v = dequantized(type_, values.data(), count);
    nmse_ = nmse(out, attend(q, k, v));
    nmse_rounded_ = nmse(out, attend(rounded_for(type_, q), k, v));
  }

  ggml_type type_;
  Path path_;
  int64_t tokens_;
  Graph graph_;
  ggml_tensor *key_, *value_, *query_, *mask_, *out_;
  double nmse_ = std::numeric_limits<double>::quiet_NaN();
  double nmse_rounded_ = std::numeric_limits<double>::quiet_NaN();
};

/// Benchmark calls its function for every repetition; the newest layer is kept, since filling one takes seconds.
const Layer& layer_of(ggml_type type, Path path, int64_t tokens) {
  static std::unique_ptr<Layer> newest;
  if (newest == nullptr || !newest->is(type, path, tokens)) {
    newest.reset();
    newest = std::make_unique<Layer>(type, path, tokens);
  }
  return *newest;
}

enum class Caches {
  kWarm,  // the same cache again and again
  kCold,  // all of L3 read over in between, as the weights and the other layers do in a whole model
};

void BM_decode(benchmark::State& state, ggml_type type, Path path, Caches caches) {
  const int64_t tokens = state.range(0);
  const Layer& layer = layer_of(type, path, tokens);
  if (!layer.right()) return fail(state, "differs from the reference: nmse " + std::to_string(layer.error_rounded()));
  static const std::vector<uint64_t> evict(kEvictBytes / sizeof(uint64_t), 1);
  for (auto _ : state) {
    if (caches == Caches::kCold) read_all(evict);
    state.SetIterationTime(seconds_of([&] { layer.compute(); }));
  }
  const double gigabytes = static_cast<double>(layer.bytes()) * 1e-9;
  state.counters["tokens"] = static_cast<double>(tokens);
  state.counters["GB/s"] = benchmark::Counter(gigabytes, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["of_read"] =
      benchmark::Counter(gigabytes / read_bandwidth(), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["bits_per_value"] =
      8.0 * static_cast<double>(layer.bytes()) / static_cast<double>(2 * tokens * kChannels);
  state.counters["nmse"] = layer.error();
}

/// Stores keys and values of `range(0)` tokens, fp32 in, into the rows that an index names.
void BM_store(benchmark::State& state, ggml_type type) {
  constexpr int64_t kCells = 4096;
  const int64_t n = state.range(0);
  Graph graph;
  ggml_context* const c = graph.context();
  std::vector<ggml_tensor*> inputs, stored;
  ggml_tensor* const index = ggml_new_tensor_1d(c, GGML_TYPE_I64, n);
  for (int i = 0; i < 2; ++i) {
    inputs.push_back(ggml_new_tensor_2d(c, GGML_TYPE_F32, kChannels, n));
    stored.push_back(ggml_set_rows(c, ggml_new_tensor_2d(c, type, kChannels, kCells), inputs[i], index));
  }
  graph.build(stored);
  auto* const cells = static_cast<int64_t*>(index->data);
  const auto choose = [&](int64_t first) {
    for (int64_t i = 0; i < n; ++i) cells[i] = (first + i) % kCells;
  };
  choose(3);
  for (int i = 0; i < 2; ++i) {
    const std::vector<float> rows = normal_rows(n * kChannels, 1 + i);
    std::memcpy(inputs[i]->data, rows.data(), rows.size() * sizeof(float));
  }
  if (!graph.compute()) return fail(state, "compute");
  for (int i = 0; i < 2; ++i) {
    const std::vector<float> rows = contents(inputs[i]);
    const std::vector<float> got = dequantized(
        type, static_cast<const uint8_t*>(stored[i]->data) + 3 * ggml_row_size(type, kChannels), n * kChannels);
    const std::vector<float> want = dequantized(type, quantized(type, rows, kChannels).data(), n * kChannels);
    // Ties may round otherwise in SIMD than in the reference.
    if (!(nmse(got, {want.begin(), want.end()}) <= 1e-6)) return fail(state, "differs from the reference");
  }
  int64_t token = 0;
  for (auto _ : state) {
    choose(token += n);
    graph.compute();
  }
  state.counters["us/token"] = benchmark::Counter(
      static_cast<double>(n) * 1e-6, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

/// The Hadamard rotations that llama.cpp puts around a quantized cache for each token: q and k by 128, v and the output by 64.
void BM_rotations(benchmark::State& state) {
  Graph graph;
  ggml_context* const c = graph.context();
  struct Rotation {
    int64_t size;
    ggml_tensor *matrix, *in, *out;
  };
  std::vector<Rotation> rotations;
  std::vector<ggml_tensor*> outputs;
  for (const auto& [size, values] : std::vector<std::pair<int64_t, int64_t>>{
           {128, kHeads * kHeadDim}, {128, kChannels}, {64, kChannels}, {64, kHeads * kHeadDim}}) {
    ggml_tensor* const matrix = ggml_new_tensor_2d(c, GGML_TYPE_F32, size, size);
    ggml_tensor* const in = ggml_new_tensor_2d(c, GGML_TYPE_F32, size, values / size);
    ggml_tensor* const out = ggml_mul_mat(c, matrix, in);
    ggml_mul_mat_set_hint(out, GGML_HINT_SRC0_IS_HADAMARD);
    rotations.push_back({size, matrix, in, out});
    outputs.push_back(out);
  }
  graph.build(outputs);
  const auto entry = [](int64_t size, int64_t row, int64_t column) {
    return (__builtin_popcountll(row & column) % 2 == 0 ? 1 : -1) / std::sqrt(static_cast<double>(size));
  };
  for (const Rotation& r : rotations) {
    for (int64_t i = 0; i < r.size * r.size; ++i)
      static_cast<float*>(r.matrix->data)[i] = static_cast<float>(entry(r.size, i / r.size, i % r.size));
    const std::vector<float> x = normal_rows(ggml_nelements(r.in), 3);
    std::memcpy(r.in->data, x.data(), x.size() * sizeof(float));
  }
  if (!graph.compute()) return fail(state, "compute");
  for (const Rotation& r : rotations) {
    const std::vector<float> x = contents(r.in);
    std::vector<double> want(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) % r.size, first = static_cast<int64_t>(i) - row;
      for (int64_t j = 0; j < r.size; ++j) want[i] += entry(r.size, row, j) * x[first + j];
    }
    if (!(nmse(contents(r.out), want) <= 1e-11)) return fail(state, "differs from the reference");
  }
  for (auto _ : state) graph.compute();
}

void repeat(benchmark::internal::Benchmark* b) {
  b->Repetitions(kRepetitions)->ReportAggregatesOnly();
  b->ComputeStatistics("min",
                       [](const std::vector<double>& times) { return *std::min_element(times.begin(), times.end()); });
  b->ComputeStatistics("max",
                       [](const std::vector<double>& times) { return *std::max_element(times.begin(), times.end()); });
}

void lengths(benchmark::internal::Benchmark* b) {
  repeat(b);
  b->Arg(8192)->Arg(32768)->Unit(benchmark::kMillisecond)->UseManualTime()->MinTime(0.2);
}

void counts(benchmark::internal::Benchmark* b) {
  repeat(b);
  b->Arg(1)->Arg(16)->Unit(benchmark::kMicrosecond)->UseRealTime()->MinTime(0.1);
}

BENCHMARK_CAPTURE(BM_decode, f16_plain, GGML_TYPE_F16, Path::kPlain, Caches::kWarm)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, f16_plain_cold, GGML_TYPE_F16, Path::kPlain, Caches::kCold)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, bf16_plain, GGML_TYPE_BF16, Path::kPlain, Caches::kWarm)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, bf16_plain_cold, GGML_TYPE_BF16, Path::kPlain, Caches::kCold)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, f16, GGML_TYPE_F16, Path::kFlash, Caches::kWarm)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, f16_cold, GGML_TYPE_F16, Path::kFlash, Caches::kCold)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, bf16, GGML_TYPE_BF16, Path::kFlash, Caches::kWarm)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, bf16_cold, GGML_TYPE_BF16, Path::kFlash, Caches::kCold)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, q8_0, GGML_TYPE_Q8_0, Path::kFlash, Caches::kWarm)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, q8_0_cold, GGML_TYPE_Q8_0, Path::kFlash, Caches::kCold)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, q4_0, GGML_TYPE_Q4_0, Path::kFlash, Caches::kWarm)->Apply(lengths);
BENCHMARK_CAPTURE(BM_decode, q4_0_cold, GGML_TYPE_Q4_0, Path::kFlash, Caches::kCold)->Apply(lengths);
BENCHMARK_CAPTURE(BM_store, f16, GGML_TYPE_F16)->Apply(counts);
BENCHMARK_CAPTURE(BM_store, bf16, GGML_TYPE_BF16)->Apply(counts);
BENCHMARK_CAPTURE(BM_store, q8_0, GGML_TYPE_Q8_0)->Apply(counts);
BENCHMARK_CAPTURE(BM_store, q4_0, GGML_TYPE_Q4_0)->Apply(counts);
BENCHMARK(BM_rotations)->Apply(repeat)->Unit(benchmark::kMicrosecond)->UseRealTime()->MinTime(0.1);

std::string cpu_features() {
  struct Feature {
    int has;
    const char* name;
  };
  std::string names;
  for (const Feature& feature : {Feature{ggml_cpu_has_avx2(), "avx2 "},
                                 {ggml_cpu_has_avx512(), "avx512 "},
                                 {ggml_cpu_has_avx512_vnni(), "avx512_vnni "},
                                 {ggml_cpu_has_avx512_bf16(), "avx512_bf16 "}}) {
    if (feature.has != 0) names += feature.name;
  }
  return names;
}

}  // namespace
}  // namespace rotunda

int main(int argc, char** argv) {
  benchmark::AddCustomContext("ggml_version", ggml_version());
  benchmark::AddCustomContext("ggml_commit", ggml_commit());
  benchmark::AddCustomContext("ggml_features", rotunda::cpu_features());
  benchmark::AddCustomContext("threads", std::to_string(rotunda::kThreads));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return rotunda::failed ? 1 : 0;
}
