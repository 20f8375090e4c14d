#include "engine/compare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/cache_decorator.h"
#include "engine/generate.h"
#include "engine/layer_probe.h"
#include "engine/step.h"
#include "engine/toy.h"

namespace rotunda::engine {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr const char* kText =
    "A cache keeps what attention will ask for again. The fewer bits an element takes, the longer the text that fits, "
    "and the "
    "less the machine has to read for every token; what that costs is what a comparison is for, and it is measured, "
    "not guessed.";

std::vector<int64_t> text_ids(const Session& session, size_t n) {
  std::vector<int64_t> ids = session.tokenizer->encode(kText, /*add_special=*/true);
  ids.resize(n);
  return ids;
}

// What a layer got, and what its attention gave.
struct Seen {
  kv::AttendInput in;
  at::Tensor out;
};

class SeeingCache final : public CacheDecorator {
 public:
  explicit SeeingCache(kv::KvCache& inner) : CacheDecorator(inner) {}
  at::Tensor attend(int layer, const kv::AttendInput& in) override {
    seen.push_back({in, inner_.attend(layer, in)});
    return seen.back().out;
  }
  std::vector<Seen> seen;
};

std::vector<Seen> layers_of(const KvBinding& binding, const std::vector<int64_t>& ids, kv::StepKind kind) {
  const auto cache = binding.make_cache();
  SeeingCache seeing(*cache);
  run_step(*binding.model, seeing,
           {{.seq = seeing.create(), .n_tokens = static_cast<int64_t>(ids.size()), .is_prompt = true, .rope_len = 0}},
           ids, kind, nullptr);
  return seeing.seen;
}

// Attention probabilities written out, [n_heads][T][T] fp64.
at::Tensor naive_probabilities(const kv::KvModel& model, const kv::AttendInput& in) {
  const int64_t n = in.q.size(0);
  const auto [cos, sin] = model.rope.cos_sin(at::arange(n, at::kLong), n);
  const at::Tensor q = ops::apply_rope(in.q, cos, sin).to(at::kDouble);
  const at::Tensor k = ops::apply_rope(in.k, cos, sin).to(at::kDouble);
  const at::Tensor probabilities = at::zeros({model.n_heads, n, n}, at::kDouble);
  for (int64_t head = 0; head < model.n_heads; ++head) {
    const int64_t kv_head = head / (model.n_heads / model.n_kv_heads);
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> weights;
      double sum = 0.0;
      for (int64_t j = 0; j <= i; ++j) {
        weights.push_back(std::exp(model.softmax_scale * (q[i][head] * k[j][kv_head]).sum().item<double>()));
        sum += weights.back();
      }
      for (int64_t j = 0; j <= i; ++j) probabilities[head][i][j] = weights[static_cast<size_t>(j)] / sum;
    }
  }
  return probabilities;
}

double relative_error(const at::Tensor& got, const at::Tensor& expected) {
  return ((got - expected).to(at::kDouble).norm() / expected.to(at::kDouble).norm()).item<double>();
}

class LayerProbeTest : public testing::Test {
 protected:
  Session session_ = toy::make_session();
  const kv::KvModel& model_ = session_.model->info().kv;
  std::vector<int64_t> ids_ = text_ids(session_, 40);
};

TEST_F(LayerProbeTest, ErrorOfAFusedFormatIsThatOfItsStoredKeysAndValues) {
  const KvBinding binding = toy::bind(session_, "rotunda2:recent=0,sinks=0,first=0");
  const auto exact = layers_of(binding, ids_, kv::StepKind::kGenerate);
  const auto stored = layers_of(binding, ids_, kv::StepKind::kQuantizeAll);
  const std::vector<double> errors = layer_errors(binding, ids_, nullptr);
  ASSERT_EQ(errors.size(), 2u);
  // The first layer's inputs are the same in all runs.
  EXPECT_NEAR(errors[0], relative_error(stored[0].out, exact[0].out), 1e-6);
  EXPECT_GT(errors[0], 0.05);
  // Behind it a quantize-all run has other inputs, and its error is another one.
  EXPECT_GT(std::abs(errors[1] - relative_error(stored[1].out, exact[1].out)), 1e-3);
}

TEST_F(LayerProbeTest, ErrorOfAnUnfusedFormatIsAgainstExactAttention) {
  const KvBinding binding = toy::bind(session_, "bf16");
  const Seen seen = layers_of(binding, ids_, kv::StepKind::kQuantizeAll)[0];
  const at::Tensor v = seen.in.v.to(at::kDouble).repeat_interleave(2, 1).transpose(0, 1);  // [n_heads, T, head_dim]
  const at::Tensor exact = at::matmul(naive_probabilities(model_, seen.in), v).transpose(0, 1);
  EXPECT_NEAR(layer_errors(binding, ids_, nullptr)[0], relative_error(seen.out, exact), 1e-5);
}

