// Every registered cache format goes through the same tests; nothing opts out. What a format may lose is its own bound, what it must
// do (fork, truncate, save, abort, ragged batches, honest sizes) is the same for all.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/Parallel.h>

#include <cstdio>
#include <set>

#ifdef ROTUNDA_CUDA
#include "kernels/skip_without_gpu.h"
#endif

#include "kv_harness.h"

namespace rotunda::kv {
namespace {

using testing::FusedCache;
using testing::exact_attention;
using testing::nmse;
using testing::random_text;
using testing::small_model;
using testing::Text;

// What formats that run the same code share.
std::string kind_of(const KvFormat& format) {
  std::string names = format.calibration_name() + ": ";
  for (const KvOption& option : format.options()) names += option.name + " ";
  return names;
}

// The first of the formats that share a calibration and have the same options. The others run the same code with other numbers.
bool first_of_its_kind(const KvFormat& format) {
  for (const auto& other : kv_registry().all())
    if (kind_of(*other) == kind_of(format)) return other->name() == format.name();
  return true;
}

// Specs to test: every format with its defaults, and, once for each set of options that formats share, each option away from its
// default where that changes the path taken; once only for an option of formats that share a calibration, too: they are one family.
std::vector<std::string> all_specs() {
  std::vector<std::string> specs;
  std::set<std::pair<std::string, std::string>> seen;
  for (const auto& format : kv_registry().all()) {
    const std::string name = format->name();
    specs.push_back(name);
    for (const KvOption& option : format->options()) {
      if (option.name == "recent" && option.default_value != "0") specs.push_back(name + ":recent=0");
      if (!first_of_its_kind(*format) || !seen.emplace(format->calibration_name(), option.name).second) continue;
      if (option.name == "recent") specs.push_back(name + ":recent=7");
      if (option.name == "reorder") specs.push_back(name + ":reorder=group"), specs.push_back(name + ":reorder=none");
      if (option.name == "sink_select") specs.push_back(name + ":sink_select=running,recent=16");
      if (option.name == "sinks") specs.push_back(name + (option.default_value == "0" ? ":sinks=5" : ":sinks=0"));
      if (option.name == "zero") specs.push_back(name + (option.default_value == "minimum" ? ":zero=code,recent=0" : ":zero=minimum,recent=0"));
      if (option.name == "group") specs.push_back(name + ":group=32,recent=16");
      if (option.name == "block") specs.push_back(name + ":block=64,clamp=symmetric,recent=16");
      if (option.name == "ksort") specs.push_back(name + ":ksort=calibration"), specs.push_back(name + ":ksort=none,recent=7");
      if (option.name == "first" && option.default_value != "0") specs.push_back(name + ":first=0");
      if (option.name == "first") specs.push_back(name + ":first=20,sinks=0,recent=7");
      if (option.name == "balance") specs.push_back(name + ":balance=none,recent=7");
      if (option.name == "shift") specs.push_back(name + ":shift=mean,recent=7");  // by a calibration
      if (option.name == "shift_pairs") specs.push_back(name + ":shift=mean,shift_pairs=0.5,recent=16");
      if (option.name == "feedback") specs.push_back(name + ":feedback=none"), specs.push_back(name + ":feedback=calibrated,recent=16");
      if (option.name == "scale") specs.push_back(name + (option.default_value == "norm" ? ":scale=length" : ":scale=least_squares,recent=0"));
      const bool bits = std::isdigit(static_cast<unsigned char>(option.default_value.front())) != 0;
      if (option.name == "values") specs.push_back(name + (bits ? ":values=3,recent=7" : ":values=quarot3,recent=7"));
    }
  }
  // Mixes of formats that want the layer's input, a calibration, setups of each layer, or none of these.
  specs.insert(specs.end(), {"quarot2:values=turbo3", "int2:values=bfp4", "layers 0=bf16;rotunda2", "layers -1=fp32;rotate3:recent=7", "layers 0=rotunda3:shift=mean;layers 1=rotate2",
                             "layers 0-1=rotunda4:recent=0"});
  // A GPU has no cache of some formats, and of heads of some sizes.
  const KvModel model = small_model();
  std::erase_if(specs, [&](const std::string& text) {
    const KvSpec spec = parse_kv_spec(text);
    const auto reason = kv_registry().get(spec).unsupported_reason(spec, model);
    if (reason) std::printf("left out: %s\n", reason->c_str());
    return reason.has_value();
  });
  return specs;
}

// Squared error of attention outputs relative to exact attention on random text: about the square of the relative step of the codes.
double allowed_nmse(const std::string& spec) {
  if (spec.starts_with("layers")) {  // every layer by itself
    double most = 0.0;
    for (const KvSpecPart& part : parse_kv_spec(spec).parts) most = std::max(most, allowed_nmse(part.spec.format));
    return most;
  }
  if (spec.starts_with("fp32")) return 1e-10;
  const std::string name = spec.substr(0, spec.find(':'));
  if (name == "fp16") return 1e-6;
  if (name == "bf16") return 1e-4;
  if (name == "int8" || name == "q8_0" || name == "mxint8" || name == "bfp8" || name == "bfp16") return 2e-3;
  if (name == "fp8" || name == "mxfp8" || name == "mxfp6" || name == "bfp7" || name == "bfp6") return 0.02;
  if (name == "rotate4" || name == "rotunda4") return 0.05;
  if (name == "rotate3" || name == "rotunda3") return 0.2;
  if (name.ends_with("4") || name == "q4_0" || name == "bfp5") return name == "mxfp4" ? 0.2 : 0.1;
  if (name == "bfp2") return 1.5;  // four mantissas, -2 .. 1, under a power of two
  if (name == "bfp3") return 0.4;
  if (name == "bfp12" || name.ends_with("3")) return 0.25;
  return 1.0;
}

class Conformance : public ::testing::TestWithParam<std::string> {
 protected:
  static constexpr int64_t kTokens = 300;

