#include "engine/generate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/toy.h"

namespace rotunda::engine {
namespace {

using testing::HasSubstr;

// Greedy decoding that runs the whole text anew for every token: no cache to get wrong.
std::vector<int64_t> reference_greedy(const KvBinding& binding, std::vector<int64_t> ids, int n) {
  std::vector<int64_t> out;
  for (int i = 0; i < n; ++i) {
    const at::Tensor hidden = toy::run_whole(binding, ids);
    out.push_back(binding.model->logits(hidden[-1].unsqueeze(0)).argmax().item<int64_t>());
    ids.push_back(out.back());
  }
  return out;
}

GenerateRequest request_of(std::vector<std::string> prompts, int64_t max_new_tokens) {
  GenerateRequest request;
  request.prompts = std::move(prompts);
  request.options.max_new_tokens = max_new_tokens;
  request.options.ignore_eos = true;
  return request;
}

class GenerateTest : public testing::Test {
 protected:
  Session session_ = toy::make_session();
  KvBinding exact_ = toy::bind(session_, "fp32");
};

TEST_F(GenerateTest, GreedyEqualsDecodingWithoutACacheForEveryChunkLength) {
  const std::string prompt = "the quick brown fox jumps over the lazy dog";
  const auto expected = reference_greedy(exact_, session_.tokenizer->encode(prompt, true), 20);
  for (const int64_t chunk : {1, 3, 43, 44, 45, 512}) {
    GenerateRequest request = request_of({prompt}, 20);
    request.options.prefill_chunk = chunk;
    const GenerateResult result = generate(session_, exact_, request);
    EXPECT_EQ(result.sequences[0].tokens, expected) << "chunk " << chunk;
    EXPECT_EQ(result.sequences[0].finished, FinishReason::kLength);
    EXPECT_EQ(result.prompt_tokens, 44);
    EXPECT_GT(result.ttft_ms, 0.0);
    EXPECT_GT(result.cache_bytes, 0);
  }
}

TEST_F(GenerateTest, ABatchEqualsItsPromptsAlone) {
  std::vector<std::string> prompts = {"a", "some words", "", "b c d", "the end"};
  prompts[2].assign(100, 'x');
  for (const char* spec : {"fp32", "bf16", "rotate2:recent=16,sinks=4,reorder=none"}) {
    const KvBinding binding = toy::bind(session_, spec);
    GenerateRequest together = request_of(prompts, 12);
    together.options.prefill_chunk = 32;
    std::vector<std::string> streamed(prompts.size());
    together.options.on_text = [&](size_t i, const std::string& text) { streamed[i] += text; };
    const GenerateResult batch = generate(session_, binding, together);
    for (size_t i = 0; i < prompts.size(); ++i) {
      GenerateRequest single = request_of({prompts[i]}, 12);
      single.options.prefill_chunk = 32;
      const GenerateResult alone = generate(session_, binding, single);
      EXPECT_EQ(batch.sequences[i].tokens, alone.sequences[0].tokens) << spec << ", prompt " << i;
      EXPECT_EQ(batch.sequences[i].text, streamed[i]);
    }
  }
}

TEST_F(GenerateTest, StopsAtTextsAndEos) {
  GenerateRequest request = request_of({"hello world"}, 30);
  const GenerateResult whole = generate(session_, exact_, request);
  const std::string text = whole.sequences[0].text;
  ASSERT_GT(text.size(), 10u);
  const std::string stop = text.substr(5, 3);
  request.options.stops = {stop};
  const GenerateResult stopped = generate(session_, exact_, request);
  EXPECT_EQ(stopped.sequences[0].text, text.substr(0, text.find(stop)));
  EXPECT_EQ(stopped.sequences[0].finished, FinishReason::kStop);

  // Whatever token comes fourth, called an EOS, ends the text there.
  const auto cache = exact_.make_cache();
  GenerateOptions options;
  options.max_new_tokens = 30;
  const int64_t eos = whole.sequences[0].tokens[3];
  const GenerateResult ended = continue_sequences(*exact_.model, *session_.tokenizer, {eos}, *cache,
                                                  {{.seq = cache->create(), .tokens = session_.tokenizer->encode("hello world", true)}},
                                                  options, /*keep_sequences=*/false);
  EXPECT_EQ(ended.sequences[0].finished, FinishReason::kEos);
  const auto& tokens = whole.sequences[0].tokens;
  const auto first = std::find(tokens.begin(), tokens.end(), eos);
  EXPECT_EQ(ended.sequences[0].tokens, std::vector<int64_t>(tokens.begin(), first));
  EXPECT_EQ(cache->usage().cache_bytes(), 0) << "finished sequences are released";
}

TEST_F(GenerateTest, AStopKeepsWhatThereIs) {
  std::atomic<bool> stop{false};
  GenerateRequest request = request_of({"abc", "defg"}, 1000);
  request.options.stop = &stop;
  int pieces = 0;
  request.options.on_text = [&](size_t, const std::string&) { stop = ++pieces >= 20; };
  const GenerateResult result = generate(session_, exact_, request);
  EXPECT_TRUE(result.interrupted());
  for (const GeneratedSequence& one : result.sequences) {
    EXPECT_EQ(one.finished, FinishReason::kInterrupted);
    EXPECT_GT(one.tokens.size(), 0u);
    EXPECT_LT(one.tokens.size(), 1000u);
  }
  stop = true;
  EXPECT_TRUE(generate(session_, exact_, request).sequences[0].tokens.empty());
}

TEST_F(GenerateTest, NoNewTokensRunsThePromptOnly) {
  const GenerateResult result = generate(session_, exact_, request_of({"abc"}, 0));
  EXPECT_TRUE(result.sequences[0].tokens.empty());
  EXPECT_EQ(result.prompt_tokens, 4);
  EXPECT_GT(result.cache_bytes, 0);
}

TEST_F(GenerateTest, ASavedCacheGoesOnWhereItStopped) {
  const toy::TemporaryFolder folder;
  for (const char* spec : {"fp32", "rotate2:recent=16,sinks=4,reorder=none", "layers 0=rotunda2:recent=16;fp16"}) {
    const KvBinding binding = toy::bind(session_, spec);
    const auto straight = generate(session_, binding, request_of({"once upon a time there was"}, 40)).sequences[0].tokens;
    GenerateRequest first = request_of({"once upon a time there was"}, 15);
    first.save_cache = folder / "first";
    auto tokens = generate(session_, binding, first).sequences[0].tokens;
    GenerateRequest second = request_of({""}, 25);
    second.load_cache = folder / "first";
    const auto rest = generate(session_, binding, second).sequences[0].tokens;
    tokens.insert(tokens.end(), rest.begin(), rest.end());
    EXPECT_EQ(tokens, straight) << spec;

    // Two prompts after the same loaded text.
    GenerateRequest both = request_of({" A", " B"}, 5);
    both.load_cache = folder / "first";
    GenerateRequest one = request_of({" B"}, 5);
    one.load_cache = folder / "first";
    EXPECT_EQ(generate(session_, binding, both).sequences[1].tokens, generate(session_, binding, one).sequences[0].tokens);
  }
}

TEST_F(GenerateTest, ASavedCacheOfSomethingElseIsRefused) {
  const toy::TemporaryFolder folder;
  GenerateRequest first = request_of({"once"}, 3);
  first.save_cache = folder / "saved";
  generate(session_, exact_, first);
  GenerateRequest second = request_of({"upon"}, 3);
  second.load_cache = folder / "saved";
  EXPECT_THAT(toy::error_of([&] { generate(session_, toy::bind(session_, "bf16"), second); }), HasSubstr("--kv asks for bf16"));
  EXPECT_THAT(toy::error_of([&] { generate(session_, toy::bind(session_, "layers 0=bf16;fp32"), second); }),
              HasSubstr("--kv asks for layers 0=bf16;layers 1=fp32"));
  const Session other = toy::make_session(true, 2);
  EXPECT_THAT(toy::error_of([&] { generate(other, toy::bind(other, "fp32"), second); }), HasSubstr("made with other weights"));
  toy::write_file(folder / "saved", "not a cache");
  EXPECT_THAT(toy::error_of([&] { generate(session_, exact_, second); }), HasSubstr((folder / "saved").string()));
  first.prompts = {"a", "b"};
  EXPECT_THAT(toy::error_of([&] { generate(session_, exact_, first); }), HasSubstr("--save-cache: keeps one sequence, got 2"));
}

TEST_F(GenerateTest, RefusesBadPromptsAndOptions) {
  const auto refused = [&](const std::function<void(GenerateRequest&)>& change) {
    GenerateRequest request = request_of({"abc"}, 5);
    change(request);
    return toy::error_of([&] { generate(session_, exact_, request); });
  };
  EXPECT_THAT(refused([](auto& r) { r.prompts = {""}; }), HasSubstr("prompt: is empty"));
  EXPECT_THAT(refused([](auto& r) { r.prompts = {"a", ""}; }), HasSubstr("prompt 2: is empty"));
  EXPECT_THAT(refused([](auto& r) { r.prompts.clear(); }), HasSubstr("no prompt"));
  EXPECT_THAT(refused([](auto& r) { r.prompts.clear(); r.prompt_ids = {{5, 258}}; }), HasSubstr("token 258, the vocabulary has 258"));
  EXPECT_THAT(refused([](auto& r) { r.prompts.clear(); r.prompt_ids = {{}}; }), HasSubstr("has no tokens"));
  EXPECT_THAT(refused([](auto& r) { r.options.max_new_tokens = -1; }), HasSubstr("--max-new-tokens: got -1"));
  EXPECT_THAT(refused([](auto& r) { r.options.prefill_chunk = 0; }), HasSubstr("--prefill-chunk: got 0"));
  EXPECT_THAT(refused([](auto& r) { r.options.max_new_tokens = 2'000'000'000; }), HasSubstr("not enough memory"));
}

}  // namespace
}  // namespace rotunda::engine