TEST_F(LayerProbeTest, ErrorsFallWithBitsAndVanishWhereAllIsExact) {
  std::vector<double> last = {1.0, 1.0};
  // A window that holds everything: fp16, half a unit in the last place is 2^-11.
  for (const char* spec :
       {"rotunda2:recent=0", "rotunda3:recent=0", "rotunda4:recent=0", "rotunda2:recent=64", "fp32"}) {
    const std::vector<double> errors = layer_errors(toy::bind(session_, spec), ids_, nullptr);
    for (size_t layer = 0; layer < errors.size(); ++layer)
      EXPECT_LT(errors[layer], last[layer]) << spec << ", layer " << layer;
    last = errors;
  }
  EXPECT_LT(layer_errors(toy::bind(session_, "rotunda2:recent=64"), ids_, nullptr)[1], std::exp2(-11));
  EXPECT_LT(last[1], 1e-6);
}

TEST_F(LayerProbeTest, AttentionSharesAreMeansOfProbabilities) {
  const auto seen = layers_of(toy::bind(session_, "bf16"), ids_, kv::StepKind::kGenerate);
  const at::Tensor shares = attention_shares(session_, ids_, nullptr);
  ASSERT_EQ(shares.sizes(), at::IntArrayRef({2, 40}));
  for (int64_t layer = 0; layer < 2; ++layer) {
    const at::Tensor expected =
        naive_probabilities(model_, seen[static_cast<size_t>(layer)].in).mean(at::IntArrayRef{0, 1});
    EXPECT_TRUE(shares[layer].to(at::kDouble).allclose(expected, 1e-4, 1e-7)) << "layer " << layer;
  }
}

TEST_F(LayerProbeTest, KeysAreShownAsTheyAreCoded) {
  // Of the first layer: behind it the reference has rounded once.
  const at::Tensor plain = model_keys(session_, 0, ids_, nullptr);  // [T, 128]
  ASSERT_EQ(plain.sizes(), at::IntArrayRef({40, 128}));
  // rotate: times the Hadamard matrix over both heads, before RoPE. Sylvester's: element (i, j) is -1 to the number of ones in i and j.
  at::Tensor hadamard = at::empty({128, 128});
  for (uint32_t i = 0; i < 128; ++i)
    for (uint32_t j = 0; j < 128; ++j) hadamard[i][j] = (std::popcount(i & j) % 2 == 0 ? 1.0 : -1.0) / std::sqrt(128.0);
  const at::Tensor rotated = coded_keys(toy::bind(session_, "rotate2:reorder=none"), 0, ids_, nullptr);
  EXPECT_LT(relative_error(rotated, at::matmul(plain, hadamard)), 1e-5);
  // rotunda without balance and shift: RoPE, then the matrix of one head.
  const auto [cos, sin] = model_.rope.cos_sin(at::arange(40, at::kLong), 40);
  const at::Tensor turned = ops::apply_rope(plain.view({40, 2, 64}), cos, sin);
  const at::Tensor by_head = at::matmul(turned, hadamard.narrow(0, 0, 64).narrow(1, 0, 64) * std::sqrt(2.0)).flatten(1);
  const at::Tensor ours = coded_keys(toy::bind(session_, "rotunda2:balance=none,shift=none"), 0, ids_, nullptr);
  EXPECT_LT(relative_error(ours, by_head), 1e-5);
  EXPECT_LT(relative_error(coded_keys(toy::bind(session_, "bf16"), 0, ids_, nullptr), turned.flatten(1)), 1e-5);
}

TEST(RetrievalTest, DepthIsThatOfTheLastWholeWord) {
  const Session session = toy::make_session();
  const toy::TemporaryFolder folder;
  std::string lines;
  for (const auto& [prompt, answer] :
       std::vector<std::pair<std::string, std::string>>{{"12 is the code, 12345 is not", "12"},
                                                        {"0123456789 77 678901234567", "77"},
                                                        {"no such 1234", "123"},
                                                        {"77 then 77", "77"}}) {
    lines += json{{"prompt", prompt}, {"answer", answer}}.dump() + "\n";
  }
  lines += json{{"prompt", "work out 5"}, {"solution", "so"}, {"answer", "5"}}.dump() + "\n";
  toy::write_file(folder / "data", lines);
  std::vector<std::optional<double>> depths;
  for (const AnswerItem& item : read_answers(session, folder / "data", 0)) depths.push_back(item.answer_depth);
  EXPECT_THAT(depths, ElementsAre(0.0, 11.0 / 26.0, std::nullopt, 8.0 / 10.0, std::nullopt));
}

