#include "engine/perplexity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/check.h"
#include "engine/toy.h"

namespace rotunda::engine {
namespace {

using testing::HasSubstr;

std::string sample_text(size_t n_bytes) {
  std::string text;
  for (size_t i = 0; text.size() < n_bytes; ++i) text += concat("line ", i * i % 97, " of the text\n");
  return text.substr(0, n_bytes);
}

struct Expected {
  double ppl, ppl_stderr, mean_kl, top1;
};

// Whole-window log-probabilities in doubles, no blocks, no running sums.
Expected naive(const Session& session, const std::string& text, const std::string& spec, int64_t window_len, int64_t n_windows) {
  const KvBinding binding = toy::bind(session, spec);
  const KvBinding reference = toy::bind(session, kReferenceKv);
  const auto ids = session.tokenizer->encode(text, false);
  const auto bos = session.bos_id();
  const int64_t per_window = bos ? window_len - 1 : window_len;
  std::vector<at::Tensor> nll, kl, same;
  for (int64_t w = 0; w < n_windows; ++w) {
    std::vector<int64_t> window(ids.begin() + w * per_window, ids.begin() + (w + 1) * per_window);
    if (bos) window.insert(window.begin(), *bos);
    const auto log_probs = [&](const KvBinding& b) {
      const at::Tensor hidden = toy::run_whole(b, window, kv::StepKind::kQuantizeAll);
      return at::log_softmax(b.model->logits(hidden.narrow(0, 0, hidden.size(0) - 1)).to(at::kDouble), -1);
    };
    const at::Tensor p = log_probs(reference);
    const at::Tensor q = log_probs(binding);
    const at::Tensor targets = at::tensor(std::vector<int64_t>(window.begin() + 1, window.end()), at::kLong);
    nll.push_back(-q.gather(1, targets.unsqueeze(1)).squeeze(1));
    kl.push_back((p.exp() * (p - q)).sum(1));
    same.push_back(p.argmax(1).eq(q.argmax(1)).to(at::kDouble));
  }
  const at::Tensor all = at::cat(nll);
  const double ppl = std::exp(all.mean().item<double>());
  return {ppl, ppl * all.std().item<double>() / std::sqrt(static_cast<double>(all.numel())), at::cat(kl).mean().item<double>(),
          at::cat(same).mean().item<double>()};
}

TEST(Perplexity, EqualsTheDefinitionWithAndWithoutBos) {
  const std::string text = sample_text(1700);
  for (const bool with_bos : {true, false}) {
    const Session session = toy::make_session(with_bos);
    PerplexityOptions options;
    options.specs = kv::parse_kv_specs("fp32,bf16,rotate2:recent=16,sinks=4,reorder=none");
    options.window_len = 400;
    options.limit = 3;
    const PerplexityReport report = evaluate_perplexity(session, text, options);
    ASSERT_EQ(report.results.size(), 3u);
    EXPECT_EQ(report.scored_tokens, 3 * 399);
    for (const PerplexityResult& result : report.results) {
      const Expected expected = naive(session, text, result.requested.to_string(), 400, 3);
      EXPECT_NEAR(result.ppl / expected.ppl, 1.0, 1e-5) << result.requested.to_string();
      EXPECT_NEAR(result.ppl_stderr / expected.ppl_stderr, 1.0, 1e-4);
      EXPECT_NEAR(result.mean_kl, expected.mean_kl, 1e-5 + 1e-4 * expected.mean_kl);
      EXPECT_NEAR(result.top1_agreement, expected.top1, 2.0 / 1197.0);
      EXPECT_EQ(result.items, 3);
      EXPECT_NEAR(result.ppl_change, result.ppl / report.reference.ppl - 1.0, 1e-12);
    }
    EXPECT_EQ(report.results[1].mean_kl, 0.0);
    EXPECT_EQ(report.results[1].top1_agreement, 1.0);
    EXPECT_DOUBLE_EQ(report.results[1].ppl, report.reference.ppl);
    EXPECT_GE(report.results[0].bits_per_element, 32.0);
    EXPECT_LT(report.results[2].bits_per_element, report.results[1].bits_per_element);
    EXPECT_GT(report.results[2].mean_kl, report.results[0].mean_kl);
    EXPECT_THAT(report.results[2].used.to_string(), HasSubstr("clip="));
  }
}

TEST(Perplexity, DeployIsExactForExactCachesAndSeesTheCurrentChunkExactly) {
  const Session session = toy::make_session();
  const std::string text = sample_text(800);
  PerplexityOptions options;
  options.specs = kv::parse_kv_specs("fp32,rotate2:recent=0,sinks=0,reorder=none");
  options.window_len = 300;
  options.prefill_chunk = 64;
  const PerplexityReport all = evaluate_perplexity(session, text, options);
  options.protocol = Protocol::kDeploy;
  const PerplexityReport deploy = evaluate_perplexity(session, text, options);
  EXPECT_NEAR(deploy.results[0].ppl / all.results[0].ppl, 1.0, 1e-5);
  EXPECT_LT(deploy.results[1].mean_kl, all.results[1].mean_kl);
  EXPECT_GT(deploy.results[1].mean_kl, 0.0);
}

TEST(Perplexity, ShortTextsRestsAndDefaults) {
  const Session session = toy::make_session(true, 1, 256);
  PerplexityOptions options;
  options.specs = kv::parse_kv_specs("fp32");
  PerplexityReport report = evaluate_perplexity(session, sample_text(100), options);
  EXPECT_EQ(report.scored_tokens, 100) << "one window, as long as the text";
  EXPECT_EQ(report.window_len, 101);
  report = evaluate_perplexity(session, sample_text(600), options);
  EXPECT_EQ(report.window_len, 256) << "the trained context";
  EXPECT_EQ(report.scored_tokens, 2 * 255) << "the rest is left out";
  EXPECT_THAT(toy::error_of([&] { evaluate_perplexity(session, "a", options); }), HasSubstr("the text has 1 tokens"));
  options.window_len = 1;
  EXPECT_THAT(toy::error_of([&] { evaluate_perplexity(session, "abc", options); }), HasSubstr("--window-len: got 1"));
  options.window_len.reset();
  options.specs.clear();
  EXPECT_THAT(toy::error_of([&] { evaluate_perplexity(session, "abc", options); }), HasSubstr("--kv"));
}

TEST(Perplexity, AStopKeepsTheWindowsDone) {
  const Session session = toy::make_session();
  std::atomic<bool> stop{false};
  PerplexityOptions options;
  options.specs = kv::parse_kv_specs("fp32");
  options.window_len = 50;
  options.stop = &stop;
  options.progress = [&](const std::string&, int64_t done, int64_t) { stop = done >= 5; };  // two runs a window
  const PerplexityReport report = evaluate_perplexity(session, sample_text(600), options);
  EXPECT_TRUE(report.interrupted);
  EXPECT_EQ(report.results[0].items, 2);
  EXPECT_EQ(report.scored_tokens, 2 * 49);
  EXPECT_THROW(evaluate_perplexity(session, sample_text(600), options), Interrupted);
}

}  // namespace
}  // namespace rotunda::engine
