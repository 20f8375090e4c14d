#include "engine/generate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>

#include "base/check.h"
#include "base/log.h"
#include "engine/batch_sampling.h"
#include "engine/saved_cache.h"
#include "engine/step.h"
#include "engine/stop_matcher.h"
#ifdef ROTUNDA_CUDA
#include "engine/step_graphs_cuda.h"
#endif

namespace rotunda::engine {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// One sequence while it runs.
struct Running {
  Running(const Continuation& input, const io::Tokenizer& tokenizer, const GenerateOptions& options, size_t index)
      : seq(input.seq), feed(input.tokens), decoder(tokenizer), stops(options.stops), sampler(options.sampling, index) {}

  kv::SeqId seq;
  std::vector<int64_t> feed;  // the prompt, then one token at a time
  size_t fed = 0;
  int64_t rope_len = 0;
  io::StreamDecoder decoder;
  StopMatcher stops;
  Sampler sampler;
  bool done = false;
};

class Batch {
 public:
  Batch(const model::CausalLm& model, const io::Tokenizer& tokenizer, const std::set<int64_t>& eos_ids, kv::KvCache& cache,
        const std::vector<Continuation>& inputs, const GenerateOptions& options, bool keep_sequences)
      : model_(model), eos_ids_(eos_ids), cache_(cache), options_(options), keep_sequences_(keep_sequences) {
    result_.sequences.resize(inputs.size());
    running_.reserve(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      ROTUNDA_ASSERT(!inputs[i].tokens.empty());
      Running& one = running_.emplace_back(inputs[i], tokenizer, options, i);
      one.rope_len = cache.kv_len(one.seq) + static_cast<int64_t>(one.feed.size());
      result_.sequences[i].prompt_tokens = static_cast<int64_t>(one.feed.size());
      total_prompt_tokens_ += static_cast<int64_t>(one.feed.size());
    }
#ifdef ROTUNDA_CUDA
    if (model.info().kv.device.is_cuda()) graphs_ = std::make_unique<StepGraphs>(model, cache, options.sampling);
#endif
  }

  GenerateResult run() {
    try {
      while (prefill_step()) {
      }
      result_.prefill_tok_s = static_cast<double>(result_.prompt_tokens) / std::max(seconds_since(start_), 1e-9);
      const auto decode_start = Clock::now();
      int64_t decoded = 0;
      while (const size_t n = decode_step()) {
        decoded += static_cast<int64_t>(n);
        result_.decode_tok_s = static_cast<double>(decoded) / std::max(seconds_since(decode_start), 1e-9);
      }
    } catch (const Interrupted&) {
      for (size_t i = 0; i < running_.size(); ++i) {
        if (!running_[i].done) finish(i, FinishReason::kInterrupted);
      }
    }
    release_finished();
    return std::move(result_);
  }

 private:
  // Runs the next chunks of prompts, at most prefill_chunk tokens; false where no prompt has any left.
  bool prefill_step() {
    std::vector<size_t> members;
    std::vector<kv::SeqChunk> chunks;
    std::vector<int64_t> tokens;
    for (size_t i = 0; i < running_.size(); ++i) {
      const Running& one = running_[i];
      // A chunk is never cut to fill a step: where chunks begin must not depend on the neighbours.
      const size_t n = std::min(one.feed.size() - one.fed, static_cast<size_t>(options_.prefill_chunk));
      if (one.done || n == 0) continue;
      if (!tokens.empty() && tokens.size() + n > static_cast<size_t>(options_.prefill_chunk)) break;
      members.push_back(i);
      chunks.push_back({.seq = one.seq, .n_tokens = static_cast<int64_t>(n), .is_prompt = true, .rope_len = one.rope_len});
      tokens.insert(tokens.end(), one.feed.begin() + static_cast<int64_t>(one.fed),
                    one.feed.begin() + static_cast<int64_t>(one.fed + n));
    }
    if (members.empty()) return false;
    const at::Tensor hidden = run_step(model_, cache_, chunks, tokens, kv::StepKind::kGenerate, options_.stop);
    result_.prompt_tokens += static_cast<int64_t>(tokens.size());
    if (options_.progress) options_.progress("prefill", result_.prompt_tokens, total_prompt_tokens_);

    std::vector<size_t> ready;
    std::vector<at::Tensor> last_rows;
    int64_t end = 0;
    for (size_t m = 0; m < members.size(); ++m) {
      Running& one = running_[members[m]];
      end += chunks[m].n_tokens;
      one.fed += static_cast<size_t>(chunks[m].n_tokens);
      warn_beyond_context(one);
      if (one.fed < one.feed.size()) continue;
      ready.push_back(members[m]);
      last_rows.push_back(hidden.narrow(0, end - 1, 1));
    }
    if (!ready.empty()) sample(ready, at::cat(last_rows));
    return true;
  }