TEST(RetrievalTest, ItemsFallIntoTheirCells) {
  const auto item = [](size_t prompt_len, std::optional<double> depth) {
    AnswerItem made;
    made.prompt_len = prompt_len;
    made.answer_depth = depth;
    return made;
  };
  const std::vector<AnswerItem> items = {item(7, 0.0), item(8, 0.2), item(15, 0.999), item(15, 0.9),
                                         item(300, std::nullopt)};
  const RetrievalGrid grid = retrieval_grid(items);
  EXPECT_THAT(grid.length_from, ElementsAre(4, 8));
  EXPECT_THAT(grid.items, ElementsAre(ElementsAre(1, 0, 0, 0, 0), ElementsAre(0, 1, 0, 0, 2)));
  EXPECT_THAT(retrieved(grid, items, {false, true, true, false, true}),
              ElementsAre(ElementsAre(0, 0, 0, 0, 0), ElementsAre(0, 1, 0, 0, 1)));
  EXPECT_TRUE(retrieval_grid({item(300, std::nullopt)}).length_from.empty());
}

class CompareTest : public testing::Test {
 protected:
  CompareOptions options_for(const std::string& specs) {
    CompareOptions options;
    options.specs = kv::parse_kv_specs(specs);
    options.window_len = 64;
    options.windows = 2;
    options.max_new_tokens = 12;
    options.decode_len = 50;
    options.probe_len = 48;
    return options;
  }

  Session session_ = toy::make_session();
  toy::TemporaryFolder folder_;
};

TEST_F(CompareTest, GathersWhatThePartsFindAlone) {
  CompareOptions options = options_for("rotunda2:recent=0,rotunda4");
  toy::write_file(folder_ / "data", json{{"prompt", "the code is 7\nthe code?"}, {"answer", "7"}}.dump() + "\n" +
                                        json{{"prompt", "x"}, {"answer", "y"}}.dump() + "\n");
  options.data = {folder_ / "data"};
  options.prompts = {{"the first", "and <another>"}};
  const CompareReport report = compare(session_, kText, options);
  ASSERT_EQ(report.rows.size(), 3u);
  EXPECT_EQ(report.reference, 0u);
  EXPECT_EQ(report.rows[0].quality.requested.to_string(), "bf16");

  PerplexityOptions alone;
  alone.specs = options.specs;
  alone.window_len = 64;
  alone.limit = 2;
  const PerplexityReport perplexity = evaluate_perplexity(session_, kText, alone);
  AnswersOptions answers;
  answers.specs = options.specs;
  answers.data = folder_ / "data";
  const AccuracyReport accuracy = evaluate_answers(session_, answers);
  for (size_t i = 0; i < 2; ++i) {
    const CompareRow& row = report.rows[i + 1];
    EXPECT_EQ(row.quality.ppl, perplexity.results[i].ppl);
    EXPECT_EQ(row.quality.mean_kl, perplexity.results[i].mean_kl);
    EXPECT_EQ(row.quality.cache_bytes, perplexity.results[i].cache_bytes);
    ASSERT_EQ(row.answers.size(), 1u);
    EXPECT_EQ(row.answers[0].correct, accuracy.results[i].correct);
    EXPECT_GT(row.decode_tok_s, 0.0);
    EXPECT_EQ(row.layer_error,
              layer_errors(toy::bind(session_, row.quality.requested.to_string()), text_ids(session_, 48), nullptr));
    ASSERT_EQ(row.generated.size(), 2u);
  }
  EXPECT_THAT(report.retrieval.items, ElementsAre(ElementsAre(0, 0, 1, 0, 0)));
  EXPECT_EQ(report.keys.sizes(), at::IntArrayRef({48, 64}));
  EXPECT_EQ(report.attention.sizes(), at::IntArrayRef({2, 48}));
  EXPECT_EQ(report.probe_tokens.size(), 48u);
}

