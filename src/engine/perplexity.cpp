#include "engine/perplexity.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>

#include "base/check.h"
#include "base/log.h"
#include "engine/scoring.h"
#include "engine/step.h"
#include "ops/device.h"

namespace rotunda::engine {

namespace {

constexpr int64_t kDefaultWindowLen = 4096;

// What one cache gathers over the windows.
struct Gathered {
  RunningMean nll;
  RunningMean kl;
  RunningMean same_top;
  UsageTally usage;
  double seconds = 0.0;
  int64_t windows = 0;
};

// Adds the time of its scope to a sum.
class Timed {
 public:
  explicit Timed(double& seconds) : seconds_(seconds) {}
  ~Timed() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// [window.size(), hidden_size] of a window in a cache of its own.
at::Tensor run_window(const KvBinding& binding, std::span<const int64_t> window, const EvalOptions& options, Gathered& gathered) {
  const Timed timed(gathered.seconds);
  const auto cache = binding.make_cache();
  const kv::SeqId seq = cache->create();
  at::Tensor hidden;
  if (options.protocol == Protocol::kQuantizeAll) {
    const kv::SeqChunk chunk{.seq = seq, .n_tokens = static_cast<int64_t>(window.size()), .is_prompt = true, .rope_len = 0};
    hidden = run_step(*binding.model, *cache, {chunk}, window, kv::StepKind::kQuantizeAll, options.stop);
  } else {
    hidden = run_prefill(*binding.model, *cache, seq, window, options.prefill_chunk, options.stop);
  }
  ops::synchronize(hidden.device());
  gathered.usage.add(cache->usage());
  ++gathered.windows;
  return hidden;
}

// Scores one block of rows against targets and, unless it is the reference itself, against the reference.
void score_block(const at::Tensor& log_probs, const at::Tensor& reference, std::span<const int64_t> targets, Gathered& gathered) {
  const at::Tensor log_prob = target_log_probs(log_probs, target_tensor(targets, log_probs.device()));
  at::Tensor kl = at::zeros_like(log_prob);
  at::Tensor same_top = at::ones_like(log_prob);
  if (!log_probs.is_same(reference)) {
    kl = (reference.exp() * (reference - log_probs)).sum(-1, false, at::kDouble);
    same_top = reference.argmax(-1).eq(log_probs.argmax(-1)).to(at::kDouble);
  }
  const at::Tensor read = at::stack({log_prob, kl, same_top}).to(at::kCPU);  // together: on a GPU every reading waits
  const int64_t n = read.size(1);
  const double* values = read.const_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    gathered.nll.add(-values[i]);
    gathered.kl.add(values[n + i]);
    gathered.same_top.add(values[2 * n + i]);
  }
}

PerplexityResult to_result(const KvBinding& binding, const Gathered& gathered, int64_t tokens_per_window) {
  PerplexityResult result;
  result.requested = binding.requested;
  result.used = binding.used;
  result.items = gathered.windows;
  result.tokens = gathered.windows * tokens_per_window;
  result.bits_per_element = gathered.usage.bits_per_element();
  result.cache_bytes = gathered.usage.cache_bytes();
  result.tok_s = gathered.seconds > 0.0 ? static_cast<double>(result.tokens) / gathered.seconds : 0.0;
  result.ppl = std::exp(gathered.nll.mean());
  result.ppl_stderr = result.ppl * gathered.nll.standard_error();
  result.mean_kl = gathered.kl.mean();
  result.top1_agreement = gathered.same_top.mean();
  return result;
}

int64_t checked_window_len(const Session& session, std::optional<int64_t> window_len) {
  const int64_t trained = session.model->info().max_position_embeddings;
  if (!window_len) return trained > 0 ? std::min(kDefaultWindowLen, trained) : kDefaultWindowLen;
  ROTUNDA_CHECK(*window_len >= 2, "--window-len: got ", *window_len, ", expected 2 or more");
  if (trained > 0 && *window_len > trained) {
    ROTUNDA_LOG_WARN("windows of {} tokens are longer than the {} that the model was trained for", *window_len, trained);
  }
  return *window_len;
}

}  // namespace

std::vector<int64_t> TextWindows::window(int64_t index) const {
  // BOS takes the first place of a window but not a token of the text.
  const int64_t n = window_len - (bos ? 1 : 0);
  std::vector<int64_t> made;
  if (bos) made.push_back(*bos);
  made.insert(made.end(), tokens.begin() + index * n, tokens.begin() + (index + 1) * n);
  return made;
}

TextWindows cut_text(const Session& session, std::string_view text, std::optional<int64_t> window_len) {
  TextWindows made;
  made.window_len = checked_window_len(session, window_len);
  made.bos = session.bos_id();
  made.tokens = session.tokenizer->encode(text, /*add_special=*/false);
  const int64_t n_tokens = static_cast<int64_t>(made.tokens.size());
  const int64_t n_special = made.bos ? 1 : 0;
  ROTUNDA_CHECK(n_tokens >= 2, "the text has ", n_tokens, " tokens, expected 2 or more");
  made.n_windows = n_tokens / (made.window_len - n_special);
  if (made.n_windows == 0) {
    made.n_windows = 1;
    made.window_len = n_tokens + n_special;
  }
  return made;
}

PerplexityReport evaluate_perplexity(const Session& session, std::string_view text, const PerplexityOptions& options) {
  const TextWindows windows = cut_text(session, text, options.window_len);
  return evaluate_perplexity(session, windows, bind_all(session, options), options);
}

PerplexityReport evaluate_perplexity(const Session& session, const TextWindows& text, const std::vector<KvBinding>& bindings,
                                     const EvalOptions& options, int64_t first_window) {
  PerplexityReport report;
  report.window_len = text.window_len;
  int64_t n_windows = text.n_windows - first_window;
  ROTUNDA_ASSERT(first_window >= 0 && n_windows > 0);
  if (options.limit > 0) n_windows = std::min(n_windows, options.limit);

  const KvBinding reference = bind_kv(session, kv::parse_kv_spec(kReferenceKv), std::nullopt, options.progress, options.stop);
  require_memory(reference, {report.window_len});
  for (const KvBinding& binding : bindings) require_memory(binding, {report.window_len});

  Gathered reference_gathered;
  std::vector<Gathered> gathered(bindings.size());
  const int64_t n_runs = n_windows * (static_cast<int64_t>(bindings.size()) + 1);
  const int64_t vocab_size = session.model->info().vocab_size;
  const int64_t block_rows = logit_block_rows(vocab_size, session.model->info().kv.device);
  int64_t runs_done = 0;
  const auto tell = [&](const KvBinding& binding) {
    if (options.progress) options.progress("perplexity, " + binding.requested.to_string(), ++runs_done, n_runs);
  };

  try {
    for (int64_t w = 0; w < n_windows; ++w) {
      const std::vector<int64_t> window = text.window(first_window + w);
      // The last token is only scored, but it runs too: a cache may look at a whole window, as the reference figures do.
      const std::span<const int64_t> targets = std::span(window).subspan(1);
      // A window counts for all caches or for none, so that an interrupted run compares like with like.
      Gathered reference_next = reference_gathered;
      std::vector<Gathered> next = gathered;

      const at::Tensor reference_hidden = run_window(reference, window, options, reference_next);
      tell(reference);
      std::vector<at::Tensor> hidden(bindings.size());
      for (size_t b = 0; b < bindings.size(); ++b) {
        if (bindings[b].used == reference.used) {
          next[b].usage = reference_next.usage;
        } else {
          hidden[b] = run_window(bindings[b], window, options, next[b]);
        }
        tell(bindings[b]);
      }
      for (int64_t begin = 0; begin < static_cast<int64_t>(targets.size()); begin += block_rows) {
        if (stop_requested(options.stop)) throw Interrupted();
        const int64_t n = std::min(block_rows, static_cast<int64_t>(targets.size()) - begin);
        const auto block_targets = targets.subspan(static_cast<size_t>(begin), static_cast<size_t>(n));
        at::Tensor reference_probs;
        {
          const Timed timed(reference_next.seconds);
          reference_probs = block_log_probs(*reference.model, reference_hidden, begin, n);  // [n, vocab_size]
          ops::synchronize(reference_probs.device());
        }
        score_block(reference_probs, reference_probs, block_targets, reference_next);
        for (size_t b = 0; b < bindings.size(); ++b) {
          if (!hidden[b].defined()) continue;
          at::Tensor probs;
          {
            const Timed timed(next[b].seconds);
            probs = block_log_probs(*bindings[b].model, hidden[b], begin, n);
            ops::synchronize(probs.device());
          }
          score_block(probs, reference_probs, block_targets, next[b]);
        }
      }
      for (size_t b = 0; b < bindings.size(); ++b) {
        if (!hidden[b].defined()) next[b] = reference_next;
        ROTUNDA_CHECK(std::isfinite(next[b].nll.mean()), "--kv ", bindings[b].requested.to_string(), ": window ", w + 1,
                      " gives logits that are not finite");
      }
      reference_gathered = std::move(reference_next);
      gathered = std::move(next);
      report.scored_tokens += static_cast<int64_t>(targets.size());
    }
  } catch (const Interrupted&) {
    if (report.scored_tokens == 0) throw;
    report.interrupted = true;
  }

  report.reference = to_result(reference, reference_gathered, report.window_len);
  for (size_t b = 0; b < bindings.size(); ++b) {
    report.results.push_back(to_result(bindings[b], gathered[b], report.window_len));
    report.results.back().ppl_change = report.results.back().ppl / report.reference.ppl - 1.0;
  }
  return report;
}

}  // namespace rotunda::engine