  // One token for each sequence that still runs; how many those were.
  size_t decode_step() {
    std::vector<size_t> members;
    std::vector<kv::SeqChunk> chunks;
    std::vector<int64_t> tokens;
    for (size_t i = 0; i < running_.size(); ++i) {
      if (running_[i].done) continue;
      members.push_back(i);
      chunks.push_back({.seq = running_[i].seq, .n_tokens = 1, .is_prompt = false, .rope_len = 0});
      tokens.push_back(result_.sequences[i].tokens.back());
    }
    if (members.empty()) return 0;
#ifdef ROTUNDA_CUDA
    if (graphs_) {
      const std::vector<int64_t> ids = graphs_->run(chunks, tokens, draws(members), options_.stop);
      for (const size_t i : members) warn_beyond_context(running_[i]);
      accept_all(members, [&](size_t m) { return ids[m]; });
    } else
#endif
    {
      const at::Tensor hidden = run_step(model_, cache_, chunks, tokens, kv::StepKind::kGenerate, options_.stop);
      for (const size_t i : members) warn_beyond_context(running_[i]);
      sample(members, hidden);
    }
    if (options_.progress && running_.size() > 1) {
      options_.progress("generating", result_.new_tokens, static_cast<int64_t>(running_.size()) * options_.max_new_tokens);
    }
    return members.size();
  }

  // @param hidden [members.size(), hidden_size]
  void sample(const std::vector<size_t>& members, const at::Tensor& hidden) {
    if (options_.max_new_tokens == 0) {
      for (const size_t i : members) finish(i, FinishReason::kLength);
      return release_finished();
    }
    const at::Tensor logits = model_.logits(hidden).contiguous();  // [N, vocab_size] fp32
    if (logits.is_cuda()) {
      const at::Tensor drawn = at::tensor(draws(members), at::kDouble).to(logits.device());
      const std::vector<int64_t> ids = checked_ids(sample_rows(logits, options_.sampling, drawn));
      return accept_all(members, [&](size_t m) { return ids[m]; });
    }
    const size_t vocab_size = static_cast<size_t>(logits.size(1));
    accept_all(members, [&](size_t m) {
      return running_[members[m]].sampler.sample({logits.const_data_ptr<float>() + m * vocab_size, vocab_size});
    });
  }

  // The random numbers of a step that is sampled on the GPU; none where it is greedy.
  std::vector<double> draws(const std::vector<size_t>& members) {
    std::vector<double> numbers;
    if (options_.sampling.temperature == 0.0) return numbers;
    for (const size_t i : members) numbers.push_back(running_[i].sampler.draw());
    return numbers;
  }

  // @param id_of  the new token of members[m]
  template <typename IdOf>
  void accept_all(const std::vector<size_t>& members, const IdOf& id_of) {
    bool any_done = false;
    for (size_t m = 0; m < members.size(); ++m) {
      accept(members[m], id_of(m));
      any_done = any_done || running_[members[m]].done;
    }
    if (any_done) release_finished();
  }

