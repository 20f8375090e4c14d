#include "engine/compare.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <span>

#include "base/check.h"
#include "engine/decode_speed.h"
#include "engine/generate.h"
#include "engine/layer_probe.h"

namespace rotunda::engine {

namespace {

constexpr int64_t kDecodeSteps = 32;
constexpr int64_t kPromptTokens = 32;  // of a prompt cut from the text
constexpr int64_t kPrompts = 3;
constexpr int64_t kMaxProbeLen = 1024;  // a map of attention has a cell for every token and layer
constexpr int64_t kKeyRows = 64;        // of the picture of keys: more than that no screen shows apart

// All input, read and checked.
struct Inputs {
  std::vector<int64_t> tokens;  // of the text, behind a BOS where there is one
  std::vector<std::vector<AnswerItem>> data;
  std::vector<std::string> prompts;  // for people
  std::vector<std::vector<int64_t>> prompt_ids;
  int64_t decode_len = 0;
};

void check_options(const CompareOptions& options, const kv::KvModel& model) {
  const auto at_least = [](const char* flag, int64_t value, int64_t least) {
    ROTUNDA_CHECK(value >= least, flag, ": got ", value, ", expected ", least, " or more");
  };
  at_least("--windows", options.windows, 0);
  at_least("--limit", options.limit, 0);
  at_least("--prefill-chunk", options.prefill_chunk, 1);
  at_least("--max-new-tokens", options.max_new_tokens, 1);
  at_least("--decode-len", options.decode_len, 0);
  ROTUNDA_CHECK(options.probe_len >= 2 && options.probe_len <= kMaxProbeLen, "--probe-len: got ", options.probe_len,
                ", expected 2 to ", kMaxProbeLen);
  if (options.window_len) at_least("--window-len", *options.window_len, 2);
  const auto below = [](const char* flag, int value, int end) {
    ROTUNDA_CHECK(value >= 0 && value < end, flag, ": got ", value, ", the model has 0 to ", end - 1);
  };
  if (options.key_layer) below("--key-layer", *options.key_layer, model.n_layers);
  below("--key-head", options.key_head, model.n_kv_heads);
}

// Three pieces of the text, evenly spread; one where it is short.
void cut_prompts(const Session& session, Inputs& inputs) {
  const int64_t bos = session.bos_id() ? 1 : 0;
  const int64_t n_text = static_cast<int64_t>(inputs.tokens.size()) - bos;
  const int64_t n_prompts = n_text >= 2 * kPrompts * kPromptTokens ? kPrompts : 1;
  const int64_t n_tokens = std::min(kPromptTokens, n_text);
  for (int64_t i = 0; i < n_prompts; ++i) {
    const auto begin = inputs.tokens.begin() + bos + i * (n_text / n_prompts);
    std::vector<int64_t> ids(begin, begin + n_tokens);
    inputs.prompts.push_back(session.tokenizer->decode(ids, /*skip_special=*/true));
    if (bos == 1) ids.insert(ids.begin(), inputs.tokens.front());
    inputs.prompt_ids.push_back(std::move(ids));
  }
}

Inputs read_inputs(const Session& session, std::string_view text, const CompareOptions& options) {
  const model::CausalLmInfo& info = session.model->info();
  check_options(options, info.kv);
  Inputs inputs;
  for (const auto& path : options.data) inputs.data.push_back(read_answers(session, path, options.limit));
  inputs.tokens = session.tokenizer->encode(text, /*add_special=*/false);
  ROTUNDA_CHECK(inputs.tokens.size() >= 2, "the text has ", inputs.tokens.size(), " tokens, expected 2 or more");
  if (const auto bos = session.bos_id()) inputs.tokens.insert(inputs.tokens.begin(), *bos);
  if (!options.prompts) {
    cut_prompts(session, inputs);
  } else {
    inputs.prompts = *options.prompts;
    for (const std::string& prompt : inputs.prompts) {
      inputs.prompt_ids.push_back(session.tokenizer->encode(prompt, /*add_special=*/true));
      ROTUNDA_CHECK(!inputs.prompt_ids.back().empty(), "--prompts: prompt ", inputs.prompt_ids.size(),
                    " has no tokens");
    }
  }
  if (options.decode_len > 0) {
    const int64_t n_tokens = static_cast<int64_t>(inputs.tokens.size());
    inputs.decode_len =
        std::min({options.decode_len, n_tokens - 1, std::max<int64_t>(1, info.max_position_embeddings - kDecodeSteps)});
  }
  return inputs;
}

// The caches to compare, the 16-bit one among them. @return the index of that
size_t bind_with_reference(const Session& session, const CompareOptions& options, std::vector<KvBinding>& bindings) {
  bindings = bind_all(session, options);
  const KvBinding reference =
      bind_kv(session, kv::parse_kv_spec(kReferenceKv), std::nullopt, options.progress, options.stop);
  const auto same = [&](const KvBinding& binding) { return binding.used == reference.used; };
  const auto found = std::find_if(bindings.begin(), bindings.end(), same);
  if (found != bindings.end()) return static_cast<size_t>(found - bindings.begin());
  bindings.insert(bindings.begin(), reference);
  return 0;
}

// Asks for what the parts will ask for later, so that nothing has run in vain.
void require_all_memory(const std::vector<KvBinding>& bindings, const Inputs& inputs, const CompareOptions& options) {
  std::vector<int64_t> generations;
  for (const auto& ids : inputs.prompt_ids)
    generations.push_back(static_cast<int64_t>(ids.size()) + options.max_new_tokens);
  int64_t longest = inputs.decode_len + kDecodeSteps;
  for (const auto& items : inputs.data) {
    for (const AnswerItem& item : items) longest = std::max(longest, static_cast<int64_t>(item.ids.size()));
  }
  for (const KvBinding& binding : bindings) {
    require_memory(binding, generations);
    require_memory(binding, {longest});
  }
}

// [T, d] -> [rows, d]: the largest magnitude of every `tokens_per_row` tokens.
at::Tensor largest_magnitudes(const at::Tensor& keys, int64_t tokens_per_row) {
  std::vector<at::Tensor> rows;
  for (const at::Tensor& part : keys.abs().split(tokens_per_row)) rows.push_back(std::get<0>(part.max(0)));
  return at::stack(rows);
}

// How many bytes two texts share, cut back to where a UTF-8 character begins.
size_t shared_bytes(const std::string& a, const std::string& b) {
  size_t n = static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
  const auto inside = [](const std::string& text, size_t at) { return at < text.size() && (text[at] & 0xc0) == 0x80; };
  while (n > 0 && (inside(a, n) || inside(b, n))) --n;
  return n;
}

GeneratedText compare_texts(const GeneratedSequence& own, const GeneratedSequence& reference) {
  GeneratedText text;
  const size_t shared = shared_bytes(own.text, reference.text);
  text.same = own.text.substr(0, shared);
  text.rest = own.text.substr(shared);
  const auto differs =
      std::mismatch(own.tokens.begin(), own.tokens.end(), reference.tokens.begin(), reference.tokens.end()).first;
  if (own.tokens != reference.tokens) text.first_difference = differs - own.tokens.begin();
  text.finished = to_string(own.finished);
  return text;
}

class Comparison {
 public:
  Comparison(const Session& session, std::string_view text, const CompareOptions& options)
      : session_(session), text_(text), options_(options), inputs_(read_inputs(session, text, options)) {
    report_.reference = bind_with_reference(session, options, bindings_);
    report_.rows.resize(bindings_.size());
    require_all_memory(bindings_, inputs_, options);
  }

