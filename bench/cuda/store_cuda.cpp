// Packing and unpacking of rotunda pages on a GPU, Llama-3-8B's shape: a prompt of 32,768 tokens and a decode step of 8 sequences, all 32
// layers in one launch, and one layer unpacked. Bytes are checked against the CPU's first; times are medians of CUDA events with L2 flushed
// before each. Prints a table; --json FILE writes everything.
//
//   store_cuda [--repetitions 20] [--tokens 32768] [--bits 2]... [--json FILE]

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/core/GradMode.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cuda/timer.h"
#include "kv/house/kernels/house_load_cuda.h"
#include "kv/house/kernels/house_store_cuda.h"

namespace rotunda::bench {
namespace {

using kv::house::HouseLayer;
using kv::house::HouseStoreBatch;
using kv::house::StorePair;

constexpr int kLayers = 32;
constexpr int kHeads = 8;
constexpr int kHeadDim = 128;
constexpr int64_t kChannels = kHeads * kHeadDim;
constexpr int64_t kPageTokens = 128;

/// Rows for the pages of a pool, a token of each of some sequences or whole pages.
class Case {
 public:
  /// @param per_page tokens of each page: 1 or 128
  Case(int bits, int64_t n_pages, int64_t per_page, bool with_feedback) : n_pages_(n_pages), per_page_(per_page) {
    layer_.layout = {bits, bits, kHeads, kHeadDim, static_cast<int>(kPageTokens / 16)};
    at::manual_seed(1);
    const int64_t rows = n_pages * per_page;
    key_ = at::randn({kLayers, rows, kChannels}, on_gpu(at::kFloat));
    value_ = at::randn({kLayers, rows, kChannels}, on_gpu(at::kFloat));
    if (with_feedback) {
      feedback_ = (0.1 * at::randn({kLayers, kHeads, kHeadDim, kHeadDim}, on_gpu(at::kFloat))).triu(1);
      feedback_.diagonal(0, 2, 3).copy_(at::rand({kLayers, kHeads, kHeadDim}, on_gpu(at::kFloat)) + 0.5);
    }
    pool_ = at::zeros({n_pages, kLayers * layer_.layout.page_bytes()}, on_gpu(at::kByte));
    refused_ = at::zeros({kLayers}, on_gpu(at::kInt));
    std::vector<int32_t> pairs;
    for (int64_t page = 0; page < n_pages; ++page) {
      for (int64_t pair = 0; pair < (per_page == 1 ? 1 : 4); ++pair) {
        pairs.push_back(static_cast<int32_t>(page));
        pairs.push_back(static_cast<int32_t>(pair));
        pairs.push_back(static_cast<int32_t>(page * per_page + pair * 32));
        pairs.push_back(per_page == 1 ? 1 << page % 32 : -1);
      }
    }
    pairs_ = at::tensor(pairs, at::kInt).view({-1, 4}).to(at::kCUDA);
    batch_.layout = layer_.layout;
    if (with_feedback) batch_.feedback = feedback_.const_data_ptr<float>();
    batch_.key = key_.const_data_ptr<float>();
    batch_.value = value_.const_data_ptr<float>();
    batch_.row_stride = kChannels;
    batch_.layer_stride = rows * kChannels;
    batch_.pool = static_cast<std::byte*>(pool_.mutable_data_ptr());
    batch_.page_bytes = pool_.size(1);
    batch_.layer_bytes = layer_.layout.page_bytes();
    batch_.pairs = reinterpret_cast<const StorePair*>(pairs_.const_data_ptr<int32_t>());
    batch_.n_pairs = static_cast<int>(pairs_.size(0));
    batch_.n_rows = static_cast<int>(rows);
    batch_.n_layers = kLayers;
    batch_.refused = refused_.mutable_data_ptr<int32_t>();
  }

  void store() const { check(kv::house::house_store_cuda(batch_, at::cuda::getCurrentCUDAStream()), "house_store_cuda"); }

  /// Whether the last page has the CPU's bytes in the first and the last layer.
  void check_bytes() const {
    ROTUNDA_CHECK(refused_.eq(0).all().item<bool>(), "house_store_cuda refused normal numbers");
    const at::Tensor got = pool_[n_pages_ - 1].cpu();
    for (const int layer : {0, kLayers - 1}) {
      HouseLayer of_cpu = layer_;
      const at::Tensor feedback = feedback_.defined() ? feedback_[layer].cpu() : at::Tensor();
      if (feedback.defined()) of_cpu.feedback = feedback.const_data_ptr<float>();
      const at::Tensor key = key_[layer].narrow(0, (n_pages_ - 1) * per_page_, per_page_).cpu();
      const at::Tensor value = value_[layer].narrow(0, (n_pages_ - 1) * per_page_, per_page_).cpu();
      const at::Tensor expected = at::zeros({batch_.layer_bytes + 64}, at::kByte);
      // house_store wants 64-byte boundaries.
      auto* page = static_cast<std::byte*>(expected.mutable_data_ptr());
      page += (64 - reinterpret_cast<uintptr_t>(page) % 64) % 64;
      for (int64_t row = 0; row < per_page_; row += 16) {
        const auto first = static_cast<int>(per_page_ == 1 ? (n_pages_ - 1) % 32 : row);
        ROTUNDA_CHECK(kv::house::house_store({&of_cpu, key[row].const_data_ptr<float>(), value[row].const_data_ptr<float>(), kChannels,
                                              first / 16, first % 16, per_page_ == 1 ? 1 : 16, page}),
                      "house_store refused normal numbers");
      }
      const auto* const of_gpu = static_cast<const std::byte*>(got.const_data_ptr()) + layer * batch_.layer_bytes;
      ROTUNDA_CHECK(std::memcmp(of_gpu, page, static_cast<size_t>(batch_.layer_bytes)) == 0,
                    "house_store_cuda: other bytes than the CPU's in layer ", layer);
    }
  }