TEST_F(CompareTest, TextsPartWhereTheirTokensDo) {
  CompareOptions options = options_for("fp32,bf16,rotunda2:recent=0,sinks=0,first=0");
  options.prompts = {{"the first", "what is measured", "Caf\xc3\xa9 \xff"}};
  const CompareReport report = compare(session_, kText, options);
  EXPECT_EQ(report.reference, 1u);
  GenerateRequest request;
  request.prompts = *options.prompts;
  request.options.max_new_tokens = options.max_new_tokens;
  const GenerateResult reference = generate(session_, toy::bind(session_, "bf16"), request);
  int n_different = 0;
  for (const CompareRow& row : report.rows) {
    const GenerateResult own = generate(session_, toy::bind(session_, row.quality.requested.to_string()), request);
    for (size_t p = 0; p < 3; ++p) {
      const GeneratedText& text = row.generated[p];
      EXPECT_EQ(text.same + text.rest, own.sequences[p].text);
      EXPECT_TRUE(reference.sequences[p].text.starts_with(text.same));
      const auto& a = own.sequences[p].tokens;
      const auto& b = reference.sequences[p].tokens;
      ASSERT_EQ(text.first_difference.has_value(), a != b);
      if (!text.first_difference) continue;
      ++n_different;
      const size_t at = static_cast<size_t>(*text.first_difference);
      EXPECT_TRUE(std::equal(a.begin(), a.begin() + *text.first_difference, b.begin()));
      EXPECT_TRUE(at == a.size() || at == b.size() || a[at] != b[at]);
    }
  }
  EXPECT_GT(n_different, 0);  // two bits of random keys change some text
  for (const GeneratedText& text : report.rows[1].generated) EXPECT_EQ(text.rest, "");
}

TEST_F(CompareTest, PromptsComeFromTheTextAndMayBeLeftOut) {
  CompareOptions options = options_for("bf16");
  const CompareReport with = compare(session_, kText, options);
  ASSERT_EQ(with.prompts.size(), 3u);
  for (const std::string& prompt : with.prompts) EXPECT_THAT(kText, HasSubstr(prompt));
  options.prompts.emplace();
  options.decode_len = 0;
  const CompareReport without = compare(session_, "short", options);
  EXPECT_TRUE(without.prompts.empty());
  EXPECT_EQ(without.rows[0].decode_tok_s, 0.0);
  EXPECT_EQ(without.rows[0].layer_error.size(), 2u);
}

TEST_F(CompareTest, WrongInputIsRefusedBeforeTheFirstRun) {
  const auto refused = [&](const auto& change, const std::string& text = kText) {
    CompareOptions options = options_for("bf16,rotunda2");
    options.progress = [](const std::string& stage, int64_t, int64_t) { ADD_FAILURE() << "ran: " << stage; };
    change(options);
    return toy::error_of([&] { compare(session_, text, options); });
  };
  EXPECT_THAT(refused([](CompareOptions& o) { o.key_layer = 2; }),
              HasSubstr("--key-layer: got 2, the model has 0 to 1"));
  EXPECT_THAT(refused([](CompareOptions& o) { o.key_head = -1; }), HasSubstr("--key-head: got -1"));
  EXPECT_THAT(refused([](CompareOptions& o) { o.windows = -1; }), HasSubstr("--windows: got -1"));
  EXPECT_THAT(refused([](CompareOptions& o) { o.probe_len = 1; }), HasSubstr("--probe-len: got 1, expected 2 to 1024"));
  EXPECT_THAT(refused([](CompareOptions& o) { o.probe_len = 1025; }), HasSubstr("--probe-len: got 1025"));
  EXPECT_THAT(refused([](CompareOptions& o) { o.max_new_tokens = 0; }), HasSubstr("--max-new-tokens: got 0"));
  EXPECT_THAT(refused([](CompareOptions& o) { o.specs = kv::parse_kv_specs("bf16,nonsense"); }), HasSubstr("nonsense"));
  EXPECT_THAT(refused([&](CompareOptions& o) { o.data = {folder_ / "absent"}; }), HasSubstr("absent"));
  toy::write_file(folder_ / "odd", "{\"prompt\": \"a\"}\n");
  EXPECT_THAT(refused([&](CompareOptions& o) { o.data = {folder_ / "odd"}; }),
              HasSubstr("odd:1: key 'answer' is missing"));
  EXPECT_THAT(refused([](CompareOptions&) {}, "x"), HasSubstr("the text has 1 tokens"));
}

TEST_F(CompareTest, AStopAnywhereGivesNoReport) {
  for (const std::string stage : {"perplexity", "layers", "speed", "generating"}) {
    CompareOptions options = options_for("bf16,rotunda2");
    std::atomic<bool> stop = false;
    bool reached = false;
    options.stop = &stop;
    options.progress = [&](const std::string& now, int64_t, int64_t) {
      if (now.starts_with(stage)) reached = stop = true;
    };
    EXPECT_THROW(compare(session_, kText, options), Interrupted) << stage;
    EXPECT_TRUE(reached) << stage;
  }
}

}  // namespace
}  // namespace rotunda::engine