  CompareReport run() {
    measure_perplexity();
    measure_answers();
    look_inside();
    measure_speed();
    generate_texts();
    return std::move(report_);
  }

 private:
  // One unit of work for every cache, with its name on the progress bar.
  template <typename Work>
  void for_each_binding(const std::string& stage, const Work& work) {
    for (size_t b = 0; b < bindings_.size(); ++b) {
      if (options_.progress) options_.progress(stage, static_cast<int64_t>(b), static_cast<int64_t>(bindings_.size()));
      work(bindings_[b], report_.rows[b]);
    }
    if (options_.progress) options_.progress(stage, 1, 1);
  }

  void measure_perplexity() {
    EvalOptions options = options_;
    options.limit = options_.windows;
    const TextWindows windows = cut_text(session_, text_, options_.window_len);
    const PerplexityReport perplexity = evaluate_perplexity(session_, windows, bindings_, options);
    if (perplexity.interrupted) throw Interrupted();
    report_.window_len = perplexity.window_len;
    report_.scored_tokens = perplexity.scored_tokens;
    for (size_t b = 0; b < bindings_.size(); ++b) report_.rows[b].quality = perplexity.results[b];
  }

  void measure_answers() {
    std::vector<AnswerItem> all_items;
    std::vector<std::vector<bool>> all_correct(bindings_.size());
    for (const std::vector<AnswerItem>& items : inputs_.data) {
      const AccuracyReport answers = evaluate_answers(bindings_, items, options_);
      if (answers.interrupted) throw Interrupted();
      all_items.insert(all_items.end(), items.begin(), items.end());
      for (size_t b = 0; b < bindings_.size(); ++b) {
        const AccuracyResult& result = answers.results[b];
        report_.rows[b].answers.push_back(result);
        all_correct[b].insert(all_correct[b].end(), result.correct.begin(), result.correct.end());
      }
    }
    report_.retrieval = retrieval_grid(all_items);
    for (size_t b = 0; b < bindings_.size(); ++b)
      report_.rows[b].retrieved = retrieved(report_.retrieval, all_items, all_correct[b]);
  }