  /// One layer of all pages. @param out [2, n_kv_heads, tokens, head_dim] fp32 or bf16
  void load(const at::Tensor& out) const {
    const at::Tensor table = at::arange(n_pages_, on_gpu(at::kInt));
    const auto type = out.scalar_type() == at::kFloat ? kernels::ElementType::kFp32 : kernels::ElementType::kBf16;
    check(kv::house::house_load_cuda({layer_.layout, batch_.pool, batch_.page_bytes, table.const_data_ptr<int32_t>(),
                                      static_cast<int>(n_pages_), type, out[0].data_ptr(), out[1].data_ptr()},
                                     at::cuda::getCurrentCUDAStream()),
          "house_load_cuda");
  }

  int64_t bytes() const { return 2 * key_.numel() * 4 + n_pages_ * per_page_ * batch_.page_bytes / kPageTokens; }
  int64_t layer_bytes() const { return n_pages_ * batch_.layer_bytes; }

 private:
  int64_t n_pages_, per_page_;
  HouseLayer layer_;
  at::Tensor key_, value_, feedback_, pool_, pairs_, refused_;
  HouseStoreBatch batch_;
};

int run(int argc, char** argv) {
  CLI::App app("Packing of rotunda pages on a GPU");
  int repetitions = 20;
  int64_t tokens = 32768;
  std::vector<int> bits{2};
  std::string json;
  app.add_option("--repetitions", repetitions)->check(CLI::Range(5, 10000));
  app.add_option("--tokens", tokens, "of the prompt")->check(CLI::Range(int64_t{128}, int64_t{65536}));
  app.add_option("--bits", bits)->check(CLI::Range(2, 4));
  app.add_option("--json", json, "file for the results");
  CLI11_PARSE(app, argc, argv);
  const c10::NoGradGuard no_grad;
  Timer timer(repetitions);
  nlohmann::json report;
  report["device"] = at::cuda::getCurrentDeviceProperties()->name;
  report["repetitions"] = repetitions;
  std::printf("%s\n%-48s %9s %19s %8s\n", at::cuda::getCurrentDeviceProperties()->name, "", "ms", "(10 to 90 %)", "GB/s");
  const auto add = [&](const std::string& name, int64_t bytes, const std::function<void()>& launch) {
    const Time time = timer(launch);
    const double gb_s = static_cast<double>(bytes) / time.median_ms * 1e-6;
    std::printf("%-48s %9.4f (%8.4f %8.4f) %8.0f\n", name.c_str(), time.median_ms, time.low_ms, time.high_ms, gb_s);
    report["rows"].push_back(
        {{"kernel", name}, {"median_ms", time.median_ms}, {"low_ms", time.low_ms}, {"high_ms", time.high_ms}, {"gb_s", gb_s}});
  };
  for (const int b : bits) {
    const std::string format = "rotunda" + std::to_string(b);
    for (const bool feedback : {true, false}) {
      const std::string suffix = feedback ? ", feedback" : "";
      {
        const Case prompt(b, tokens / kPageTokens, kPageTokens, feedback);
        prompt.store();
        prompt.check_bytes();
        add(format + " pack " + std::to_string(tokens / kPageTokens * kPageTokens) + " tokens" + suffix, prompt.bytes(),
            [&] { prompt.store(); });
        for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
          if (feedback) continue;
          const at::Tensor out = at::empty({2, kHeads, tokens / kPageTokens * kPageTokens, kHeadDim}, on_gpu(type));
          add(format + " unpack one layer to " + c10::toString(type), prompt.layer_bytes() + out.numel() * out.element_size(),
              [&] { prompt.load(out); });
        }
      }
      for (const int64_t sequences : {1, 8, 64}) {
        const Case step(b, sequences, 1, feedback);
        step.store();
        step.check_bytes();
        add(format + " pack a token of " + std::to_string(sequences) + suffix, step.bytes(), [&] { step.store(); });
      }
    }
  }
  if (!json.empty()) std::ofstream(json) << report.dump(2) << "\n";
  return 0;
}

}  // namespace
}  // namespace rotunda::bench

int main(int argc, char** argv) {
  try {
    return rotunda::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "store_cuda: %s\n", error.what());
    return 1;
  }
}