  void SetUp() override {
#ifdef ROTUNDA_CUDA
    if (model_.device.is_cuda()) ROTUNDA_SKIP_WITHOUT_GPU();
#endif
  }

  // Of a list of lengths or shapes, all for the first of a kind as it is by default, else those that end in the middle of something.
  template <typename Case>
  static std::vector<Case> cases(std::vector<Case> all, std::vector<Case> few) {
    const KvSpec spec = parse_kv_spec(GetParam());
    const bool by_default = spec.options.empty() && spec.parts.empty();
    return by_default && first_of_its_kind(kv_registry().get(spec)) ? all : few;
  }

  KvModel model_ = small_model();
  Text text_ = random_text(model_, kTokens, 7);
};

TEST_P(Conformance, TokenByTokenStaysNearExactAttention) {
  FusedCache fused(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < kTokens; ++t) outs.push_back(fused.step({{seq, &text_, t, t + 1}}));
  EXPECT_EQ(fused.cache().kv_len(seq), kTokens);
  EXPECT_LT(nmse(at::cat(outs, 1), exact_attention(model_, text_, kTokens)), allowed_nmse(GetParam()));
}

TEST_P(Conformance, ChunksOfAnyLengthStayNearExactAttention) {
  const at::Tensor exact = exact_attention(model_, text_, kTokens);
  for (const int64_t chunk : cases<int64_t>({15, 16, 17, 127, 128, 129, 300}, {17, 129})) {
    FusedCache fused(GetParam(), model_);
    const SeqId seq = fused.cache().create();
    std::vector<at::Tensor> outs;
    for (int64_t t = 0; t < kTokens; t += chunk) outs.push_back(fused.step({{seq, &text_, t, std::min(t + chunk, kTokens)}}));
    EXPECT_LT(nmse(at::cat(outs, 1), exact), allowed_nmse(GetParam())) << "chunks of " << chunk;
  }
}

TEST_P(Conformance, QuantizeAllStaysNearExactAttention) {
  FusedCache fused(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  const at::Tensor out = fused.step({{seq, &text_, 0, kTokens}}, StepKind::kQuantizeAll);
  EXPECT_LT(nmse(out, exact_attention(model_, text_, kTokens)), allowed_nmse(GetParam()));
}

TEST_P(Conformance, RaggedBatchEqualsSingleSequences) {
  const Text other = random_text(model_, 200, 8);
  FusedCache batch(GetParam(), model_);
  FusedCache single(GetParam(), model_);
  const SeqId a = batch.cache().create();
  const SeqId b = batch.cache().create();
  const SeqId single_a = single.cache().create();
  const SeqId single_b = single.cache().create();
  const auto both = [&](int64_t a0, int64_t a1, int64_t b0, int64_t b1) {
    const at::Tensor together = batch.step({{a, &text_, a0, a1}, {b, &other, b0, b1}});
    const at::Tensor alone = at::cat({single.step({{single_a, &text_, a0, a1}}), single.step({{single_b, &other, b0, b1}})}, 1);
    EXPECT_TRUE(together.allclose(alone, 1e-5, 1e-6)) << (together - alone).abs().max();
  };
  both(0, 140, 0, 33);
  both(140, 141, 33, 34);
  both(141, 142, 34, 90);
  both(142, 143, 90, 91);
}

TEST_P(Conformance, AskingForTheKeysToCodeChangesNothing) {
  const Text other = random_text(model_, 200, 8);
  FusedCache asked(GetParam(), model_);
  FusedCache left_alone(GetParam(), model_);
  asked.ask_keys = true;
  const SeqId a = asked.cache().create(), b = asked.cache().create();
  ASSERT_EQ(a, left_alone.cache().create());
  ASSERT_EQ(b, left_alone.cache().create());
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 37}, {37, 38}, {38, 150}}) {
    asked.asked_keys.clear();
    const std::vector<FusedCache::Part> parts = {{a, &text_, begin, end}, {b, &other, begin, end}};
    EXPECT_TRUE(asked.step(parts).equal(left_alone.step(parts)));
    for (const at::Tensor& keys : asked.asked_keys) {
      if (!keys.defined()) continue;  // a cache need not tell
      EXPECT_EQ(keys.sizes(), at::IntArrayRef({2 * (end - begin), model_.kv_channels()}));
      EXPECT_EQ(keys.scalar_type(), at::kFloat);
      EXPECT_TRUE(keys.isfinite().all().item<bool>());
    }
  }
}

