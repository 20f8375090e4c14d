// What a cache on a GPU shares with the one on the CPU: saved sequences, attention to rounding, and what both keep exact.

#include <gtest/gtest.h>

#include "kernels/skip_without_gpu.h"
#include "kv_harness.h"

namespace rotunda::kv {
namespace {

using testing::exact_attention;
using testing::FusedCache;
using testing::nmse;
using testing::random_text;
using testing::small_model;
using testing::Text;

class Devices : public ::testing::TestWithParam<std::string> {
 protected:
  static constexpr int64_t kTokens = 420;

  void SetUp() override {
    ROTUNDA_SKIP_WITHOUT_GPU();
    gpu_.device = at::kCUDA;
    const KvSpec spec = parse_kv_spec(GetParam());
    ASSERT_FALSE(kv_registry().get(spec).unsupported_reason(spec, gpu_));
  }

  // The same numbers up to the order of sums, but where a code falls the other way for it, and to what decode kernels round queries and
  // weights to: the CPU's dot products take bytes.
  static void expect_near(const at::Tensor& a, const at::Tensor& b, double most) { EXPECT_LT(nmse(a, b), most) << GetParam(); }

  /// A cache on each, of one calibration: eigenvectors found twice are not the same.
  std::pair<FusedCache, FusedCache> on_both() const {
    const KvSpec spec = parse_kv_spec(GetParam());
    FusedCache on_cpu(spec, cpu_);
    FusedCache on_gpu(spec, gpu_, {}, &on_cpu.calibration());
    return {std::move(on_cpu), std::move(on_gpu)};
  }

  KvModel cpu_ = small_model();
  KvModel gpu_ = small_model();
  Text text_ = random_text(cpu_, kTokens, 7);
};

TEST_P(Devices, AttendAlike) {
  auto [on_cpu, on_gpu] = on_both();
  const SeqId a = on_cpu.cache().create(), b = on_gpu.cache().create();
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 300}, {300, 333}})
    expect_near(on_gpu.step({{b, &text_, begin, end}}), on_cpu.step({{a, &text_, begin, end}}), 1e-5);
  std::vector<at::Tensor> cpu_outs, gpu_outs;
  for (int64_t t = 333; t < kTokens; ++t) {
    cpu_outs.push_back(on_cpu.step({{a, &text_, t, t + 1}}));
    gpu_outs.push_back(on_gpu.step({{b, &text_, t, t + 1}}));
  }
  expect_near(at::cat(gpu_outs, 1), at::cat(cpu_outs, 1), 5e-4);
}

TEST_P(Devices, ReadWhatTheOtherHasSaved) {
  auto [on_cpu, on_gpu] = on_both();
  const SeqId a = on_cpu.cache().create(), b = on_gpu.cache().create();
  on_cpu.step({{a, &text_, 0, 250}});
  on_gpu.step({{b, &text_, 0, 250}});
  const ops::TensorBundle cpu_bundle = on_cpu.cache().export_sequence(a), gpu_bundle = on_gpu.cache().export_sequence(b);
  const SeqId from_gpu = on_cpu.cache().import_sequence(gpu_bundle), from_cpu = on_gpu.cache().import_sequence(cpu_bundle);
  // What was read is written again bit for bit.
  const ops::TensorBundle again = on_gpu.cache().export_sequence(from_cpu);
  for (const auto& [name, tensor] : cpu_bundle.tensors) {
    if (!name.ends_with("pages")) continue;
    EXPECT_TRUE(again.tensors.at(name).equal(tensor)) << name;
  }
  for (int64_t t = 250; t < 350; ++t) {
    const at::Tensor expected = on_cpu.step({{a, &text_, t, t + 1}});
    expect_near(on_gpu.step({{from_cpu, &text_, t, t + 1}}), expected, 5e-4);
    expect_near(on_cpu.step({{from_gpu, &text_, t, t + 1}}), on_gpu.step({{b, &text_, t, t + 1}}), 5e-4);
  }
}

// Packed bytes differ only where sums in another order bring a number to the other side of a code's edge.
TEST_P(Devices, PackTheSameBytesButForTies) {
  auto [on_cpu, on_gpu] = on_both();
  const SeqId a = on_cpu.cache().create(), b = on_gpu.cache().create();
  on_cpu.step({{a, &text_, 0, 384}});
  on_gpu.step({{b, &text_, 0, 384}});
  const ops::TensorBundle cpu_bundle = on_cpu.cache().export_sequence(a), gpu_bundle = on_gpu.cache().export_sequence(b);
  for (const auto& [name, x] : cpu_bundle.tensors) {
    if (!name.ends_with("pages")) continue;
    const at::Tensor y = gpu_bundle.tensors.at(name);
    ASSERT_EQ(x.sizes(), y.sizes());
    EXPECT_LT(x.ne(y).to(at::kDouble).mean().item<double>(), 0.01) << name;
  }
}

std::vector<std::string> specs() {
  const KvModel model = [] {
    KvModel made = small_model();
    made.device = at::kCUDA;
    return made;
  }();
  std::vector<std::string> all;
  for (const std::string text : {"bf16", "fp16", "fp32", "rotunda2", "rotunda2:shift=mean", "rotunda3:sink_select=running,recent=16", "rotunda4:recent=0",
                                 "rotate2", "rotate3:zero=minimum,recent=7", "rotate4:sink_select=running", "layers 0=bf16;rotunda2", "fp8:recent=16,sinks=3",
                                 "int4:group=32,recent=16", "bfp5:ksort=none,recent=7", "turbo2:scale=length", "layers 0=fp8;quarot2"}) {
    const KvSpec spec = parse_kv_spec(text);
    if (!kv_registry().get(spec).unsupported_reason(spec, model)) all.push_back(text);
  }
  // Every format of this family, as it is by default.
  for (const auto& format : kv_registry().all()) {
    if (format->calibration_name() == "grouped") all.push_back(format->name());
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Formats, Devices, ::testing::ValuesIn(specs()), [](const auto& info) {
  std::string name = info.param;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
});

}  // namespace
}  // namespace rotunda::kv
