#include "engine/answers.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cctype>
#include <span>

#include "base/check.h"
#include "engine/jsonl.h"
#include "engine/scoring.h"
#include "engine/step.h"

namespace rotunda::engine {

namespace {

std::string target_text(const JsonlLine& line) {
  const std::string answer = line.text("answer");
  ROTUNDA_CHECK(!answer.empty(), line.where(), ": 'answer' is empty");
  if (!line.has("solution")) return concat(" ", answer);
  // No period behind the answer: it merges with what follows in many vocabularies, and a text that ends there is unusual.
  return concat(" ", line.text("solution"), " The answer is ", answer);
}

bool is_word_char(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; }

// Of the last place where `word` stands alone, as a share of the text's bytes.
std::optional<double> depth_of(const std::string& word, const std::string& text) {
  for (size_t at = text.rfind(word); at != std::string::npos; at = at == 0 ? std::string::npos : text.rfind(word, at - 1)) {
    const size_t end = at + word.size();
    const bool alone = (at == 0 || !is_word_char(text[at - 1])) && (end == text.size() || !is_word_char(text[end]));
    if (alone) return static_cast<double>(at) / static_cast<double>(text.size());
  }
  return std::nullopt;
}

AnswerItem make_item(const Session& session, const JsonlLine& line) {
  const std::string prompt = line.text("prompt");
  // Together, because tokenizers may treat the start of a text as the start of a word.
  AnswerItem item;
  item.ids = session.tokenizer->encode(prompt + target_text(line), /*add_special=*/false);
  const auto prompt_ids = session.tokenizer->encode(prompt, /*add_special=*/false);
  item.prompt_len = static_cast<size_t>(std::mismatch(prompt_ids.begin(), prompt_ids.end(), item.ids.begin(), item.ids.end()).first -
                                        prompt_ids.begin());
  if (const auto bos = session.bos_id()) {
    item.ids.insert(item.ids.begin(), *bos);
    ++item.prompt_len;
  }
  ROTUNDA_CHECK(item.prompt_len > 0, line.where(), ": 'prompt' has no tokens");
  ROTUNDA_CHECK(item.prompt_len < item.ids.size(), line.where(), ": 'answer' has no tokens");
  if (!line.has("solution")) item.answer_depth = depth_of(line.text("answer"), prompt);
  return item;
}

// Hidden states that predict the answer's tokens, [n, hidden_size].
at::Tensor run_item(const KvBinding& binding, kv::KvCache& cache, kv::SeqId seq, const AnswerItem& item, const EvalOptions& options) {
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

std::vector<AnswerItem> read_answers(const Session& session, const std::filesystem::path& data, int64_t limit) {
  std::vector<AnswerItem> items;
  for (const JsonlLine& line : read_jsonl(data, limit)) items.push_back(make_item(session, line));
  return items;
}

AccuracyReport evaluate_answers(const Session& session, const AnswersOptions& options) {
  const std::vector<AnswerItem> items = read_answers(session, options.data, options.limit);
  return evaluate_answers(bind_all(session, options), items, options);
}

AccuracyReport evaluate_answers(const std::vector<KvBinding>& bindings, const std::vector<AnswerItem>& items, const EvalOptions& options) {
  size_t longest = 0;
  for (const AnswerItem& item : items) longest = std::max(longest, item.ids.size());
  for (const KvBinding& binding : bindings) require_memory(binding, {static_cast<int64_t>(longest)});

  return run_items(bindings, options, "answers", static_cast<int64_t>(items.size()),
                   [&](const KvBinding& binding, kv::KvCache& cache, int64_t index) {
                     const AnswerItem& item = items[static_cast<size_t>(index)];
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