TEST_P(Conformance, ForkSharesAndThenDiverges) {
  const Text other = random_text(model_, 200, 9);
  FusedCache fused(GetParam(), model_);
  FusedCache control(GetParam(), model_);
  const SeqId trunk = fused.cache().create();
  const SeqId control_seq = control.cache().create();
  fused.step({{trunk, &text_, 0, 200}});
  control.step({{control_seq, &text_, 0, 200}});
  const int64_t before = fused.cache().usage().cache_bytes();
  const SeqId branch = fused.cache().fork(trunk);
  // Only what lies outside the pages (window, sinks) is copied.
  const KvUsage shared = fused.cache().usage();
  EXPECT_EQ(shared.cache_bytes() - before, (shared.window_bytes + shared.sink_bytes) / 2);
  for (int64_t t = 0; t < 150; t += 30) fused.step({{branch, &other, t, t + 30}});  // writes into the shared last page
  for (int64_t t = 200; t < 230; ++t) {
    const at::Tensor forked = fused.step({{trunk, &text_, t, t + 1}});
    EXPECT_TRUE(forked.equal(control.step({{control_seq, &text_, t, t + 1}}))) << t;
  }
  fused.cache().release(branch);
  EXPECT_EQ(fused.cache().usage().cache_bytes(), control.cache().usage().cache_bytes());
}

