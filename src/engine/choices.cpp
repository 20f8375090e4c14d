#include "engine/choices.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <span>

#include "base/check.h"
#include "engine/jsonl.h"
#include "engine/scoring.h"
#include "engine/step.h"

namespace rotunda::engine {

namespace {

struct Candidate {
  std::vector<int64_t> ids;  // BOS, context, continuation
  size_t scored_from = 0;    // first token of the continuation, at least 1
  double n_bytes = 0.0;      // of the continuation, the joining space left out
};

struct Item {
  std::vector<Candidate> candidates;
  size_t gold = 0;
  bool greedy = false;    // one candidate: right where every token is the likeliest
  size_t shared_len = 0;  // leading tokens common to all candidates, before the first scored one
};

size_t common_prefix(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

// Context and continuation are tokenized together; where the tokens of the context change by that, scoring begins there.
Candidate make_candidate(const Session& session, const std::string& where, const std::string& context,
                         const std::string& joined, const std::string& continuation) {
  ROTUNDA_CHECK(!continuation.empty(), where, ": a choice is empty");
  const auto encode = [&](const std::string& text) {
    std::vector<int64_t> ids = session.tokenizer->encode(text, /*add_special=*/false);
    if (const auto bos = session.bos_id()) ids.insert(ids.begin(), *bos);
    return ids;
  };
  Candidate candidate;
  candidate.ids = encode(context + joined + continuation);
  candidate.scored_from = std::min(common_prefix(encode(context), candidate.ids), candidate.ids.size() - 1);
  candidate.scored_from = std::max<size_t>(candidate.scored_from, 1);
  candidate.n_bytes = static_cast<double>(continuation.size());
  ROTUNDA_CHECK(candidate.ids.size() > candidate.scored_from, where, ": has no token to score");
  return candidate;
}

std::string strip_end(std::string text) {
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  return text;
}

bool ends_in_question(const std::string& query) {
  const size_t last = query.rfind("Question:");
  return last == 0 || (last != std::string::npos && query[last - 1] == '\n');
}

Item make_item(const Session& session, const JsonlLine& line) {
  Item item;
  if (line.has("query") && line.has("choices")) {
    const std::string query = strip_end(line.text("query"));
    const std::string context = ends_in_question(query) ? query + "\nAnswer:" : query;
    for (const std::string& choice : line.texts("choices")) {
      item.candidates.push_back(make_candidate(session, line.where(), context, " ", choice));
    }
  } else if (line.has("context_options") && line.has("continuation")) {
    const std::string continuation = line.text("continuation");
    for (const std::string& context : line.texts("context_options")) {
      item.candidates.push_back(make_candidate(session, line.where(), strip_end(context), " ", continuation));
    }
  } else {
    ROTUNDA_CHECK(line.has("context") && line.has("continuation"), line.where(),
                  ": unknown form; expected the keys query, choices, gold; or context_options, continuation, gold; or "
                  "context, continuation");
    item.greedy = true;
    item.candidates.push_back(
        make_candidate(session, line.where(), strip_end(line.text("context")), " ", line.text("continuation")));
  }
  if (!item.greedy) {
    const int64_t gold = line.whole_number("gold");
    const int64_t n = static_cast<int64_t>(item.candidates.size());
    ROTUNDA_CHECK(n >= 2, line.where(), ": ", n, " choices, expected 2 or more");
    ROTUNDA_CHECK(gold >= 0 && gold < n, line.where(), ": 'gold' is ", gold, ", expected 0 to ", n - 1);
    item.gold = static_cast<size_t>(gold);
  }
  item.shared_len = item.candidates[0].scored_from;
  for (const Candidate& candidate : item.candidates) {
    item.shared_len = std::min({item.shared_len, candidate.scored_from, common_prefix(item.candidates[0].ids, candidate.ids)});
  }
  return item;
}

// Rows that predict the tokens from `scored_from` on, of every candidate, [n, hidden_size] each.
std::vector<at::Tensor> run_deploy(const KvBinding& binding, kv::KvCache& cache, const Item& item, const EvalOptions& options,
                                   ItemOutcome& outcome) {
  const kv::SeqId shared = cache.create();
  const SequenceGuard shared_guard(cache, shared);
  at::Tensor prompt;
  if (item.shared_len > 0) {
    prompt = run_prefill(*binding.model, cache, shared, std::span(item.candidates[0].ids).first(item.shared_len),
                         options.prefill_chunk, options.stop);
    outcome.tokens += static_cast<int64_t>(item.shared_len);
  }
  std::vector<std::unique_ptr<SequenceGuard>> forks;
  std::vector<at::Tensor> rows;
  for (const Candidate& candidate : item.candidates) {
    forks.push_back(std::make_unique<SequenceGuard>(cache, cache.fork(shared)));
    const kv::SeqId seq = forks.back()->id();
    const int64_t shared_len = static_cast<int64_t>(item.shared_len);
    const int64_t context_rest = static_cast<int64_t>(candidate.scored_from - item.shared_len);
    const std::span<const int64_t> ids(candidate.ids);
    std::vector<at::Tensor> parts;
    if (context_rest > 0) {
      parts.push_back(run_prefill(*binding.model, cache, seq, ids.subspan(item.shared_len, candidate.scored_from - item.shared_len),
                                  options.prefill_chunk, options.stop)
                          .narrow(0, context_rest - 1, 1));
    } else {
      parts.push_back(prompt.narrow(0, shared_len - 1, 1));
    }
    // The last token predicts nothing that is scored.
    const auto answer = ids.subspan(candidate.scored_from, ids.size() - candidate.scored_from - 1);
    if (!answer.empty()) {
      const kv::SeqChunk chunk{.seq = seq, .n_tokens = static_cast<int64_t>(answer.size()), .is_prompt = false, .rope_len = 0};
      parts.push_back(run_step(*binding.model, cache, {chunk}, answer, kv::StepKind::kGenerate, options.stop));
    }
    outcome.tokens += context_rest + static_cast<int64_t>(answer.size());
    rows.push_back(at::cat(parts));
  }
  outcome.usage = usage_of_distinct(cache, outcome.tokens);
  return rows;
}

std::vector<at::Tensor> run_quantize_all(const KvBinding& binding, kv::KvCache& cache, const Item& item,
                                         const EvalOptions& options, ItemOutcome& outcome) {
  std::vector<at::Tensor> rows;
  for (const Candidate& candidate : item.candidates) {
    const SequenceGuard seq(cache, cache.create());
    const int64_t n = static_cast<int64_t>(candidate.ids.size());
    const kv::SeqChunk chunk{.seq = seq.id(), .n_tokens = n, .is_prompt = true, .rope_len = 0};
    const at::Tensor hidden = run_step(*binding.model, cache, {chunk}, candidate.ids, kv::StepKind::kQuantizeAll, options.stop);
    const int64_t from = static_cast<int64_t>(candidate.scored_from);
    rows.push_back(hidden.narrow(0, from - 1, n - from));
    outcome.tokens += n;
    outcome.usage = cache.usage();
  }
  return rows;
}

}  // namespace

AccuracyReport evaluate_choices(const Session& session, const ChoicesOptions& options) {
  std::vector<Item> items;
  int64_t longest = 0;
  for (const JsonlLine& line : read_jsonl(options.data, options.limit)) {
    items.push_back(make_item(session, line));
    int64_t n_tokens = 0;
    for (const Candidate& candidate : items.back().candidates) n_tokens += static_cast<int64_t>(candidate.ids.size());
    longest = std::max(longest, n_tokens);
  }
  const std::vector<KvBinding> bindings = bind_all(session, options);
  for (const KvBinding& binding : bindings) require_memory(binding, {longest});

  return run_items(bindings, options, "choices", static_cast<int64_t>(items.size()),
                   [&](const KvBinding& binding, kv::KvCache& cache, int64_t index) {
                     const Item& item = items[static_cast<size_t>(index)];
                     ItemOutcome outcome;
                     const auto rows = options.protocol == Protocol::kDeploy
                                           ? run_deploy(binding, cache, item, options, outcome)
                                           : run_quantize_all(binding, cache, item, options, outcome);
                     size_t best = 0;
                     size_t best_norm = 0;
                     std::vector<double> sums;
                     std::vector<double> norms;
                     bool all_top = true;
                     for (size_t c = 0; c < item.candidates.size(); ++c) {
                       const Candidate& candidate = item.candidates[c];
                       double sum = 0.0;
                       for (const TokenScore& score : score_targets(*binding.model, rows[c],
                                                                    std::span(candidate.ids).subspan(candidate.scored_from))) {
                         sum += score.log_prob;
                         all_top = all_top && score.is_top;
                       }
                       sums.push_back(sum);
                       norms.push_back(sum / candidate.n_bytes);
                       if (sums[c] > sums[best]) best = c;
                       if (norms[c] > norms[best_norm]) best_norm = c;
                     }
                     if (item.greedy) {
                       outcome.correct = all_top;
                     } else {
                       outcome.correct = best == item.gold;
                       outcome.correct_norm = best_norm == item.gold;
                     }
                     return outcome;
                   });
}

}  // namespace rotunda::engine