  void look_inside() {
    const kv::KvModel& model = session_.model->info().kv;
    const auto tokens = std::span<const int64_t>(inputs_.tokens)
                            .first(std::min(inputs_.tokens.size(), static_cast<size_t>(options_.probe_len)));
    for (const int64_t id : tokens)
      report_.probe_tokens.push_back(session_.tokenizer->decode({id}, /*skip_special=*/false));
    report_.attention = attention_shares(session_, tokens, options_.stop);
    report_.key_layer = options_.key_layer.value_or(model.n_layers / 2);
    report_.key_head = options_.key_head;
    report_.key_tokens = static_cast<int64_t>(tokens.size());
    report_.key_tokens_per_row = (report_.key_tokens + kKeyRows - 1) / kKeyRows;
    const auto picture = [&](const at::Tensor& keys) {
      return largest_magnitudes(keys.narrow(1, int64_t{report_.key_head} * model.head_dim, model.head_dim),
                                report_.key_tokens_per_row);
    };
    report_.keys = picture(model_keys(session_, report_.key_layer, tokens, options_.stop));
    for_each_binding("layers", [&](const KvBinding& binding, CompareRow& row) {
      row.layer_error = layer_errors(binding, tokens, options_.stop);
      const at::Tensor keys = coded_keys(binding, report_.key_layer, tokens, options_.stop);
      if (keys.defined()) row.keys = picture(keys);
    });
  }

  void measure_speed() {
    report_.decode_len = inputs_.decode_len;
    if (report_.decode_len == 0) return;
    const std::span<const int64_t> tokens(inputs_.tokens);
    const auto prompt = tokens.first(static_cast<size_t>(report_.decode_len));
    const auto next = tokens.subspan(prompt.size(), std::min<size_t>(kDecodeSteps, tokens.size() - prompt.size()));
    for_each_binding("speed", [&](const KvBinding& binding, CompareRow& row) {
      row.decode_tok_s = decode_tok_s(binding, prompt, next, options_.prefill_chunk, options_.stop);
    });
  }

  void generate_texts() {
    report_.prompts = inputs_.prompts;
    if (inputs_.prompt_ids.empty()) return;
    GenerateRequest request;
    request.prompt_ids = inputs_.prompt_ids;
    request.options.max_new_tokens = options_.max_new_tokens;
    request.options.prefill_chunk = options_.prefill_chunk;
    request.options.stop = options_.stop;
    std::vector<GenerateResult> results;
    for_each_binding("generating", [&](const KvBinding& binding, CompareRow&) {
      results.push_back(generate(session_, binding, request));
      if (results.back().interrupted()) throw Interrupted();
    });
    for (size_t b = 0; b < bindings_.size(); ++b) {
      for (size_t p = 0; p < inputs_.prompts.size(); ++p) {
        const GeneratedSequence& reference = results[report_.reference].sequences[p];
        report_.rows[b].generated.push_back(compare_texts(results[b].sequences[p], reference));
      }
    }
  }

  const Session& session_;
  const std::string_view text_;
  const CompareOptions& options_;
  const Inputs inputs_;
  std::vector<KvBinding> bindings_;
  CompareReport report_;
};

}  // namespace

CompareReport compare(const Session& session, std::string_view text, const CompareOptions& options) {
  return Comparison(session, text, options).run();
}

}  // namespace rotunda::engine