TEST_P(Conformance, TruncateForgets) {
  FusedCache fused(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  fused.step({{seq, &text_, 0, 290}});
  const Text other = random_text(model_, 300, 10);
  for (const int64_t keep : {250, 129, 128, 127, 1}) {
    fused.cache().truncate(seq, keep);
    EXPECT_EQ(fused.cache().kv_len(seq), keep);
    // A detour over other tokens leaves nothing behind but (at most) the exactness of the newest tokens.
    const SeqId straight = fused.cache().fork(seq);
    fused.step({{seq, &other, 0, 40}});
    fused.cache().truncate(seq, keep);
    const at::Tensor after = fused.step({{seq, &text_, keep, keep + 20}});
    const at::Tensor expected = fused.step({{straight, &text_, keep, keep + 20}});
    EXPECT_LT(nmse(after, expected), std::max(1e-12, allowed_nmse(GetParam()))) << keep;
    fused.cache().release(straight);
  }
  fused.cache().truncate(seq, 0);
  EXPECT_EQ(fused.cache().usage().elements, 0);
  EXPECT_EQ(fused.cache().usage().codes_bytes, 0);
  EXPECT_THROW(fused.cache().truncate(seq, 1), Error);
}

TEST_P(Conformance, SavedSequenceGoesOnAsIfNeverSaved) {
  for (const int64_t length : cases<int64_t>({1, 16, 128, 129, 200}, {129})) {
    FusedCache fused(GetParam(), model_);
    const SeqId seq = fused.cache().create();
    fused.step({{seq, &text_, 0, length}});
    const ops::TensorBundle bundle = fused.cache().export_sequence(seq);
    FusedCache reader(GetParam(), model_);
    const SeqId read = reader.cache().import_sequence(bundle);
    EXPECT_EQ(reader.cache().kv_len(read), length);
    EXPECT_EQ(reader.cache().usage().cache_bytes(), fused.cache().usage().cache_bytes());
    for (int64_t t = length; t < length + 40; ++t)
      EXPECT_TRUE(reader.step({{read, &text_, t, t + 1}}).equal(fused.step({{seq, &text_, t, t + 1}}))) << length << " " << t;
  }
}

TEST_P(Conformance, DamagedSavedSequenceIsRefused) {
  FusedCache fused(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  fused.step({{seq, &text_, 0, 200}});
  const ops::TensorBundle good = fused.cache().export_sequence(seq);
  const auto refused = [&](ops::TensorBundle bundle, const std::string& fragment) {
    try {
      fused.cache().import_sequence(bundle);
      FAIL() << "accepted, expected: " << fragment;
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kUser);
      EXPECT_THAT(error.what(), ::testing::HasSubstr(fragment));
    }
  };
  // A part of a mix says which part it is and calls things by its own names.
  const auto own_name = [](const std::string& name) { return name.substr(name.find('/') + 1); };
  for (const auto& [key, value] : good.metadata) {
    ops::TensorBundle bundle = good;
    bundle.metadata.erase(key);
    refused(bundle, own_name(key));
    bundle.metadata[key] = "-3";
    refused(bundle, own_name(key));
  }
  for (const auto& [name, tensor] : good.tensors) {
    ops::TensorBundle bundle = good;
    bundle.tensors.erase(name);
    refused(bundle, own_name(name));
    bundle.tensors[name] = at::zeros({3, 3, 3, 3}, tensor.options());
    refused(bundle, own_name(name));
  }
  EXPECT_EQ(fused.cache().kv_len(fused.cache().import_sequence(good)), 200);
}

TEST_P(Conformance, AbortedStepLeavesNoTrace) {
  const Text other = random_text(model_, 300, 11);
  FusedCache fused(GetParam(), model_);
  FusedCache control(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  const SeqId control_seq = control.cache().create();
  int64_t t = 0;
  for (const int64_t n : {100, 1, 1, 50, 1, 1}) {
    fused.step({{seq, &other, t, t + n}}, StepKind::kGenerate, /*abort_after=*/1);
    fused.step({{seq, &other, 0, 1}}, StepKind::kGenerate, /*abort_after=*/2);
    EXPECT_EQ(fused.cache().kv_len(seq), t);
    const at::Tensor out = fused.step({{seq, &text_, t, t + n}});
    EXPECT_TRUE(out.equal(control.step({{control_seq, &text_, t, t + n}}))) << "at " << t;
    t += n;
    EXPECT_EQ(fused.cache().usage().cache_bytes(), control.cache().usage().cache_bytes());
  }
}

TEST_P(Conformance, PlannedBytesAreTheBytesTaken) {
  const KvSpec spec = parse_kv_spec(GetParam());
  const KvFormat& format = kv_registry().get(spec);
  for (const int64_t length : {1, 17, 128, 200, 300}) {
    FusedCache fused(GetParam(), model_);
    const SeqId seq = fused.cache().create();
    fused.step({{seq, &text_, 0, length}});
    const KvUsage usage = fused.cache().usage();
    EXPECT_EQ(usage.elements, 2 * length * model_.kv_channels() * model_.n_layers);
    // Sinks may share tokens, so the plan is an upper bound there and exact in all else.
    const int64_t planned = format.planned_bytes(spec, model_, length);
    EXPECT_LE(usage.cache_bytes(), planned) << length;
    const int64_t sink_slots = model_.device.is_cpu() ? std::min<int64_t>((length + 15) / 16 * 16, 32) : 32;  // a GPU has them all at once
    EXPECT_GE(usage.cache_bytes() - usage.sink_bytes, planned - 2 * 2 * model_.kv_channels() * model_.n_layers * sink_slots);
  }
}

TEST_P(Conformance, NonFiniteKeysAndValuesAreRefusedAndHarmNothing) {
  FusedCache fused(GetParam(), model_);
  FusedCache control(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  const SeqId control_seq = control.cache().create();
  fused.step({{seq, &text_, 0, 150}});
  control.step({{control_seq, &text_, 0, 150}});
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const auto member : {&Text::k, &Text::v}) {
      Text damaged = random_text(model_, kTokens, 7);
      (damaged.*member)[1][151][1][5] = bad;
      EXPECT_THROW(fused.step({{seq, &damaged, 150, 160}}), Error);
      EXPECT_THROW(fused.step({{seq, &damaged, 151, 152}}), Error);
    }
  }
  EXPECT_EQ(fused.cache().kv_len(seq), 150);
  EXPECT_TRUE(fused.step({{seq, &text_, 150, 170}}).equal(control.step({{control_seq, &text_, 150, 170}})));
}

TEST_P(Conformance, BadStepsAreRefused) {
  FusedCache fused(GetParam(), model_);
  KvCache& cache = fused.cache();
  const SeqId seq = cache.create();
  EXPECT_THROW(cache.begin_step({}), Error);
  EXPECT_THROW(cache.begin_step({{seq, 0}}), Error);
  EXPECT_THROW(cache.begin_step({{seq, -5}}), Error);
  EXPECT_THROW(cache.begin_step({{seq + 1, 3}}), Error);
  EXPECT_THROW(cache.begin_step({{seq, 3}, {seq, 2}}), Error);
  EXPECT_THROW(cache.kv_len(99), Error);
  EXPECT_THROW(cache.release(99), Error);
  cache.begin_step({{seq, 3}});
  EXPECT_THROW(cache.attend(0, {at::zeros({2, 4, 64}), at::zeros({3, 2, 64}), at::zeros({3, 2, 64}), at::zeros({3, 48})}), Error);
  cache.abort_step();
  fused.step({{seq, &text_, 0, 3}});
  EXPECT_THROW(cache.begin_step({{seq, 3}}, StepKind::kQuantizeAll), Error);
}

TEST_P(Conformance, SlidingWindow) {
  model_.sliding_window = 50;
  FusedCache fused(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  std::vector<at::Tensor> outs{fused.step({{seq, &text_, 0, 120}}), fused.step({{seq, &text_, 120, 200}})};
  for (int64_t t = 200; t < 260; ++t) outs.push_back(fused.step({{seq, &text_, t, t + 1}}));
  EXPECT_LT(nmse(at::cat(outs, 1), exact_attention(model_, text_, 260)), allowed_nmse(GetParam()));
}

TEST_P(Conformance, HeadDimensionsAndGroupings) {
  using Shape = std::tuple<int, int, int>;
  for (const auto& [n_heads, n_kv_heads, head_dim] : cases<Shape>(
           {{2, 1, 64}, {4, 4, 80}, {3, 3, 96}, {8, 4, 112}, {8, 8, 128}, {2, 2, 256}, {5, 1, 48}}, {{2, 1, 96}, {5, 1, 48}})) {
    const KvModel model = small_model(n_heads, n_kv_heads, head_dim);
    KvSpec spec = parse_kv_spec(GetParam());
    if (const auto reason = kv_registry().get(spec).unsupported_reason(spec, model)) {
      EXPECT_THAT(*reason, ::testing::AnyOf(::testing::HasSubstr("group"), ::testing::HasSubstr("on cuda"))) << "only a group size may not fit, or a GPU";
      continue;
    }
    const Text text = random_text(model, 150, 12);
    FusedCache fused(spec, model);
    const SeqId seq = fused.cache().create();
    std::vector<at::Tensor> outs{fused.step({{seq, &text, 0, 100}})};
    for (int64_t t = 100; t < 150; ++t) outs.push_back(fused.step({{seq, &text, t, t + 1}}));
    EXPECT_LT(nmse(at::cat(outs, 1), exact_attention(model, text, 150)), allowed_nmse(GetParam())) << n_kv_heads << " x " << head_dim;
  }
}

TEST_P(Conformance, ThreadsChangeNothingButTheOrderOfSums) {
  const auto run = [&](int n_threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(n_threads);
    FusedCache fused(GetParam(), model_);
    const SeqId seq = fused.cache().create();
    std::vector<at::Tensor> outs{fused.step({{seq, &text_, 0, 280}})};
    for (int64_t t = 280; t < 290; ++t) outs.push_back(fused.step({{seq, &text_, t, t + 1}}));
    at::set_num_threads(before);
    return at::cat(outs, 1);
  };
  EXPECT_LT(nmse(run(4), run(1)), 1e-9);
}

TEST_P(Conformance, KeyNormModelsAreNotFused) {
  model_.key_norm = true;
  FusedCache fused(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  std::vector<at::Tensor> outs{fused.step({{seq, &text_, 0, 100}})};
  for (int64_t t = 100; t < 200; ++t) outs.push_back(fused.step({{seq, &text_, t, t + 1}}));
  EXPECT_LT(nmse(at::cat(outs, 1), exact_attention(model_, text_, 200)), allowed_nmse(GetParam()));
}

TEST_P(Conformance, Bfloat16Model) {
  model_.dtype = at::kBFloat16;
  FusedCache fused(GetParam(), model_);
  const SeqId seq = fused.cache().create();
  std::vector<at::Tensor> outs{fused.step({{seq, &text_, 0, 100}}), fused.step({{seq, &text_, 100, 150}})};
  for (int64_t t = 150; t < 200; ++t) outs.push_back(fused.step({{seq, &text_, t, t + 1}}));
  EXPECT_LT(nmse(at::cat(outs, 1), exact_attention(model_, text_, 200)), std::max(allowed_nmse(GetParam()), 1e-3));
}

std::string test_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(Formats, Conformance, ::testing::ValuesIn(all_specs()), test_name);

}  // namespace
}  // namespace rotunda::kv