  void accept(size_t i, int64_t id) {
    Running& one = running_[i];
    GeneratedSequence& out = result_.sequences[i];
    if (out.ttft_ms == 0.0) {
      out.ttft_ms = 1e3 * seconds_since(start_);
      if (result_.ttft_ms == 0.0) result_.ttft_ms = out.ttft_ms;
    }
    ++result_.new_tokens;
    if (!options_.ignore_eos && eos_ids_.contains(id)) return finish(i, FinishReason::kEos);
    out.tokens.push_back(id);
    emit(i, one.stops.push(one.decoder.push(id)));
    if (one.stops.stopped()) return finish(i, FinishReason::kStop);
    if (static_cast<int64_t>(out.tokens.size()) == options_.max_new_tokens) finish(i, FinishReason::kLength);
  }

  void finish(size_t i, FinishReason reason) {
    Running& one = running_[i];
    // A held-back character may still complete a stop text.
    emit(i, one.stops.push(one.decoder.finish()));
    emit(i, one.stops.finish());
    if (one.stops.stopped()) reason = FinishReason::kStop;
    result_.sequences[i].finished = reason;
    one.done = true;
  }

  void emit(size_t i, const std::string& text) {
    if (text.empty()) return;
    result_.sequences[i].text += text;
    if (options_.on_text) options_.on_text(i, text);
  }

  void release_finished() {
    const kv::KvUsage usage = cache_.usage();
    if (usage.cache_bytes() >= result_.cache_bytes) {
      result_.cache_bytes = usage.cache_bytes();
      result_.bits_per_element = usage.bits_per_element();
    }
    if (keep_sequences_) return;
    for (Running& one : running_) {
      if (!one.done || one.seq < 0) continue;
      cache_.release(one.seq);
      one.seq = -1;
    }
  }

  void warn_beyond_context(const Running& one) {
    const int64_t trained = model_.info().max_position_embeddings;
    if (warned_ || trained <= 0 || cache_.kv_len(one.seq) <= trained) return;
    warned_ = true;
    ROTUNDA_LOG_WARN("the text is longer than the {} tokens that the model was trained for: expect worse output from here on", trained);
  }

  const model::CausalLm& model_;
  const std::set<int64_t>& eos_ids_;
  kv::KvCache& cache_;
  const GenerateOptions& options_;
  const bool keep_sequences_;
  const Clock::time_point start_ = Clock::now();
  std::vector<Running> running_;
  GenerateResult result_;
  int64_t total_prompt_tokens_ = 0;
  bool warned_ = false;
#ifdef ROTUNDA_CUDA
  std::unique_ptr<StepGraphs> graphs_;  // on a GPU
#endif
};

void check_options(const GenerateOptions& options) {
  check_sampling(options.sampling);
  ROTUNDA_CHECK(options.max_new_tokens >= 0 && options.max_new_tokens <= std::numeric_limits<int32_t>::max(),
                "--max-new-tokens: got ", options.max_new_tokens, ", expected 0 to ", std::numeric_limits<int32_t>::max());
  ROTUNDA_CHECK(options.prefill_chunk > 0, "--prefill-chunk: got ", options.prefill_chunk, ", expected 1 or more");
}

// "prompt" for a single one, "prompt 3" in a batch.
std::string prompt_name(size_t index, size_t n) { return n == 1 ? "prompt" : "prompt " + std::to_string(index + 1); }

std::vector<std::vector<int64_t>> encode_prompts(const Session& session, const GenerateRequest& request,
                                                 const std::vector<int64_t>& pending) {
  const bool continues = request.load_cache.has_value();
  std::vector<std::vector<int64_t>> ids = request.prompt_ids;
  if (ids.empty()) {
    for (size_t i = 0; i < request.prompts.size(); ++i) {
      // BOS alone would be a valid input, but an empty prompt is more often a mistake than a wish.
      ROTUNDA_CHECK(!request.prompts[i].empty() || !pending.empty(), prompt_name(i, request.prompts.size()),
                    ": is empty, expected text");
      ids.push_back(session.tokenizer->encode(request.prompts[i], /*add_special=*/!continues));
    }
  }
  ROTUNDA_CHECK(!ids.empty(), "no prompt given");
  const int64_t vocab_size = session.model->info().vocab_size;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i].insert(ids[i].begin(), pending.begin(), pending.end());
    ROTUNDA_CHECK(!ids[i].empty(), prompt_name(i, ids.size()), ": has no tokens");
    for (const int64_t id : ids[i]) {
      ROTUNDA_CHECK(id >= 0 && id < vocab_size, prompt_name(i, ids.size()), ": token ", id, ", the vocabulary has ", vocab_size);
    }
  }
  return ids;
}

}  // namespace

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEos: return "eos";
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kInterrupted: return "interrupted";
  }
  return "";
}

