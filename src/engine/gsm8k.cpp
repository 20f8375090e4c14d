#include "engine/gsm8k.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <regex>
#include <span>

#include "base/check.h"
#include "engine/generate.h"
#include "engine/jsonl.h"
#include "engine/scoring.h"
#include "engine/step.h"

namespace rotunda::engine {

namespace {

struct Item {
  std::vector<int64_t> ids;  // BOS, examples, question
  std::string answer;
};

// "1,234.50" -> "1234.5", "18.0" -> "18".
std::string normalize(std::string number) {
  std::erase(number, ',');
  if (number.find('.') != std::string::npos) {
    number.erase(number.find_last_not_of('0') + 1);
    if (number.ends_with('.')) number.pop_back();
  }
  return number;
}

Item make_item(const Session& session, const JsonlLine& line) {
  Item item;
  const std::string prompt = gsm8k_examples() + "Q: " + line.text("question") + "\nA:";
  item.ids = session.tokenizer->encode(prompt, /*add_special=*/false);
  if (const auto bos = session.bos_id()) item.ids.insert(item.ids.begin(), *bos);
  const std::string answer = line.text("answer");
  const size_t mark = answer.rfind("####");
  ROTUNDA_CHECK(mark != std::string::npos, line.where(), ": 'answer' has no '####' before its number");
  const auto number = extract_answer(answer.substr(mark + 4));
  ROTUNDA_CHECK(number.has_value(), line.where(), ": 'answer' has no number behind '####'");
  item.answer = *number;
  return item;
}

struct Gathered {
  RunningMean correct;
  UsageTally usage;
  int64_t tokens = 0;
  double seconds = 0.0;
};

// One spec's cache with the examples in it.
struct Lane {
  const KvBinding* binding = nullptr;
  std::unique_ptr<kv::KvCache> cache;
  kv::SeqId examples = -1;
  Gathered gathered;
};

}  // namespace

std::optional<std::string> extract_answer(const std::string& reply) {
  static const std::regex kNumber(R"(-?\d[\d,]*(?:\.\d+)?)");
  const size_t mark = reply.rfind("answer is");
  std::optional<std::string> found;
  const auto from = reply.begin() + static_cast<int64_t>(mark == std::string::npos ? 0 : mark);
  for (std::sregex_iterator it(from, reply.end(), kNumber), end; it != end; ++it) {
    found = normalize(it->str());
    if (mark != std::string::npos) break;
  }
  return found;
}

AccuracyReport evaluate_gsm8k(const Session& session, const Gsm8kOptions& options) {
  ROTUNDA_CHECK(options.max_new_tokens > 0, "--max-new-tokens: got ", options.max_new_tokens, ", expected 1 or more");
  ROTUNDA_CHECK(options.batch_size > 0, "--batch-size: got ", options.batch_size, ", expected 1 or more");
  std::vector<Item> items;
  for (const JsonlLine& line : read_jsonl(options.data, options.limit)) items.push_back(make_item(session, line));
  const std::vector<KvBinding> bindings = bind_all(session, options);

  // What all prompts begin with, one token less than the shortest so that each has something left to feed.
  size_t shared_len = items[0].ids.size() - 1;
  size_t longest = 0;
  for (const Item& item : items) {
    const auto differ = std::mismatch(items[0].ids.begin(), items[0].ids.end(), item.ids.begin(), item.ids.end());
    shared_len = std::min({shared_len, static_cast<size_t>(differ.first - items[0].ids.begin()), item.ids.size() - 1});
    longest = std::max(longest, item.ids.size());
  }
  // A single question shares all but its own text; the examples are what is worth sharing.
  shared_len = std::min(shared_len, session.tokenizer->encode(gsm8k_examples(), false).size());

  GenerateOptions generation;
  generation.max_new_tokens = options.max_new_tokens;
  generation.stops = {"Question:", "Q:"};
  generation.prefill_chunk = options.prefill_chunk;
  generation.stop = options.stop;
  const size_t batch_size = static_cast<size_t>(options.batch_size);
  const std::vector<int64_t> kv_lens(std::min(batch_size, items.size()), static_cast<int64_t>(longest) + options.max_new_tokens);
  const std::set<int64_t> eos_ids = session.eos_ids();

  std::vector<Lane> lanes;
  AccuracyReport report;
  size_t done = 0;
  try {
    for (const KvBinding& binding : bindings) {
      require_memory(binding, kv_lens);
      Lane& lane = lanes.emplace_back();
      lane.binding = &binding;
      lane.cache = binding.make_cache();
      lane.examples = lane.cache->create();
      if (shared_len == 0) continue;
      const auto start = std::chrono::steady_clock::now();
      run_prefill(*binding.model, *lane.cache, lane.examples, std::span(items[0].ids).first(shared_len), options.prefill_chunk,
                  options.stop);
      lane.gathered.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      lane.gathered.tokens = static_cast<int64_t>(shared_len);
    }
    while (done < items.size()) {
      const size_t n = std::min(batch_size, items.size() - done);
      std::vector<Gathered> next;
      for (Lane& lane : lanes) {
        Gathered& gathered = next.emplace_back(lane.gathered);
        std::vector<Continuation> inputs;
        for (size_t i = done; i < done + n; ++i) {
          inputs.push_back({.seq = lane.cache->fork(lane.examples),
                            .tokens = {items[i].ids.begin() + static_cast<int64_t>(shared_len), items[i].ids.end()}});
        }
        const auto start = std::chrono::steady_clock::now();
        const GenerateResult result = continue_sequences(*lane.binding->model, *session.tokenizer, eos_ids, *lane.cache, inputs,
                                                         generation, /*keep_sequences=*/true);
        gathered.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        gathered.tokens += result.prompt_tokens + result.new_tokens;
        int64_t distinct_tokens = static_cast<int64_t>(shared_len);
        for (const Continuation& input : inputs) distinct_tokens += lane.cache->kv_len(input.seq) - static_cast<int64_t>(shared_len);
        gathered.usage.add(usage_of_distinct(*lane.cache, distinct_tokens));
        for (const Continuation& input : inputs) lane.cache->release(input.seq);
        if (result.interrupted()) throw Interrupted();
        for (size_t i = 0; i < n; ++i) {
          gathered.correct.add(extract_answer(result.sequences[i].text) == items[done + i].answer ? 1.0 : 0.0);
        }
      }
      for (size_t b = 0; b < lanes.size(); ++b) lanes[b].gathered = next[b];
      done += n;
      if (options.progress) options.progress("gsm8k", static_cast<int64_t>(done), static_cast<int64_t>(items.size()));
    }
  } catch (const Interrupted&) {
    if (done == 0) throw;
    report.interrupted = true;
  }

  for (const Lane& lane : lanes) {
    AccuracyResult result;
    result.requested = lane.binding->requested;
    result.used = lane.binding->used;
    result.items = static_cast<int64_t>(done);
    result.tokens = lane.gathered.tokens;
    result.bits_per_element = lane.gathered.usage.bits_per_element();
    result.cache_bytes = lane.gathered.usage.cache_bytes();
    result.tok_s = lane.gathered.seconds > 0.0 ? static_cast<double>(result.tokens) / lane.gathered.seconds : 0.0;
    result.accuracy = lane.gathered.correct.mean();
    result.accuracy_stderr = lane.gathered.correct.standard_error();
    report.results.push_back(result);
  }
  return report;
}

}  // namespace rotunda::engine
