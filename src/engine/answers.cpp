#include "engine/answers.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <span>

#include "base/check.h"
#include "engine/jsonl.h"
#include "engine/scoring.h"
#include "engine/step.h"

namespace rotunda::engine {

namespace {

struct Item {
  std::vector<int64_t> ids;  // BOS, prompt, answer
  size_t prompt_len = 0;     // BOS included
};

std::string target_text(const JsonlLine& line) {
  const std::string answer = line.text("answer");
  ROTUNDA_CHECK(!answer.empty(), line.where(), ": 'answer' is empty");
  if (!line.has("solution")) return concat(" ", answer);
  return concat(" ", line.text("solution"), " The answer is ", answer, ".");
}

Item make_item(const Session& session, const JsonlLine& line) {
  Item item;
  if (const auto bos = session.bos_id()) item.ids.push_back(*bos);
  const auto prompt = session.tokenizer->encode(line.text("prompt"), /*add_special=*/false);
  const auto target = session.tokenizer->encode(target_text(line), /*add_special=*/false);
  item.ids.insert(item.ids.end(), prompt.begin(), prompt.end());
  item.prompt_len = item.ids.size();
  ROTUNDA_CHECK(item.prompt_len > 0, line.where(), ": 'prompt' has no tokens");
  item.ids.insert(item.ids.end(), target.begin(), target.end());
  return item;
}

// Hidden states that predict the answer's tokens, [n, hidden_size].
at::Tensor run_item(const KvBinding& binding, kv::KvCache& cache, kv::SeqId seq, const Item& item, const EvalOptions& options) {
  const std::span<const int64_t> ids(item.ids);
  const int64_t n_ids = static_cast<int64_t>(ids.size());
  const int64_t prompt_len = static_cast<int64_t>(item.prompt_len);
  if (options.protocol == Protocol::kQuantizeAll) {
    const kv::SeqChunk chunk{.seq = seq, .n_tokens = n_ids, .is_prompt = true, .rope_len = 0};
    const at::Tensor hidden = run_step(*binding.model, cache, {chunk}, ids, kv::StepKind::kQuantizeAll, options.stop);
    return hidden.narrow(0, prompt_len - 1, n_ids - prompt_len);
  }
  const at::Tensor prompt =
      run_prefill(*binding.model, cache, seq, ids.first(item.prompt_len), options.prefill_chunk, options.stop);
  std::vector<at::Tensor> rows{prompt.narrow(0, prompt_len - 1, 1)};
  for (size_t i = item.prompt_len; i + 1 < ids.size(); ++i) {
    const kv::SeqChunk chunk{.seq = seq, .n_tokens = 1, .is_prompt = false, .rope_len = 0};
    rows.push_back(run_step(*binding.model, cache, {chunk}, ids.subspan(i, 1), kv::StepKind::kGenerate, options.stop));
  }
  return at::cat(rows);
}

}  // namespace

AccuracyReport evaluate_answers(const Session& session, const AnswersOptions& options) {
  std::vector<Item> items;
  for (const JsonlLine& line : read_jsonl(options.data, options.limit)) items.push_back(make_item(session, line));
  const std::vector<KvBinding> bindings = bind_all(session, options);
  size_t longest = 0;
  for (const Item& item : items) longest = std::max(longest, item.ids.size());
  for (const KvBinding& binding : bindings) require_memory(binding, {static_cast<int64_t>(longest)});

  return run_items(bindings, options, "answers", static_cast<int64_t>(items.size()),
                   [&](const KvBinding& binding, kv::KvCache& cache, int64_t index) {
                     const Item& item = items[static_cast<size_t>(index)];
                     const SequenceGuard seq(cache, cache.create());
                     const at::Tensor hidden = run_item(binding, cache, seq.id(), item, options);
                     const auto scores = score_targets(*binding.model, hidden, std::span(item.ids).subspan(item.prompt_len));
                     ItemOutcome outcome;
                     outcome.correct = std::all_of(scores.begin(), scores.end(), [](const TokenScore& s) { return s.is_top; });
                     outcome.tokens = static_cast<int64_t>(item.ids.size());
                     outcome.usage = cache.usage();
                     return outcome;
                   });
}

}  // namespace rotunda::engine