bool GenerateResult::interrupted() const {
  return std::any_of(sequences.begin(), sequences.end(),
                     [](const GeneratedSequence& one) { return one.finished == FinishReason::kInterrupted; });
}

GenerateResult continue_sequences(const model::CausalLm& model, const io::Tokenizer& tokenizer, const std::set<int64_t>& eos_ids,
                                  kv::KvCache& cache, const std::vector<Continuation>& inputs, const GenerateOptions& options,
                                  bool keep_sequences) {
  check_options(options);
  return Batch(model, tokenizer, eos_ids, cache, inputs, options, keep_sequences).run();
}

GenerateResult generate(const Session& session, const KvBinding& binding, const GenerateRequest& request) {
  check_options(request.options);
  ROTUNDA_CHECK(!request.save_cache || std::max(request.prompts.size(), request.prompt_ids.size()) == 1,
                "--save-cache: keeps one sequence, got ", std::max(request.prompts.size(), request.prompt_ids.size()), " prompts");
  SavedCache loaded;
  std::vector<int64_t> pending;
  const auto cache = binding.make_cache();
  kv::SeqId base = -1;
  if (request.load_cache) {
    loaded = load_cache(*request.load_cache, binding);
    base = cache->import_sequence(loaded.cache);
    const int64_t kv_len = cache->kv_len(base);
    ROTUNDA_CHECK(kv_len <= static_cast<int64_t>(loaded.tokens.size()), loaded.cache.origin, ": holds ", loaded.tokens.size(),
                  " token ids for ", kv_len, " cached tokens");
    pending.assign(loaded.tokens.begin() + kv_len, loaded.tokens.end());
    loaded.cache.tensors.clear();
  }
  const auto prompts = encode_prompts(session, request, pending);
  std::vector<int64_t> kv_lens;
  for (const auto& prompt : prompts) {
    kv_lens.push_back((base < 0 ? 0 : cache->kv_len(base)) + static_cast<int64_t>(prompt.size()) + request.options.max_new_tokens);
  }
  require_memory(binding, kv_lens);

  std::vector<Continuation> inputs;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const kv::SeqId seq = base < 0 ? cache->create() : (i + 1 == prompts.size() ? base : cache->fork(base));
    inputs.push_back({.seq = seq, .tokens = prompts[i]});
  }
  const std::set<int64_t> eos_ids = session.eos_ids();
  GenerateResult result = continue_sequences(*binding.model, *session.tokenizer, eos_ids, *cache, inputs, request.options,
                                             /*keep_sequences=*/request.save_cache.has_value());
  if (request.save_cache) {
    const int64_t kv_len = cache->kv_len(inputs[0].seq);
    SavedCache saved;
    saved.tokens = loaded.tokens;
    saved.tokens.insert(saved.tokens.end(), prompts[0].begin() + static_cast<int64_t>(pending.size()), prompts[0].end());
    // An interrupted prefill leaves part of the prompt unfed; the next run goes on from there.
    const auto& generated = result.sequences[0].tokens;
    saved.tokens.insert(saved.tokens.end(), generated.begin(), generated.end());
    ROTUNDA_ASSERT(kv_len <= static_cast<int64_t>(saved.tokens.size()));
    ROTUNDA_CHECK(kv_len > 0, "--save-cache: stopped before any token was cached, nothing to save");
    saved.cache = cache->export_sequence(inputs[0].seq);
    save_cache(*request.save_cache, binding, saved);
  }
  return result;
}

}  // namespace rotunda::engine
